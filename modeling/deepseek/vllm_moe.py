"""Dense and mixture-of-experts feed-forward for vLLM: its fused kernels behind the routers of training.

Routing calls :func:`modeling.deepseek.routing.route` as the module does, in float32 whatever the serving dtype, rather
than vLLM's top-k: of tied experts both then take the same, and the three routers are one.

Shapes: N tokens of all running requests, C hidden_size, E experts, k experts a token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.fused_moe import FusedMoEFactory
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.platforms import current_platform

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.routing import route


class DeepseekMLP(nn.Module):
    """SwiGLU. ``reduce``: add up the tensor-parallel ranks' parts; false where the caller does."""

    def __init__(
        self, hidden_size: int, width: int, quant_config: QuantizationConfig | None, prefix: str, reduce: bool = True
    ) -> None:
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [width] * 2, bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            width, hidden_size, bias=False, quant_config=quant_config, reduce_results=reduce,
            prefix=f"{prefix}.down_proj",
        )  # fmt: skip
        self.act_fn = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        gate_up, _ = self.gate_up_proj(x)
        out, _ = self.down_proj(self.act_fn(gate_up))
        return out


class DeepseekRouter(nn.Module):
    """Scores and chooses, in float32."""

    e_score_correction_bias: nn.Parameter | None

    def __init__(self, config: MedAssistDeepseekConfig) -> None:
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, dtype=torch.float32), requires_grad=False)
        bias = None
        if config.router == "aux_free":
            bias = nn.Parameter(torch.empty(experts, dtype=torch.float32), requires_grad=False)
        self.e_score_correction_bias = bias

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, E) of x (N, C)."""
        return F.linear(x.float(), self.weight)

    def choose(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Weights (N, k) float32 and experts (N, k)."""
        experts, weights = route(self.config, logits, self.e_score_correction_bias)
        return weights, experts


class DeepseekMoE(nn.Module):
    """Router, fused routed experts and shared experts. ``forward``: (N, C) -> (N, C)."""

    def __init__(self, config: MedAssistDeepseekConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        self.gate = DeepseekRouter(config)
        self.shared_experts = None
        if config.n_shared_experts:
            self.shared_experts = DeepseekMLP(
                config.hidden_size, config.moe_intermediate_size * config.n_shared_experts, quant_config,
                prefix=f"{prefix}.shared_experts", reduce=False,
            )  # fmt: skip
        self.experts = FusedMoEFactory(
            num_experts=config.n_routed_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            renormalize=config.norm_topk_prob,
            custom_routing_function=self.route,
            shared_experts=self.shared_experts,
            router_logits_dtype=torch.float32,
            quant_config=quant_config,
            prefix=f"{prefix}.experts",
        )
        # Under expert parallelism vLLM 0.32's kernels for CPUs take the numbers of all experts for those of this
        # rank's own. There the map is applied here, and the experts of other ranks weigh nothing.
        self.local_numbers = current_platform.is_cpu() and vllm_config.parallel_config.enable_expert_parallel

    def route(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        """vLLM's interface of a routing function: weights and experts, (N, k) each."""
        weights, experts = self.gate.choose(gating_output)
        if self.local_numbers and (numbers := self.experts.routed_experts.expert_map) is not None:
            experts = numbers.to(experts.dtype)[experts]
            weights = weights.masked_fill(experts < 0, 0.0)
            experts = experts.clamp(min=0)
        return weights, experts

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(hidden_states=x, router_logits=self.gate(x))
