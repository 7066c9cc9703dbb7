"""MedAssistGPT's torch module: golden values, equality with Llama, and what must not change its numbers."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from modeling.layers.rope import cos_sin, inverse_frequencies
from modeling.medassist.config import ROPE_LAYOUTS, MedAssistGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM

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


def published_checkpoint() -> dict[str, Tensor]:
    """A tiny checkpoint as the published ones are laid out, filled by a formula that any program can repeat.

    Tensor number i (1-based, by sorted name; the tied head is left out) has the elements ``0.3 sin(0.37 n + 1.1 i)``,
    n counting from 0 in row-major order; the gains of norms have ``1 + 0.1 sin(...)``. Computed in float64.
    """
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (11, 16), "final_rms.weight": (16,)}
    for b in range(2):
        shapes |= {f"blocks.{b}.rms{i}.weight": (16,) for i in (1, 2)}
        shapes |= {f"blocks.{b}.attn.{name}_proj.weight": (16, 16) for name in "qo"}
        shapes |= {f"blocks.{b}.attn.{name}_proj.weight": (8, 16) for name in "kv"}
        shapes |= {f"blocks.{b}.mlp.w1.weight": (48, 16), f"blocks.{b}.mlp.w2.weight": (16, 24)}
    tensors = {}
    for i, name in enumerate(sorted(shapes), 1):
        size = int(torch.Size(shapes[name]).numel())
        wave = torch.sin(0.37 * torch.arange(size, dtype=torch.float64) + 1.1 * i)
        tensors[name] = (1 + 0.1 * wave if "rms" in name else 0.3 * wave).reshape(shapes[name]).float()
    return tensors


def test_flattened_layout_repeats_the_published_models_logits() -> None:
    published = published_checkpoint()
    weights = {
        "model.embed_tokens.weight": published["embed.weight"],
        "model.norm.weight": published["final_rms.weight"],
    }
    weights["lm_head.weight"] = published["embed.weight"]
    for b in range(2):
        ours, theirs = f"model.layers.{b}", f"blocks.{b}"
        up, gate = published[f"{theirs}.mlp.w1.weight"].chunk(2)  # the published MLP fuses the two, up first
        weights |= {f"{ours}.mlp.up_proj.weight": up, f"{ours}.mlp.gate_proj.weight": gate}
        weights[f"{ours}.mlp.down_proj.weight"] = published[f"{theirs}.mlp.w2.weight"]
        weights[f"{ours}.input_layernorm.weight"] = published[f"{theirs}.rms1.weight"]
        weights[f"{ours}.post_attention_layernorm.weight"] = published[f"{theirs}.rms2.weight"]
        for name in "qkvo":
            weights[f"{ours}.self_attn.{name}_proj.weight"] = published[f"{theirs}.attn.{name}_proj.weight"]
    config = MedAssistGPTConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=8, rope_layout="flattened", eos_token_id=None,
    )  # fmt: skip
    model = MedAssistGPTForCausalLM(config).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model(torch.tensor([[1, 5, 2, 9, 3]])).logits[0]
    # Printed to six digits by the program that the published models were trained with.
    second = [1.479633, 1.646784, 1.599095, 1.342788, 0.911301, 0.360926, -0.236536, -0.803139, -1.264965, -1.561763,
              -1.654814]  # fmt: skip
    last = [2.203747, 1.899746, 1.347904, 0.620214, -0.188389, -0.972414, -1.629579, -2.074148, -2.248124, -2.128810,
            -1.731771]  # fmt: skip
    assert_close(logits[1], torch.tensor(second), atol=2e-6)
    assert_close(logits[4], torch.tensor(last), atol=2e-6)


@pytest.mark.parametrize(
    ("hidden", "heads", "kv_heads", "head_dim"), [(64, 4, 4, 16), (64, 4, 2, 32), (48, 6, 1, 10), (36, 6, 3, 4)]
)
def test_per_head_layout_is_llama(hidden: int, heads: int, kv_heads: int, head_dim: int) -> None:
    sizes: dict[str, Any] = dict(hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=kv_heads,
                                 head_dim=head_dim, intermediate_size=72, rms_norm_eps=1e-4)  # fmt: skip
    model = build(**sizes, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    c = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            **sizes, vocab_size=c.vocab_size, num_hidden_layers=c.num_hidden_layers, tie_word_embeddings=True,
            max_position_embeddings=c.max_position_embeddings, rope_parameters=c.rope_parameters,
            bos_token_id=None, eos_token_id=c.eos_token_id,
        )
    ).eval()  # fmt: skip
    llama.load_state_dict(model.state_dict())
    ids = random_ids(2, 40)
    assert_close(logprobs(model, ids), logprobs(llama, ids), atol=1e-5)
    greedy = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert model.generate(ids[:1, :8], **greedy).tolist() == llama.generate(ids[:1, :8], **greedy).tolist()


@both_layouts
@pytest.mark.parametrize("chunks", [(1,) * 12, (5, 4, 3)], ids=["token by token", "several tokens at a time"])
def test_cached_steps_equal_the_whole_sequence(layout: str, chunks: tuple[int, ...]) -> None:
    model, ids = build(layout), random_ids(2, 12)
    cache, parts = None, []
    with torch.no_grad():
        for part in ids.split(chunks, dim=1):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            parts.append(out.logits.log_softmax(-1))
    assert_close(torch.cat(parts, 1), logprobs(model, ids, use_cache=False))


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
def test_generate_takes_a_left_padded_batch(layout: str) -> None:
    model, ids = build(layout, eos_token_id=None), random_ids(1, 9)
    batch = torch.stack([torch.cat([torch.zeros(4, dtype=torch.long), ids[0, :5]]), ids[0]])
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    greedy = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    together = model.generate(batch, attention_mask=mask, **greedy)[:, 9:].tolist()
    alone = [model.generate(prompt, **greedy)[0, -8:].tolist() for prompt in (ids[:, :5], ids)]
    assert together == alone


@both_layouts
def test_packed_documents_do_not_see_each_other(layout: str) -> None:
    model, lengths = build(layout), (5, 1, 7)
    ids = random_ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logprobs(model, ids, position_ids=positions, use_cache=False)
    assert_close(packed, torch.cat([logprobs(model, document) for document in ids.split(lengths, dim=1)], 1))


@both_layouts
def test_saved_model_loads_through_the_auto_class_unchanged(layout: str, tmp_path: Path) -> None:
    model, ids = build(layout), random_ids(1, 20)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is MedAssistGPTForCausalLM
    assert torch.equal(logprobs(loaded, ids), logprobs(model, ids))


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


def test_sequence_beyond_the_positions_is_refused() -> None:
    with pytest.raises(ValueError, match="max_position_embeddings"):
        build(max_position_embeddings=16)(random_ids(1, 17))
