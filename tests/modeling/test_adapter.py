"""An adapter that would not be applied as a whole is refused, by the name of what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling.adapter import PREFIX, read
from modeling.registry import REGISTRY
from tests.lora import merge, write_adapter

Tensors = dict[str, torch.Tensor]
LAYER = f"{PREFIX}model.layers.0.self_attn"


def save_tiny(directory: Path, model_type: str = "medassist_gpt") -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(REGISTRY[model_type].config_class().tiny(), dtype=torch.float32)
    model.save_pretrained(directory)
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path, base: Path) -> Path:
    write_adapter(tmp_path / "adapter", base, ["q_proj", "down_proj"])
    return tmp_path / "adapter"


def change_config(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(adapter: Path, change: Callable[[Tensors], object]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def test_what_fits(adapter: Path, base: Path) -> None:
    found = read(adapter, base)
    assert (found.rank, found.modules, found.silent, found.changes) == (8, ("down_proj", "q_proj"), (), True)


@pytest.mark.parametrize("model_type", [name for name, arch in REGISTRY.items() if not arch.no_adapters])
def test_every_projection_of_every_architecture_can_be_adapted(model_type: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", model_type)
    model = AutoModelForCausalLM.from_pretrained(base)
    layers = [name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name]
    names = sorted({name.rpartition(".")[2] for name in layers})
    write_adapter(tmp_path / "adapter", base, names, rank=3)
    assert list(read(tmp_path / "adapter", base).modules) == names
    change_config(tmp_path / "adapter", target_modules="all-linear")
    assert list(read(tmp_path / "adapter", base).modules) == names
    lost = f"{PREFIX}{layers[-1]}"
    change_tensors(tmp_path / "adapter", lambda t: [t.pop(f"{lost}.lora_{side}.weight") for side in "AB"])
    for targets in ("all-linear", r".*\.layers\..*(" + "|".join(names) + ")"):
        change_config(tmp_path / "adapter", target_modules=targets)
        with pytest.raises(ValueError, match=rf"{layers[-1]}, but"):
            read(tmp_path / "adapter", base)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"peft_type": "LOHA"}, "peft_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
        ({"r": 0}, "r must"),
        ({"r": "8"}, "r must"),
        ({"r": 4}, "at rank 4"),
        ({"lora_alpha": None}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 4}}, "at rank 4"),
        ({"rank_pattern": {"(": 4}}, "regular expression"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": ["q_proj"]}, "down_proj, which is not among target_modules"),
        ({"target_modules": ["q_proj", "down_proj", "v_proj"]}, "v_proj, but"),
        ({"target_modules": r".*\.q_proj"}, "down_proj, which is not among target_modules"),
        ({"target_modules": r".*\.[qv]_proj"}, "v_proj, but"),
        ({"target_modules": r"model\.layers\.\d\..*_proj"}, "layers.0.mlp.gate_proj, but"),
        ({"target_modules": "all-linear"}, "layers.0.mlp.gate_proj, but"),
        ({"rank_pattern": {"k_proj": "8"}}, "rank_pattern must give 'k_proj'"),
    ],
    ids=str,
)
def test_settings_that_change_the_arithmetic_are_refused(
    adapter: Path, base: Path, changes: dict[str, Any], named: str
) -> None:
    change_config(adapter, **changes)
    with pytest.raises(ValueError, match=named.replace("(", r"\(")):
        read(adapter, base)


@pytest.mark.parametrize(
    "changes",
    [
        {"use_rslora": True},
        {"alpha_pattern": {"q_proj": 4}},
        {"target_modules": r"model\.layers\.\d\..*(q|down)_proj"},
        {"target_modules": r".*_proj", "exclude_modules": ["k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]},
        {"init_lora_weights": "gaussian"},
        {"modules_to_save": []},
    ],
    ids=str,
)
def test_settings_that_vllm_follows_are_taken(adapter: Path, base: Path, changes: dict[str, Any]) -> None:
    change_config(adapter, **changes)
    assert read(adapter, base).changes


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.replace(old, new)] = tensors.pop(name)

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.update({f"{LAYER}.q_proj.lora_magnitude_vector": torch.ones(4)}), "lora_magnitude_vector"),
        (lambda t: t.update({f"{LAYER}.q_proj.lora_B.bias": torch.ones(4)}), "lora_B.bias"),
        (lambda t: t.update({f"{LAYER}.q_proj.weight": torch.ones(4, 4)}), "q_proj.weight"),
        (lambda t: t.pop(f"{LAYER}.q_proj.lora_B.weight"), "the B matrix of model.layers.0.self_attn.q_proj"),
        (lambda t: [t.pop(f"{LAYER}.q_proj.lora_{side}.weight") for side in "AB"], "layers.0.self_attn.q_proj, but"),
        (lambda t: t.clear() or t.update({"x": torch.ones(1)}), "x is no LoRA matrix"),
        (rename("layers.1", "layers.7"), "layers.7"),
        (rename("q_proj", "query"), "query"),
        (rename("model.model.", "model."), "without its head"),
        (rename("model.model.", "model._orig_mod.model."), "_orig_mod"),
        (rename("self_attn.q_proj", "input_layernorm"), "input_layernorm"),
        (rename("lora_A.weight", "lora_A.default.weight"), "lora_A.default.weight"),
        (lambda t: t.update({f"{LAYER}.q_proj.lora_A.weight": torch.ones(8, 63)}), r"\(8, 63\)"),
        (lambda t: t.update({f"{LAYER}.q_proj.lora_B.weight": torch.ones(8, 128)}), r"\(8, 128\)"),
    ],
)
def test_tensors_that_nothing_would_apply_are_refused(
    adapter: Path, base: Path, change: Callable[[Tensors], object], named: str
) -> None:
    change_tensors(adapter, change)
    with pytest.raises(ValueError, match=named):
        read(adapter, base)


def test_embedding_and_head_are_refused(tmp_path: Path, base: Path) -> None:
    untied = save_tiny(tmp_path / "untied", "gpt")
    for number, checkpoint in enumerate((base, untied)):
        write_adapter(tmp_path / f"embedding-{number}", checkpoint, ["embed_tokens"])
        with pytest.raises(ValueError, match="adapts the embedding"):
            read(tmp_path / f"embedding-{number}", checkpoint)
    write_adapter(tmp_path / "head", untied, ["lm_head"])
    with pytest.raises(ValueError, match="adapts the head"):
        read(tmp_path / "head", untied)


def test_matrices_that_are_zero_are_named(adapter: Path, base: Path) -> None:
    change_tensors(adapter, lambda t: t[f"{LAYER}.q_proj.lora_B.weight"].zero_())
    found = read(adapter, base)
    assert found.silent == ("model.layers.0.self_attn.q_proj",)
    assert found.changes
    change_tensors(adapter, lambda t: [tensor.zero_() for name, tensor in t.items() if "lora_B" in name])
    assert not read(adapter, base).changes


def test_ranks_of_single_modules(adapter: Path, base: Path) -> None:
    def halve(tensors: Tensors) -> None:
        for name, tensor in list(tensors.items()):
            if "q_proj" in name:
                tensors[name] = tensor[:4] if "lora_A" in name else tensor[:, :4]

    change_tensors(adapter, halve)
    with pytest.raises(ValueError, match="at rank 8"):
        read(adapter, base)
    change_config(adapter, rank_pattern={"q_proj": 4})
    assert read(adapter, base).rank == 8


def test_the_rank_is_what_vllm_asks_room_for(adapter: Path, base: Path) -> None:
    change_config(adapter, r=64, rank_pattern={"q_proj": 8, "down_proj": 8})
    assert read(adapter, base).rank == 64
    change_config(adapter, r=8, rank_pattern={"k_proj": 32})
    assert read(adapter, base).rank == 32


@pytest.mark.parametrize("damage", [b"", b"\x00" * 4, b"\xff" * 64, b"\x02" + b"\x00" * 7 + b"{"], ids=len)
def test_damaged_files_are_named(adapter: Path, base: Path, damage: bytes) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for content in (damage, whole[:-10], whole[:100]):
        weights.write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
            read(adapter, base)


def test_missing_files_are_named(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter_config\.json"):
        read(tmp_path, base)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config\.json is damaged"):
        read(adapter, base)


def test_merging_changes_what_the_module_computes(adapter: Path, base: Path) -> None:
    """The reference of the served adapters: W x + alpha / r B A x, computed beside the layer instead of in it."""
    plain, merged = (AutoModelForCausalLM.from_pretrained(base).eval() for _ in range(2))
    merge(merged, adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    x = torch.randn(3, 64)
    a, b = tensors[f"{LAYER}.q_proj.lora_A.weight"], tensors[f"{LAYER}.q_proj.lora_B.weight"]
    expected = plain.model.layers[0].self_attn.q_proj(x) + 16 / 8 * (x @ a.T) @ b.T
    assert torch.allclose(merged.model.layers[0].self_attn.q_proj(x), expected, atol=1e-5)
