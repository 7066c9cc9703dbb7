"""Experts: grouped products against the loop and against one token after another."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.deepseek import experts as module_under_test
from modeling.deepseek.experts import Experts, MixtureOfExperts
from tests.modeling.deepseek.models import assert_close, config

TOKENS = 50


@pytest.fixture
def experts() -> Experts:
    torch.manual_seed(0)
    result = Experts(config())
    for parameter in result.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return result


def one_after_another(experts: Experts, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    rows = []
    for token, numbers, factors in zip(x, chosen.tolist(), weights, strict=True):
        total = torch.zeros_like(token)
        for number, factor in zip(numbers, factors, strict=True):
            gate, up = (experts.gate_up_proj[number] @ token).chunk(2)
            total = total + factor * (experts.down_proj[number] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


CHOICES = {
    "spread": torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(n))[:2] for n in range(TOKENS)]),
    "some never": torch.stack([torch.tensor([n % 3, 5]) for n in range(TOKENS)]),
    "all to the first": torch.zeros(TOKENS, 1, dtype=torch.long),
    "all to the last": torch.full((TOKENS, 1), 7),
    "one token": torch.tensor([[6, 1]]),
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("grouped", [False, True])
def test_experts_equal_one_token_after_another_with_gradients(
    choice: str, grouped: bool, experts: Experts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module_under_test, "_has_grouped_mm", lambda x, weight: grouped)
    chosen = CHOICES[choice]
    x = torch.randn(len(chosen), 64, requires_grad=True)
    weights = torch.rand(chosen.shape, requires_grad=True)
    inputs = (x, weights, *experts.parameters())
    direction = torch.randn(len(chosen), 64)
    got = experts(x, chosen, weights)
    got_grads = torch.autograd.grad((got * direction).sum(), inputs)
    want = one_after_another(experts, x, chosen, weights)
    want_grads = torch.autograd.grad((want * direction).sum(), inputs)
    assert_close(got, want)
    for a, b in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    idle = sorted(set(range(8)) - set(chosen.flatten().tolist()))
    assert not got_grads[2][idle].any()  # experts that never fire learn nothing, and break nothing


def test_m_times_more_experts_of_a_fraction_of_the_width_compute_the_same() -> None:
    """Fine-grained segmentation: an expert cut into 4, of which a token takes all 4, is the expert."""
    torch.manual_seed(1)
    whole, m = Experts(config(n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1)), 4
    cut = Experts(
        config(n_routed_experts=8, num_experts_per_tok=4, n_group=1, topk_group=1, moe_intermediate_size=32 // m)
    )
    with torch.no_grad():
        for parameter in whole.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        gate, up = whole.gate_up_proj.chunk(2, dim=1)
        parts = [p.unflatten(1, (m, -1)).flatten(0, 1) for p in (gate, up)]
        cut.gate_up_proj.copy_(torch.cat(parts, dim=1))
        cut.down_proj.copy_(whole.down_proj.unflatten(2, (m, -1)).transpose(1, 2).flatten(0, 1))
        x, chosen = torch.randn(TOKENS, 64), torch.randint(2, (TOKENS, 1))
        weights = torch.rand(TOKENS, 1)
        together = cut(x, chosen * m + torch.arange(m), weights.expand(-1, m))
        assert_close(together, whole(x, chosen, weights))


def test_shared_experts_are_added_to_the_routed_ones_unweighted() -> None:
    torch.manual_seed(2)
    layer = MixtureOfExperts(config(n_shared_experts=2))
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, TOKENS, 64)
    with torch.no_grad():
        y, routing = layer(x)
        routed = one_after_another(layer.experts, x[0], routing.experts[0], routing.weights[0])
        shared = layer.shared_experts
        assert shared is not None
        assert shared.up_proj.weight.shape == (64, 64)  # two of 32
        assert_close(y[0], routed + shared(x[0]))
