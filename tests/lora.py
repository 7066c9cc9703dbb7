"""LoRA adapters for tests: written in PEFT's layout and merged into a torch module, by this file's own arithmetic.

W' = W + alpha / rank * B @ A        A: (rank, in)   B: (out, rank)   (Hu et al. 2021)
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

PREFIX = "base_model.model."


def write_adapter(
    directory: Path, base: Path, modules: list[str], rank: int = 8, alpha: int = 16, seed: int = 0
) -> None:
    """Writes an adapter for every layer's projections of these names, with A and B large enough to change answers.

    Args:
        directory: made if it is missing; gets ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: checkpoint directory that it adapts.
        modules: last parts of module names, such as ``["q_proj", "up_proj"]``. ``embed_tokens`` gets an adapter of the
            embedding, which PEFT lays out otherwise.

    Raises:
        ValueError: a name that no matrix of the checkpoint has.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    found = set()
    with safe_open(base / "model.safetensors", framework="pt") as f:
        for name in f.keys():  # noqa: SIM118  safe_open is no mapping
            module, _, kind = name.rpartition(".")
            shape = f.get_slice(name).get_shape()
            last = module.rpartition(".")[2]
            if kind != "weight" or last not in modules or len(shape) != 2:
                continue
            found.add(last)
            rows, columns = (shape[1], shape[0]) if last == "embed_tokens" else shape
            names = ("lora_embedding_A", "lora_embedding_B") if last == "embed_tokens" else (
                "lora_A.weight", "lora_B.weight")  # fmt: skip
            a = torch.randn(rank, columns, generator=generator) / columns**0.5
            b = torch.randn(rows, rank, generator=generator) / rank**0.5
            for part, value in zip(names, (a, b), strict=True):
                tensors[f"{PREFIX}{module}.{part}"] = value
    if missing := sorted(set(modules) - found):
        raise ValueError(f"{base} has no matrix called {', '.join(missing)}")
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none",
              "target_modules": sorted(modules), "base_model_name_or_path": str(base)}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


@torch.no_grad()
def merge(model: Any, adapter: Path) -> Any:
    """Adds an adapter to the weights of a torch module, in place, and returns the module.

    ``alpha_pattern`` may name last parts of modules only.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, a in tensors.items():
        module = name.removeprefix(PREFIX)
        if module.endswith(".lora_A.weight"):
            stem = module.removesuffix(".lora_A.weight")
            delta = tensors[f"{PREFIX}{stem}.lora_B.weight"] @ a
        elif module.endswith(".lora_embedding_A"):
            stem = module.removesuffix(".lora_embedding_A")
            delta = (tensors[f"{PREFIX}{stem}.lora_embedding_B"] @ a).T
        else:
            continue
        rank, last = a.shape[0], stem.rpartition(".")[2]
        alpha = config.get("alpha_pattern", {}).get(last, config["lora_alpha"])
        scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)  # Kalajdzievski 2023
        weight = parameters[f"{stem}.weight"]
        weight += scale * delta.to(weight.dtype)
    return model
