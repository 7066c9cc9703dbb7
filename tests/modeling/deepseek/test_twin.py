"""The module against DeepseekV3 and DeepseekV2 of transformers, with the same weights."""

from typing import Any

import pytest
import torch

from modeling.deepseek.reference import YARN, twin
from tests.modeling.deepseek.models import assert_close, ids, logprobs, module

V3: dict[str, dict[str, Any]] = {
    "query-latent": {},
    "no-query-latent": {"q_lora_rank": None},
    "halves": {"rope_interleave": False},
    "no-groups": {"n_group": 1, "topk_group": 1},
    "every-group": {"n_group": 2, "topk_group": 2, "num_experts_per_tok": 3},
    "not-normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.5},
    "one-expert": {"num_experts_per_tok": 1},
    "all-experts": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 8},
    "biases": {"attention_bias": True},
    "yarn": {"rope_parameters": YARN},
    "yarn-halves": {"rope_parameters": YARN | {"mscale_all_dim": 0}, "rope_interleave": False},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
    "base": {"rope_parameters": {"rope_theta": 50000.0}},
    "two-shared": {"n_shared_experts": 2},
    "none-shared": {"n_shared_experts": 0},
    "all-sparse": {"first_k_dense_replace": 0},
    "all-dense": {"first_k_dense_replace": 2},
    "tied": {"tie_word_embeddings": True},
    "epsilon": {"rms_norm_eps": 0.1},
}
V2: dict[str, dict[str, Any]] = {
    "greedy": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "groups": {"num_experts_per_tok": 3},
    "scaled": {"routed_scaling_factor": 16.0},
    "no-query-latent": {"q_lora_rank": None, "n_group": 1, "topk_group": 1},
    "yarn": {"rope_parameters": YARN},
    "biases": {"attention_bias": True, "n_shared_experts": 2},
}
TOKENS = ids(2, 150)


def compare(model: Any) -> None:
    theirs = twin(model).eval()
    assert_close(logprobs(model, TOKENS), logprobs(theirs, TOKENS))


@pytest.mark.parametrize("kind", V3)
def test_deepseek_v3_computes_the_same(kind: str) -> None:
    compare(module(**V3[kind]))


@pytest.mark.parametrize("kind", V2)
def test_deepseek_v2_computes_the_same(kind: str) -> None:
    compare(module(**({"router": "softmax", "norm_topk_prob": False} | V2[kind])))


def test_selection_bias_decides_who_is_chosen() -> None:
    """So that the comparisons above mean something: without it they would be of other experts."""
    model = module()
    with_bias = logprobs(model, TOKENS)
    for router in model.routers():
        router.e_score_correction_bias.zero_()
    assert (logprobs(model, TOKENS) - with_bias).abs().max() > 0.1


def test_gradients_are_the_twins() -> None:
    model = module()
    theirs = twin(model)
    for each in (model, theirs):
        each(TOKENS, labels=TOKENS).loss.backward()
    ours = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        grad = ours[name].grad
        assert grad is not None
        assert parameter.grad is not None
        torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-6)


def test_padded_batches_are_the_twins() -> None:
    model = module()
    mask = torch.ones_like(TOKENS)
    mask[0, :20] = 0
    ours, theirs = (logprobs(each, TOKENS, attention_mask=mask)[0, 20:] for each in (model, twin(model).eval()))
    assert_close(ours, theirs)
