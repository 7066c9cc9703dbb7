"""Quantised checkpoints for tests, in the layout of compressed-tensors, and what they should compute.

``int8``: weights in 8 bits with a scale for each row; the engine rounds activations to 8 bits, with a scale for each
token. ``int4``: weights in 4 bits with a scale for each group of 32 of a row, activations as they are.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

GROUP = 32
SCHEMES: dict[str, dict[str, Any]] = {
    "int8": {
        "format": "int-quantized",
        "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
        "input_activations": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True},
    },
    "int4": {
        "format": "pack-quantized",
        "weights": {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP,
                    "dynamic": False},
        "input_activations": None,
    },
}  # fmt: skip


def write_quantised(base: Path, directory: Path, scheme: str) -> Path:
    """Copies a checkpoint with the projections of its layers quantised; embeddings, norms and head stay as they are."""
    shutil.copytree(base, directory)
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        tensors |= _quantise(name.removesuffix("weight"), tensors.pop(name), scheme)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    chosen = SCHEMES[scheme]
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": chosen["format"],
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": chosen["weights"],
                "input_activations": chosen["input_activations"],
            }
        },
    }
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    return directory


def _steps(weight: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Whole numbers of the weight's shape, and their scales: (rows, 1) or (rows, columns / GROUP)."""
    top = 127 if scheme == "int8" else 7
    groups = weight.unflatten(1, (-1, weight.shape[1] if scheme == "int8" else GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / top
    return (groups / scales).round().clamp(-top, top).flatten(1), scales[..., 0]


def _quantise(prefix: str, weight: Tensor, scheme: str) -> dict[str, Tensor]:
    steps, scales = _steps(weight, scheme)
    if scheme == "int8":
        return {f"{prefix}weight": steps.to(torch.int8), f"{prefix}weight_scale": scales}
    # Eight values to a 32-bit word, the first in the lowest bits; 0 is stored as 8.
    nibbles = (steps.to(torch.int64) + 8).unflatten(1, (-1, 8))
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    words = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {f"{prefix}weight_packed": words, f"{prefix}weight_scale": scales, f"{prefix}weight_shape": shape}


@torch.no_grad()
def quantised(model: Any, scheme: str) -> Any:
    """Makes a float module compute what the quantised checkpoint should; in place, returns the module."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.endswith("_proj"):
            steps, scales = _steps(module.weight, scheme)
            module.weight.copy_((steps.unflatten(1, (scales.shape[1], -1)) * scales[..., None]).flatten(1))
            if scheme == "int8":
                module.register_forward_pre_hook(lambda _, x: (_round_tokens(x[0]),))
    return model


def _round_tokens(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale
