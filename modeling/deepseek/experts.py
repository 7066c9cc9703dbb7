"""The mixture of experts (DeepSeekMoE, Dai et al. 2024): a router, many small experts, and shared ones.

No token is ever dropped: experts take as many as come. Experts of one layer are two stacked tensors, multiplied by
grouped matrix products where torch has them, by a loop elsewhere; checkpoints hold a matrix for each expert, as
published ones do.

Shapes: B batch, T tokens, N = B * T, C hidden_size, E experts, k experts a token, F moe_intermediate_size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.routing import route

# Added to the noise's scale, by which the smooth load divides: without it, gradients become NaN where noise dies out.
LEAST_NOISE = 1e-2


class Routing(NamedTuple):
    """What a layer's router did, for losses and statistics.

    Attributes:
        experts: (B, T, k) int64.
        weights: (B, T, k) float32.
        logits: (B, T, E) float32, those that the choice was made from (with the noise, where there is any).
        clean_logits, noise_scale: (B, T, E), of "noisy_top_k" in training.
    """

    experts: Tensor
    weights: Tensor
    logits: Tensor
    clean_logits: Tensor | None = None
    noise_scale: Tensor | None = None


class MLP(nn.Module):
    """SwiGLU: ``down(silu(gate(x)) * up(x))``, of a dense layer or of the shared experts, which are one wider MLP."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, width, bias=False)
        self.up_proj = nn.Linear(hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    """Scores experts and chooses; in float32 whatever the model's dtype."""

    e_score_correction_bias: Tensor

    def __init__(self, config: MedAssistDeepseekConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))
        if config.router == "aux_free":
            # No gradient reaches it: training moves it (routing.moved). It is part of the checkpoint.
            bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
            self.register_buffer("e_score_correction_bias", bias)
        if config.router == "noisy_top_k":
            self.noise_weight = nn.Parameter(torch.zeros(config.n_routed_experts, config.hidden_size))

    def forward(self, x: Tensor) -> Routing:
        """``x`` is (B, T, C)."""
        c = self.config
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            logits = F.linear(x, self.weight.float())  # (B, T, E)
            clean, scale = None, None
            if c.router == "noisy_top_k" and self.training:
                clean, scale = logits, F.softplus(F.linear(x, self.noise_weight.float())) + LEAST_NOISE
                logits = clean + torch.randn_like(clean) * scale
            bias = self.e_score_correction_bias if c.router == "aux_free" else None
            experts, weights = route(c, logits, bias)
        return Routing(experts, weights, logits, clean, scale)


class Experts(nn.Module):
    """The routed experts of a layer, or those that this rank has, where ranks share them (``TensorPlan``)."""

    data_dependent = True  # its shapes are: compilation leaves it out

    def __init__(self, config: MedAssistDeepseekConfig) -> None:
        super().__init__()
        experts, hidden, width = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))
        self.count = experts
        self.tensor_rank = 0  # which part of the experts is here

    def forward(self, x: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """Sums for each token of ``x`` (N, C) what its ``experts`` (N, k) make of it, times ``weights`` (N, k)."""
        k = experts.shape[1]
        gate_up_proj, down_proj = _local(self.gate_up_proj), _local(self.down_proj)
        order = experts.flatten().argsort(stable=True)  # (N * k,): expert by expert
        counts = experts.flatten().bincount(minlength=self.count)  # (E,)
        if len(down_proj) < self.count:  # what other ranks' experts make is 0 here
            first = self.tensor_rank * len(down_proj)
            before, here = int(counts[:first].sum()), counts[first : first + len(down_proj)]
            order, counts = order[before : before + int(here.sum())], here
        gate, up = grouped_linear(x[order // k], gate_up_proj, counts).chunk(2, dim=-1)  # (N * k, F) each
        y = grouped_linear(F.silu(gate) * up, down_proj, counts)  # (N * k, C)
        y = y.new_zeros(experts.numel(), y.shape[1]).index_copy(0, order, y).unflatten(0, (-1, k))  # (N, k, C)
        return (y * weights[..., None].to(y.dtype)).sum(1)


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """``F.linear`` with another matrix for each run of rows.

    Args:
        x: (rows, in).
        weight: (E, out, in).
        counts: (E,) rows of each matrix, in order; their sum is all rows.

    Returns:
        (rows, out)
    """
    if _has_grouped_mm(x, weight):
        ends = counts.cumsum(0).to(torch.int32)
        return F.grouped_mm(x, weight.transpose(1, 2), offs=ends)
    return looped_linear(x, weight, counts)


def looped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """The same, one product after the other."""
    return torch.cat([F.linear(part, w) for part, w in zip(x.split(counts.tolist()), weight, strict=True)])


def _has_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Whether torch has a grouped product for these: on GPUs of rows of 16 bytes in bfloat16; elsewhere it loops."""
    aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
    return hasattr(F, "grouped_mm") and x.is_cuda and x.dtype == weight.dtype == torch.bfloat16 and aligned


class MixtureOfExperts(nn.Module):
    """Router, routed experts and shared experts."""

    def __init__(self, config: MedAssistDeepseekConfig) -> None:
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = MLP(config.hidden_size, config.moe_intermediate_size * config.n_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """``x`` is (B, T, C), and so is what is returned first."""
        routing = self.gate(x)
        y = self.experts(x.flatten(0, 1), routing.experts.flatten(0, 1), routing.weights.flatten(0, 1)).view_as(x)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, routing
