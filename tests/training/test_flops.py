"""FLOPs against what torch counts, the table of peaks, and the memory estimate against what autograd keeps."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from modeling import registry
from training.data import Batch
from training.flops import flops_per_token, memory_estimate, peak_flops

WINDOW = 64


def built(model_type: str, **changes: Any) -> Any:
    architecture = registry.get(model_type)
    torch.manual_seed(0)
    return architecture.model_class()(architecture.config_class().tiny(**changes)).train()


def batch(windows: int = 1) -> Batch:
    ids = torch.randint(1, 150, (windows, WINDOW), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(WINDOW).expand_as(ids)
    return Batch(ids, positions, ids, torch.ones_like(ids, dtype=torch.bool))


CASES = [
    *((model_type, {}) for model_type in registry.REGISTRY),
    ("medassist_gpt", {"head_dim": 48}),
    ("medassist_deepseek", {"num_nextn_predict_layers": 2, "mtp_depth": 4, "v_head_dim": 16}),
    ("medassist_deepseek", {"num_nextn_predict_layers": 0, "q_lora_rank": None, "n_shared_experts": 0}),
]


@pytest.mark.parametrize(("model_type", "changes"), CASES)
def test_flops_are_those_of_a_step_as_torch_counts_them(model_type: str, changes: dict[str, Any]) -> None:
    model = built(model_type, **changes)
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):  # whose products are counted one by one
        made = model.model(batch().input_ids, position_ids=batch().position_ids)
        hidden = [made.last_hidden_state]
        if hasattr(model.model, "predict"):
            hidden += model.model.predict(hidden[0], batch().input_ids, batch().position_ids, made.mask)[0]
        torch.stack([model.lm_head(h).sum() for h in hidden]).sum().backward()
    assert counter.get_total_flops() / WINDOW == pytest.approx(flops_per_token(model, WINDOW), rel=1e-9)


def test_published_303m_costs_what_its_shape_says() -> None:
    config = registry.get("medassist_gpt").config_class().published_303m()
    with torch.device("meta"):
        model = registry.get("medassist_gpt").model_class()(config)
    norms = 1024 * (2 * config.num_hidden_layers + 1)
    attention = 12 * config.num_hidden_layers * 1024 * 1024  # PaLM's 12 L H Q T
    assert flops_per_token(model, 1024) == 6 * (303_196_160 - norms) + attention
    assert flops_per_token(model, 1024) == pytest.approx(2.12e9, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA A10G", None),  # another card than the A10, and than the A100
        ("Tesla T4", None),
        ("cpu", None),
    ],
)
def test_the_longest_name_decides_the_peak(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak


@pytest.mark.parametrize("model_type", registry.REGISTRY)
def test_activations_are_estimated_within_a_third_of_what_autograd_keeps(model_type: str) -> None:
    model, kept = built(model_type), {}
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        made = model.objective(batch(2))
    estimate = memory_estimate(model, optimizer="adamw", windows=2, window=WINDOW)
    assert made.sums  # alive, and with it what was kept
    assert estimate["activations"] + estimate["logits"] // 2 == pytest.approx(sum(kept.values()), rel=1 / 3)


def test_memory_of_weights_and_optimizers() -> None:
    model = built("medassist_gpt")
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.ndim > 1)
    total = sum(p.numel() for p in model.parameters())

    def estimate(**changes: Any) -> dict[str, int]:
        return memory_estimate(model, **({"optimizer": "adamw", "windows": 4, "window": WINDOW} | changes))

    plain = estimate()
    assert (plain["weights"], plain["gradients"], plain["optimizer"]) == (4 * total, 4 * total, 8 * total)
    assert estimate(optimizer="muon")["optimizer"] == 8 * total - 4 * matrices
    assert plain["total"] == sum(v for k, v in plain.items() if k != "total")
    sharded = estimate(ranks=2)
    assert sharded["optimizer"] == 4 * total
    assert sharded["activations"] == plain["activations"]
    assert estimate(loss_chunk=32)["logits"] == plain["logits"] * 32 // (4 * WINDOW)
    assert estimate(activation_checkpointing=True)["activations"] < plain["activations"]
    assert estimate(precision="bfloat16")["activations"] == plain["activations"] // 2
