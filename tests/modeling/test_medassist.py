"""MedAssistGPT's torch module: Llama's sizes of all kinds, its two rotary layouts, and float32 angles.

What it shares with every architecture is in ``test_architectures.py``.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.layers.rope import cos_sin, inverse_frequencies
from modeling.medassist.config import ROPE_LAYOUTS, MedAssistGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM
from modeling.medassist.reference import twin

both_layouts = pytest.mark.parametrize("layout", ROPE_LAYOUTS)


def build(layout: str = "per_head", **changes: Any) -> MedAssistGPTForCausalLM:
    """A small random model. Its weights are large, so that attention decides the output and a wrong mask shows."""
    torch.manual_seed(0)
    config = MedAssistGPTConfig.tiny(rope_layout=layout, initializer_range=0.2, **changes)
    return MedAssistGPTForCausalLM(config).eval()


def random_ids(*shape: int) -> Tensor:
    return torch.randint(1, 160, shape, generator=torch.Generator().manual_seed(1))


def logprobs(model: torch.nn.Module, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits.log_softmax(-1)


def assert_close(got: Tensor, want: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "head_dim"), [(64, 4, 4, 16), (64, 4, 2, 32), (48, 6, 1, 10), (36, 6, 3, 4)]
)
def test_per_head_layout_is_llama(hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
    sizes: dict[str, Any] = dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
                                 head_dim=head_dim, intermediate_size=72, rms_norm_eps=1e-4)  # fmt: skip
    model = build(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    llama = twin(model).eval()
    ids = random_ids(2, 40)
    assert_close(logprobs(model, ids), logprobs(llama, ids), atol=1e-5)
    greedy = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert model.generate(ids[:1, :8], **greedy).tolist() == llama.generate(ids[:1, :8], **greedy).tolist()


def test_per_head_layout_needs_only_a_mask_for_left_padding() -> None:
    model, ids = build(), random_ids(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    assert_close(logprobs(model, padded, attention_mask=mask)[:, 4:], logprobs(model, ids))


def test_flattened_layout_needs_positions_too_for_left_padding() -> None:
    """A query and its key turn by different angles there, so that scores change when both move along."""
    model, ids = build("flattened"), random_ids(1, 9)
    padded = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 4 + [1] * 9])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    want = logprobs(model, ids)
    assert_close(logprobs(model, padded, attention_mask=mask, position_ids=positions)[:, 4:], want)
    assert (logprobs(model, padded, attention_mask=mask)[:, 4:] - want).abs().max() > 1e-2


@both_layouts
def test_bfloat16_model_keeps_float32_angles(layout: str) -> None:
    """In bfloat16, position 901 would be 900."""
    model = build(layout, max_position_embeddings=1024)
    position = torch.tensor([[901]])
    exact = [[table.clone() for table in pair] for pair in model.model._rope(position)]
    model.to(torch.bfloat16)
    for pair, exact_pair in zip(model.model._rope(position), exact, strict=True):
        for table, exact_table in zip(pair, exact_pair, strict=True):
            assert table.dtype == torch.float32
            assert torch.equal(table, exact_table)


def test_angles_do_not_depend_on_the_default_dtype() -> None:
    """vLLM builds models under a default dtype of bfloat16."""
    exact = (901 * 10000.0 ** (-torch.arange(0, 32, 2, dtype=torch.float64) / 32)).cos()
    torch.set_default_dtype(torch.bfloat16)
    try:
        cos, _ = cos_sin(torch.tensor([901]), inverse_frequencies(32, 10000.0))
    finally:
        torch.set_default_dtype(torch.float32)
    assert_close(cos[0].double(), exact, atol=2e-4)


@both_layouts
def test_bfloat16_model_computes_late_positions_like_float32(layout: str) -> None:
    model = build(layout, max_position_embeddings=1024)
    ids, positions = random_ids(1, 24), torch.arange(890, 914)[None]
    low = model.to(torch.bfloat16)
    got = logprobs(low, ids, position_ids=positions).float()
    want = logprobs(low.float(), ids, position_ids=positions)  # the same, rounded weights
    assert (got - want).abs().mean() < 0.1


def test_labels_give_the_mean_loss_of_the_next_token() -> None:
    model, ids = build(), random_ids(2, 10)
    labels = ids.masked_fill(torch.arange(10) < 4, -100)
    with torch.no_grad():
        loss = model(ids, labels=labels).loss
    given = logprobs(model, ids)[:, 3:-1].gather(2, ids[:, 4:, None])
    assert_close(loss, -given.mean(), atol=1e-5)
