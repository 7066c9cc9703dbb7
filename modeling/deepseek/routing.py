"""Which experts a token goes to, and with which weights: the three routers, in plain torch.

The trainable module and the vLLM class both call :func:`route`, so that they cannot differ, in ties neither: of equal
experts the one with the lowest number is taken, where ``torch.topk`` promises nothing.

    aux_free      sigmoid affinities; a bias is added for the selection only, and moves against the load after every
                  optimizer step (Wang et al. 2024, "Auxiliary-loss-free load balancing"; DeepSeek-V3, section 2.1.2)
    softmax       probabilities over all experts (DeepSeek-V2, section 2.1.3), balanced by a loss
    noisy_top_k   softmax over the chosen, whose choice is noisy in training (Shazeer et al. 2017, section 2.1)

Everything here is float32. Shapes: N tokens, E experts, k experts a token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from modeling.deepseek.config import MedAssistDeepseekConfig


class Choice(NamedTuple):
    """``experts`` (N, k) int64, the best first; ``weights`` (N, k) float32."""

    experts: Tensor
    weights: Tensor


def affinities(logits: Tensor, router: str) -> Tensor:
    """What experts are ranked by, each in 0 .. 1: sigmoid or softmax of the logits (N, E)."""
    return logits.sigmoid() if router == "aux_free" else logits.softmax(-1)


def choose(
    logits: Tensor,
    router: str,
    bias: Tensor | None,
    top_k: int,
    n_group: int,
    topk_group: int,
    normalise: bool,
    scale: float,
) -> Choice:
    """The experts of each token and their weights, from the router's ``logits`` (N, E) in float32; N
    may be several dimensions.

    With more than one group, experts outside the ``topk_group`` best groups are left out. A group is as good as its
    best expert ("softmax"; DeepSeek-V2, section 2.2.2), or as its two best together ("aux_free"; DeepSeek-V3, section
    2.1.2).

    Args:
        bias: (E,) added to the affinities for the selection; weights are made of the affinities without it.
        normalise: divide a token's weights by their sum.
        scale: factor on the weights.
    """
    scores = affinities(logits, router)  # (N, E)
    ranked = scores if bias is None else scores + bias
    if n_group > 1:
        grouped = ranked.unflatten(-1, (n_group, -1))  # (N, groups, E / groups)
        best = grouped.topk(2, dim=-1).values.sum(-1) if router == "aux_free" else grouped.amax(-1)  # (N, groups)
        kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, first_largest(best, topk_group), True)
        ranked = grouped.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
    experts = first_largest(ranked, top_k)
    weights = scores.gather(-1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return Choice(experts, weights * scale)


def route(config: MedAssistDeepseekConfig, logits: Tensor, bias: Tensor | None) -> Choice:
    """:func:`choose` as a configuration says; ``bias`` is that of "aux_free"."""
    c = config
    assert c.router is not None
    assert c.n_group is not None
    assert c.topk_group is not None
    return choose(
        logits, c.router, bias, c.num_experts_per_tok, c.n_group, c.topk_group, c.norm_topk_prob,
        c.routed_scaling_factor,
    )  # fmt: skip


def first_largest(x: Tensor, count: int) -> Tensor:
    """Positions of the ``count`` largest along the last dimension, the largest first, of equals the first one."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def moved(bias: Tensor, load: Tensor, rate: float) -> Tensor:
    """The selection bias (E,) after an optimizer step in which the experts had ``load`` (E,) tokens.

    Overloaded experts go down by ``rate``, underloaded ones up; those at the mean stay. The load is that of the whole
    step, over all its micro-batches.
    """
    load = load.to(torch.float64)  # counts are exact, and so is their comparison with the mean
    return bias + rate * torch.sign(load.mean() - load).to(bias.dtype)
