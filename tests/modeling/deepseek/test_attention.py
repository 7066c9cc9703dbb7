"""Latent attention: its two forms, what it caches, and the ropeless variant in closed form."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from modeling.deepseek.attention import FORMS, LatentAttention
from modeling.deepseek.model import MedAssistDeepseekForCausalLM
from modeling.deepseek.reference import YARN
from tests.modeling.deepseek.models import assert_close, config, ids, logprobs, module

KINDS: dict[str, dict[str, Any]] = {
    "query-latent": {},
    "no-query-latent": {"q_lora_rank": None},
    "ropeless": {"qk_rope_head_dim": 0},
    "halves": {"rope_interleave": False, "attention_bias": True},
    "yarn": {"rope_parameters": YARN},
    "rank-512": {"kv_lora_rank": 512, "qk_rope_head_dim": 64},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def in_form(model: MedAssistDeepseekForCausalLM, form: str) -> MedAssistDeepseekForCausalLM:
    assert form in FORMS
    for layer in model.model.layers:
        layer.self_attn.form = form
    return model


@every_kind
def test_absorbed_form_equals_the_explicit_one(kind: str) -> None:
    model, tokens = module(**KINDS[kind]), ids(2, 300)
    mask = torch.ones_like(tokens)
    mask[1, :37] = 0
    for inputs in ({}, {"attention_mask": mask}):
        explicit, absorbed = (logprobs(in_form(model, form), tokens, **inputs) for form in ("explicit", "absorbed"))
        if inputs:
            explicit, absorbed = explicit[1, 37:], absorbed[1, 37:]
        assert_close(absorbed, explicit)


@every_kind
def test_gradients_of_both_forms_are_equal(kind: str) -> None:
    model, tokens = module(**KINDS[kind]), ids(2, 40)
    grads: list[dict[str, Tensor]] = []
    for form in ("explicit", "absorbed"):
        model.zero_grad()
        in_form(model, form)(tokens, labels=tokens).loss.backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6, msg=name)


@every_kind
def test_cache_holds_the_latent_and_the_shared_key_and_nothing_else(kind: str) -> None:
    model, tokens = module(**KINDS[kind]), ids(3, 17)
    with torch.no_grad():
        cache = model(tokens, use_cache=True).past_key_values
    assert isinstance(cache, DynamicCache)
    held = [layer.keys.numel() + layer.values.numel() for layer in cache.layers]
    c = model.config
    assert held == [3 * 17 * (c.kv_lora_rank + c.qk_rope_head_dim)] * c.num_hidden_layers
    assert c.cached_width == c.kv_lora_rank + c.qk_rope_head_dim


@every_kind
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunks", [(1,) * 24, (10, 1, 8, 1, 1, 3), (24,)], ids=["steps", "chunks", "whole"])
def test_cached_equals_whole_in_every_form(kind: str, form: str, chunks: tuple[int, ...]) -> None:
    model, tokens = module(**KINDS[kind]), ids(2, 24)
    want = logprobs(in_form(model, "explicit"), tokens, use_cache=False)
    in_form(model, form)
    cache, parts = None, []
    for part in tokens.split(chunks, dim=1):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits.log_softmax(-1))
    assert_close(torch.cat(parts, 1), want)


def test_ropeless_attention_is_the_closed_form() -> None:
    """``score_h(i, j) = x_i A_h c_j / sqrt(N)`` with ``A_h = W_Q,h^T W_UK,h``, in float64, one matrix after another."""
    torch.manual_seed(3)
    c = config(qk_rope_head_dim=0, q_lora_rank=None)
    attention = LatentAttention(c, 0).double()
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 30, c.hidden_size, dtype=torch.float64)
    with torch.no_grad():
        latent = x @ attention.kv_a_proj_with_mqa.weight.T
        latent = latent / (latent.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.kv_a_layernorm.weight
        assert attention.q_proj is not None
        n, v = c.qk_nope_head_dim, c.v_head_dim
        future = torch.ones(30, 30, dtype=torch.bool).triu(1)
        heads = []
        for h in range(c.num_attention_heads):
            up = attention.kv_b_proj.weight[h * (n + v) : (h + 1) * (n + v)]
            absorbed = attention.q_proj.weight[h * n : (h + 1) * n].T @ up[:n]  # (C, R)
            scores = x @ absorbed @ latent.transpose(1, 2) / n**0.5  # (B, T, T)
            heads.append(scores.masked_fill(future, float("-inf")).softmax(-1) @ latent @ up[n:].T)
        want = torch.cat(heads, -1) @ attention.o_proj.weight.T
        rope = (torch.empty(2, 30, 0), torch.empty(2, 30, 0))
        for form in ("explicit", "absorbed"):
            attention.form = form
            torch.testing.assert_close(attention(x, rope, None, None), want, rtol=0, atol=1e-12)


def test_order_of_tokens_is_seen_without_rotation_through_the_causal_mask_alone() -> None:
    """One layer cannot tell the order of earlier tokens without rotation, and can with it."""
    tokens = ids(1, 8)
    swapped = tokens[:, [1, 0, *range(2, 8)]]
    for width, same in ((0, True), (16, False)):
        model = module(num_hidden_layers=1, qk_rope_head_dim=width)
        difference = (logprobs(model, tokens)[:, -1] - logprobs(model, swapped)[:, -1]).abs().max()
        assert (difference < 1e-5) == same
