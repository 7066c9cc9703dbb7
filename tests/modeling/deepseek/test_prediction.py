"""Multi-token prediction: what it sees, and what it computes position by position."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modeling.deepseek.attention import rope_cos_sin
from modeling.deepseek.model import MedAssistDeepseekForCausalLM
from tests.modeling.deepseek.models import assert_close, ids, logprobs, module

DEPTH = 2
VARIANTS: list[dict[str, Any]] = [{}, {"router": "noisy_top_k"}, {"qk_rope_head_dim": 0}, {"first_k_dense_replace": 2}]
every_variant = pytest.mark.parametrize("changes", VARIANTS, ids=str)


@torch.no_grad()
def predictions(model: MedAssistDeepseekForCausalLM, tokens: Tensor, positions: Tensor | None = None) -> list[Tensor]:
    """The hidden states of each depth."""
    if positions is None:
        positions = torch.arange(tokens.shape[1])[None].expand_as(tokens)
    out = model.model(tokens, position_ids=positions, use_cache=False)
    return model.model.predict(out.last_hidden_state, tokens, positions, out.mask)[0]


@torch.no_grad()
def position_by_position(model: MedAssistDeepseekForCausalLM, tokens: Tensor) -> list[Tensor]:
    """From prefixes alone: at each position the layer runs over what a program without later tokens would have."""
    body, length = model.model, tokens.shape[1]
    before = [body(tokens[:, : i + 1], use_cache=False).last_hidden_state[:, -1] for i in range(length)]
    results = []
    for depth in range(1, DEPTH + 1):
        layer = body.layers[model.config.num_hidden_layers + depth - 1]
        inputs, made = [], []
        for i in range(length - depth):
            embedding = layer.enorm(body.embed_tokens(tokens[:, i + depth]))
            both = torch.cat([embedding, layer.hnorm(before[i])], -1)  # the embedding first, as published
            inputs.append(both @ layer.eh_proj.weight.T)
            x = torch.stack(inputs, 1)
            rope = rope_cos_sin(model.config, torch.arange(i + 1)[None])
            made.append(layer.shared_head.norm(layer(x, rope, None, None)[0][:, -1]))
        before = made  # what the head gets, as the first depth gets what the model's head gets
        results.append(torch.stack(made, 1))
    return results


@every_variant
def test_equals_position_by_position(changes: dict[str, Any]) -> None:
    model, tokens = module(num_nextn_predict_layers=DEPTH, **changes), ids(2, 14)
    for depth, (got, want) in enumerate(
        zip(predictions(model, tokens), position_by_position(model, tokens), strict=True), 1
    ):
        assert got.shape == (2, 14, 64)
        assert_close(got[:, : 14 - depth], want)


@every_variant
def test_later_tokens_do_not_change_earlier_predictions(changes: dict[str, Any]) -> None:
    model, tokens, at = module(num_nextn_predict_layers=DEPTH, **changes), ids(1, 20), 12
    other = tokens.clone()
    other[0, at:] = ids(1, 8, seed=7)
    assert (other[0, at:] != tokens[0, at:]).all()
    for depth, (a, b) in enumerate(zip(predictions(model, tokens), predictions(model, other), strict=True), 1):
        assert_close(a[:, : at - depth], b[:, : at - depth])
        assert (a[:, at - depth] - b[:, at - depth]).abs().max() > 1e-2  # the first that sees a changed token


@every_variant
def test_packed_documents_are_predicted_as_each_alone(changes: dict[str, Any]) -> None:
    model, lengths = module(num_nextn_predict_layers=DEPTH, **changes), (9, 3, 1, 7)
    tokens = ids(1, sum(lengths))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = predictions(model, tokens, positions)
    start = 0
    for length, document in zip(lengths, tokens.split(lengths, dim=1), strict=True):
        for depth, alone in enumerate(predictions(model, document), 1):
            inside = max(0, length - depth)  # positions with a token that far after them
            assert_close(packed[depth - 1][:, start : start + inside], alone[:, :inside])
        start += length


@pytest.mark.parametrize("length", [1, 2, 3])
def test_sequences_shorter_than_the_depth_are_no_problem(length: int) -> None:
    assert [p.shape for p in predictions(module(num_nextn_predict_layers=3), ids(1, length))] == [(1, length, 64)] * 3


def test_the_models_own_output_does_not_depend_on_predictions() -> None:
    model, tokens = module(num_nextn_predict_layers=DEPTH), ids(1, 10)
    want = logprobs(model, tokens)
    with torch.no_grad():
        for layer in model.model.layers[model.config.num_hidden_layers :]:
            for parameter in layer.parameters():
                parameter.fill_(float("nan"))
    assert torch.equal(logprobs(model, tokens), want)


def test_bias_stays_in_float32_where_the_rest_is_not(tmp_path: Path) -> None:
    """0.25 + 0.001 is 0.25 in bfloat16."""
    model = module()
    for router in model.routers():
        router.e_score_correction_bias.fill_(0.25 + 0.001)
    model.save_pretrained(tmp_path)
    loaded = MedAssistDeepseekForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.lm_head.weight.dtype == torch.bfloat16
    assert len(loaded.routers()) == 2
    for router in loaded.routers():
        assert router.e_score_correction_bias.dtype == torch.float32
        assert (router.e_score_correction_bias == torch.tensor(0.251)).all()
