"""Losses of the routers and of multi-token prediction, and statistics of the routing.

Balancing losses are computed for each window and summed over windows, never over a micro-batch as a whole: a product
of two means would depend on how a step is cut into micro-batches.

Shapes: B windows, T tokens, E experts, k experts a token.
"""

import torch
from torch import Tensor

from modeling.deepseek.experts import Routing
from modeling.deepseek.routing import affinities
from modeling.layers.objective import IGNORED


def balance_loss(routing: Routing, router: str, is_text: Tensor) -> Tensor:
    """How unevenly a layer's experts are used, summed over windows; padding, where ``is_text`` (B, T) is false, is out.

    "softmax", "aux_free": ``sum_i f_i P_i``, with f_i the share of tokens that chose expert i times E / k, and P_i its
    mean affinity, of those that sum to 1 for a token (DeepSeek-V2, section 2.2.3; DeepSeek-V3, section 2.1.2). It is 1
    where all are used alike. With "aux_free" this is V3's small complement against imbalance within a sequence.

    "noisy_top_k": squared coefficients of variation of importance, the sum of gates, and of load, the expected number
    of tokens under the noise (Shazeer et al. 2017, appendix A). It is 0 where all are used alike.
    """
    if router == "noisy_top_k":
        return _variation(_importance(routing, is_text)) + _variation(smooth_load(routing, is_text))
    experts, top_k = routing.logits.shape[-1], routing.experts.shape[-1]
    text = is_text.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    scores = affinities(routing.logits, router)
    scores = scores / scores.sum(-1, keepdim=True)
    chosen = _chosen(routing, is_text).sum(1) * experts / (top_k * text)  # (B, E)
    mean = (scores * is_text[..., None]).sum(1) / text  # (B, E)
    return (chosen * mean).sum()


def _chosen(routing: Routing, is_text: Tensor) -> Tensor:
    """(B, T, E) float32: 1 where an expert was chosen."""
    chosen = torch.zeros_like(routing.logits).scatter(-1, routing.experts, 1.0)
    return chosen * is_text[..., None]


def _importance(routing: Routing, is_text: Tensor) -> Tensor:
    gates = torch.zeros_like(routing.logits).scatter(-1, routing.experts, routing.weights)
    return (gates * is_text[..., None]).sum(1)  # (B, E)


def smooth_load(routing: Routing, is_text: Tensor) -> Tensor:
    """(B, E): the expected number of tokens, had the noise on the expert's own logit been drawn anew."""
    experts, top_k = routing.logits.shape[-1], routing.experts.shape[-1]
    if routing.clean_logits is None or routing.noise_scale is None or top_k == experts:
        return _chosen(routing, is_text).sum(1)
    best = routing.logits.topk(top_k + 1, dim=-1).values  # (B, T, k + 1)
    # To be chosen, an expert must beat the k-th best of the others.
    inside = routing.logits > best[..., -1:]
    threshold = torch.where(inside, best[..., -1:], best[..., -2:-1])
    probability = torch.special.ndtr((routing.clean_logits - threshold) / routing.noise_scale)
    return (probability * is_text[..., None]).sum(1)


def _variation(load: Tensor) -> Tensor:
    """Sum over windows of the squared coefficient of variation over experts, of ``load`` (B, E)."""
    mean = load.mean(-1)
    return (load.var(-1, unbiased=False) / (mean * mean + 1e-10)).sum()


def later_labels(labels: Tensor, position_ids: Tensor, depth: int) -> Tensor:
    """Labels (B, T) of depth ``depth``: position i gets that of position i + depth, where both are in one document."""
    later = labels.new_full(labels.shape, IGNORED)
    if depth < labels.shape[1]:
        same = position_ids[:, depth:] == position_ids[:, :-depth] + depth
        later[:, :-depth] = labels[:, depth:].masked_fill(~same, IGNORED)
    return later


@torch.no_grad()
def routing_statistics(routings: dict[int, Routing], router: str, is_text: Tensor) -> dict[str, Tensor]:
    """Sums over a micro-batch's text, one row a layer with experts, in their order.

    Returns:
        "load": (layers, E) int64, tokens of each expert. "entropy": (layers,) float64, of each token's affinities,
        normalised, in nats. "tokens": () int64.
    """
    load, entropy = [], []
    for number in sorted(routings):
        routing = routings[number]
        scores = affinities(routing.logits, router)
        scores = scores / scores.sum(-1, keepdim=True)
        load.append(routing.experts[is_text].flatten().bincount(minlength=scores.shape[-1]))
        entropy.append(torch.special.entr(scores[is_text]).sum(dtype=torch.float64))
    return {"load": torch.stack(load), "entropy": torch.stack(entropy), "tokens": is_text.sum()}


def coefficient_of_variation(load: Tensor) -> Tensor:
    """Standard deviation over mean along the last dimension, of ``load`` (..., E): 0 where all have the same."""
    load = load.double()
    return load.std(-1, unbiased=False) / load.mean(-1).clamp(min=1e-9)
