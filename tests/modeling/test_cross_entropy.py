"""Cross-entropy without whole logits against torch's own, over whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.layers.cross_entropy import chunked_cross_entropy, default_chunk


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=generator, dtype=dtype).requires_grad_() for n in (37, 50))
    return hidden, weight, torch.randint(50, (37,), generator=generator)


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits = F.linear(hidden, weight)
    return F.cross_entropy(logits, labels, reduction="sum"), logits.logsumexp(-1).square().sum()


@pytest.mark.parametrize("z_weight", [0.0, 0.3])
@pytest.mark.parametrize("chunk", [1, 8, 37, 100, 0])
def test_sums_and_gradients_are_those_of_whole_logits(chunk: int, z_weight: float) -> None:
    hidden, weight, labels = inputs()
    want = whole(hidden, weight, labels)
    got = chunked_cross_entropy(hidden, weight, labels, chunk, z_weight)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    factor = 0.7 / 37  # of the loss in a step
    expected = torch.autograd.grad(factor * (want[0] + z_weight * want[1]), (hidden, weight))
    torch.testing.assert_close(torch.autograd.grad(factor * got[0], (hidden, weight)), expected, rtol=1e-10, atol=1e-14)


def test_part_without_a_gradient_is_left_out() -> None:
    hidden, weight, labels = inputs()
    expected = torch.autograd.grad(whole(hidden, weight, labels)[0], (hidden, weight))
    for frozen in (0, 1):
        given = [t.detach().requires_grad_(i != frozen) for i, t in enumerate((hidden, weight))]
        chunked_cross_entropy(given[0], given[1], labels, 8)[0].backward()
        assert given[frozen].grad is None
        torch.testing.assert_close(given[1 - frozen].grad, expected[1 - frozen])
    with torch.no_grad():
        ce, _ = chunked_cross_entropy(hidden, weight, labels, 8)
    assert not ce.requires_grad
    torch.testing.assert_close(ce, whole(hidden, weight, labels)[0].detach())


def test_weight_that_is_embedding_and_head_gets_both_gradients() -> None:
    _, weight, labels = inputs()
    grads = [
        torch.autograd.grad(loss(weight[labels.flip(0)].tanh(), weight, labels)[0], weight)
        for loss in (whole, chunked_cross_entropy)
    ]
    torch.testing.assert_close(*grads)


def test_second_backward_is_refused_instead_of_wrong() -> None:
    hidden, weight, labels = inputs()
    ce, _ = chunked_cross_entropy(hidden, weight, labels)
    (2 * ce).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ce.backward()


def test_extreme_logits_stay_finite_and_right() -> None:
    """Probabilities of the labels that are 0 in float32, and a row whose logits are all alike."""
    weight = torch.tensor([[300.0], [-300.0], [0.0]], requires_grad=True)
    hidden, labels = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True), torch.tensor([1, 0, 2])
    expected = whole(hidden, weight, labels)
    got = chunked_cross_entropy(hidden, weight, labels, 2)
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(ce, (hidden, weight)) for ce in (got[0], expected[0])]
    torch.testing.assert_close(*grads)


def test_no_rows_are_a_sum_of_zero_with_a_gradient_of_zero() -> None:
    hidden, weight, labels = inputs()
    ce, z = chunked_cross_entropy(hidden[:0], weight, labels[:0], 8, 0.1)
    ce.backward()
    assert float(ce.detach()) == float(z) == 0
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32() -> None:
    hidden, weight, labels = inputs(torch.float32)
    exact = torch.autograd.grad(whole(hidden, weight, labels)[0], (hidden, weight))
    with torch.autocast("cpu", torch.bfloat16):
        ce, _ = chunked_cross_entropy(hidden, weight, labels, 4)
    assert ce.dtype == torch.float32
    rounded = whole(hidden.bfloat16().double(), weight.bfloat16().double(), labels)[0].float()
    torch.testing.assert_close(ce, rounded, rtol=5e-3, atol=0)
    for got, want in zip(torch.autograd.grad(ce, (hidden, weight)), exact, strict=True):
        assert got.dtype == torch.float32
        assert (got - want).norm() < 0.01 * want.norm()


def test_logits_of_all_rows_never_exist() -> None:
    """A larger vocabulary has fewer rows at a time, and the largest tensor is a chunk's."""
    assert default_chunk(4096, "cpu") >= default_chunk(50257, "cpu") >= 128
    hidden, weight, labels = inputs()
    made: list[int] = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            made.extend(t.numel() for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor))
            return out

    with Sizes():
        chunked_cross_entropy(hidden, weight, labels, 8)[0].backward()
    assert max(made) == weight.numel()
    assert weight.numel() < hidden.shape[0] * weight.shape[0]
