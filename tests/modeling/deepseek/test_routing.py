"""Which experts are chosen, with which weights: against plain Python, and in which precision."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from modeling.deepseek.config import ROUTERS
from modeling.deepseek.experts import LEAST_NOISE, Router
from modeling.deepseek.routing import Choice, choose, moved
from tests.modeling.deepseek.models import config, ids, module


def brute_force(
    logits: list[float], router: str, bias: list[float] | None, top_k: int, groups: int, kept: int, normalise: bool,
    scale: float,
) -> tuple[list[int], list[float]]:  # fmt: skip
    """One token. Sums are rounded to float32, as the module's, so that ties are ties here too."""

    def rounded(x: float) -> float:
        return float(torch.tensor(x, dtype=torch.float32))

    row = torch.tensor(logits)
    scores = [rounded(s) for s in (row.sigmoid() if router == "aux_free" else row.softmax(-1)).tolist()]
    ranks = [rounded(s + b) for s, b in zip(scores, bias or [0.0] * len(scores), strict=True)]
    size = len(ranks) // groups
    allowed = list(range(len(ranks)))
    if groups > 1:
        values = []
        for group in range(groups):
            best = sorted(ranks[group * size : (group + 1) * size], reverse=True)
            values.append(rounded(best[0] + best[1]) if router == "aux_free" else best[0])
        chosen = sorted(range(groups), key=lambda g: (-values[g], g))[:kept]
        allowed = [e for e in allowed if e // size in chosen]
    experts = sorted(allowed, key=lambda e: (-ranks[e], e))[:top_k]
    weights = [scores[e] for e in experts]
    if normalise:
        total = sum(weights)
        weights = [w / total for w in weights]
    return experts, [w * scale for w in weights]


@st.composite
def cases(draw: Any) -> dict[str, Any]:
    router = draw(st.sampled_from(ROUTERS))
    groups = draw(st.sampled_from([1, 2, 3, 4])) if router != "noisy_top_k" else 1
    size = draw(st.integers(2, 4))
    kept = draw(st.integers(1, groups))
    experts = groups * size
    # Quarters: equal logits, and equal sums of affinity and bias, are common.
    quarters = st.integers(-12, 12).map(lambda n: n / 4)
    tokens = draw(st.integers(1, 5))
    rows = draw(st.lists(st.lists(quarters, min_size=experts, max_size=experts), min_size=tokens, max_size=tokens))
    bias = draw(st.none() | st.lists(quarters, min_size=experts, max_size=experts)) if router == "aux_free" else None
    return {
        "logits": rows, "router": router, "bias": bias, "top_k": draw(st.integers(1, kept * size)), "groups": groups,
        "kept": kept, "normalise": router == "noisy_top_k" or draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
    }  # fmt: skip


@settings(max_examples=300, deadline=None, derandomize=True)
@given(cases())
def test_choice_is_that_of_plain_python(case: dict[str, Any]) -> None:
    bias = None if case["bias"] is None else torch.tensor(case["bias"])
    rest = (case["top_k"], case["groups"], case["kept"], case["normalise"], case["scale"])
    got = choose(torch.tensor(case["logits"]), case["router"], bias, *rest)
    for row, logits in enumerate(case["logits"]):
        experts, weights = brute_force(logits, case["router"], case["bias"], *rest)
        assert got.experts[row].tolist() == experts
        assert got.weights[row].tolist() == pytest.approx(weights, rel=1e-5)


def plain(logits: Tensor, router: str, bias: Tensor | None = None, top_k: int = 3) -> Choice:
    return choose(logits, router, bias, top_k, 1, 1, True, 1.0)


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("experts", [8, 64, 256])
def test_of_equal_experts_the_first_are_taken(router: str, experts: int) -> None:
    """Whatever the number: sorting algorithms change with it."""
    assert plain(torch.zeros(40, experts), router).experts.tolist() == [[0, 1, 2]] * 40
    logits = torch.zeros(1, experts)
    logits[0, experts // 2 :] = 1.0
    assert plain(logits, router).experts.tolist() == [[experts // 2 + n for n in range(3)]]


def test_router_with_equal_rows_takes_the_lower_numbers() -> None:
    model = module()
    router = model.routers()[0]
    with torch.no_grad():
        router.weight[4:] = router.weight[:4]
        router.e_score_correction_bias.zero_()
        routing = router(torch.randn(1, 200, 64))
    chosen = {tuple(sorted(pair)) for pair in routing.experts[0].tolist()}
    assert all(b < 4 or b - 4 == a for a, b in chosen), chosen  # a twin comes only after the first


@pytest.mark.parametrize("router", ROUTERS)
def test_router_computes_in_float32_whatever_surrounds_it(router: str) -> None:
    torch.manual_seed(0)
    groups = {} if router == "noisy_top_k" else {"n_group": 1, "topk_group": 1}
    gate = Router(config(router=router, **groups)).eval()
    torch.nn.init.normal_(gate.weight)
    gate.weight.data = gate.weight.data.bfloat16().float()  # so that both hold the same numbers
    x = torch.randn(2, 50, 64).bfloat16()
    want = gate(x.float())
    half = Router(config(router=router, **groups)).eval().bfloat16()
    half.load_state_dict(gate.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gate(x)
    for got in (half(x), inside, gate(x)):
        assert got.logits.dtype == got.weights.dtype == torch.float32
        assert torch.equal(got.logits, want.logits)
        assert torch.equal(got.experts, want.experts)
        assert torch.equal(got.weights, want.weights)


def test_bias_chooses_and_does_not_weigh() -> None:
    logits = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([5.0, 0, 0, 0, 0, 0, 0, -5.0])
    choice = plain(logits, "aux_free", bias)
    assert (choice.experts[:, 0] == 0).all()
    assert not (choice.experts == 7).any()
    scores = logits.sigmoid().gather(1, choice.experts)
    torch.testing.assert_close(choice.weights, scores / scores.sum(-1, keepdim=True))


def test_bias_moves_against_the_load_and_rests_at_the_mean() -> None:
    bias = torch.tensor([0.5, 0.0, -0.25, 0.0])
    load = torch.tensor([9, 3, 6, 6])
    torch.testing.assert_close(moved(bias, load, 0.01), torch.tensor([0.49, 0.01, -0.25, 0.0]))
    uneven = torch.tensor([2**53 // 4, 2**53 // 4 - 1, 2**53 // 4 + 1, 2**53 // 4])  # beyond float32's whole numbers
    assert torch.sign(moved(torch.zeros(4), uneven, 1.0)).tolist() == [0, 1, -1, 0]


def test_noise_is_there_in_training_alone_and_learns() -> None:
    torch.manual_seed(0)
    gate = Router(config(router="noisy_top_k"))
    torch.nn.init.normal_(gate.weight)
    x = torch.randn(1, 400, 64)
    gate.train()
    noisy = gate(x)
    assert noisy.clean_logits is not None
    noise = noisy.logits - noisy.clean_logits
    # softplus of 0 is log 2; of 3,200 draws the deviation is known to 2 per cent.
    assert noise.std().item() == pytest.approx(math.log(2) + LEAST_NOISE, rel=0.06)
    noisy.logits.square().sum().backward()
    assert gate.noise_weight.grad is not None
    assert gate.noise_weight.grad.abs().sum() > 0
    gate.eval()
    assert torch.equal(gate(x).logits, noisy.clean_logits)


def test_experts_that_never_fire_do_not_change_the_rest() -> None:
    model, tokens = module(), ids(1, 60)
    with torch.no_grad():
        for router in model.routers():
            router.e_score_correction_bias[5] = -10
        want = model(tokens).logits
        for layer in model.model.layers[1:]:
            layer.mlp.experts.down_proj[5] = float("nan")
        assert torch.equal(model(tokens).logits, want)
