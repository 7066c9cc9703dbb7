"""Multi-head latent attention for vLLM: its own latent cache and kernels around our projections and rotation.

vLLM runs the explicit form on prompts and the absorbed one on decoding tokens, over a cache of one latent and one
rotary key a token. ``VLLM_MLA_DISABLE=1`` chooses ordinary attention over the keys and values of all heads instead.

The rotation is plain torch over float32 tables: vLLM's operator for CPUs reads the shapes that are needed here wrongly
(only the first head of the first token is right), whatever flags would avoid that by accident.

Kernels for GPUs take a latent of 512 with 64 rotary dimensions. Other sizes are padded with zeros to those, which
changes no score and no value; the cache is then as wide as the kernel's.

Shapes: N tokens of all running requests, C hidden_size, H heads of this tensor-parallel rank, D qk_nope_head_dim, P
qk_rope_head_dim, V v_head_dim, R kv_lora_rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from modeling.deepseek.attention import LATENT_EPS, rope_table, softmax_scale
from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.deepseek.vllm_config import kernel_sizes
from modeling.layers.rope import cos_sin, rotate_halves, rotate_neighbours
from modeling.layers.vllm_attention import PagedAttention

Rows = tuple[Tensor, Tensor]


class Rotary(nn.Module):
    """Tables of cosines and sines, float32 whatever the serving dtype."""

    def __init__(self, config: MedAssistDeepseekConfig) -> None:
        super().__init__()
        frequencies, factor = rope_table(config)
        positions = torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu")
        device = torch.get_default_device()
        cos, sin = ((table * factor).to(device) for table in cos_sin(positions, frequencies))
        self.cos = nn.Buffer(cos, persistent=False)  # (max_position_embeddings, P / 2)
        self.sin = nn.Buffer(sin, persistent=False)

    def forward(self, positions: Tensor) -> Rows:
        """Cosines and sines of this step's ``positions`` (N,): (N, 1, P / 2) each."""
        return self.cos[positions][:, None], self.sin[positions][:, None]


class DeepseekAttention(nn.Module):
    """``forward`` takes x (N, C) and the rows of :class:`Rotary`, and returns (N, C)."""

    def __init__(self, config: MedAssistDeepseekConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        c, quant = config, vllm_config.quant_config
        self.heads = c.num_attention_heads // get_tensor_model_parallel_world_size()
        self.nope, self.rope, self.value, self.rank = (
            c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank,
        )  # fmt: skip
        self.q_rank = c.q_lora_rank
        self.rotate = rotate_neighbours if c.rope_interleave else rotate_halves
        self.latent = vllm_config.model_config.use_mla
        self.kernel_rank, self.kernel_rope = kernel_sizes(c) if self.latent else (self.rank, self.rope)
        query_width = c.num_attention_heads * c.qk_head_dim
        if self.q_rank is None:
            self.q_proj = ColumnParallelLinear(
                c.hidden_size, query_width, bias=False, quant_config=quant, prefix=f"{prefix}.q_proj"
            )
            self.kv_a_proj_with_mqa = ReplicatedLinear(
                c.hidden_size, c.cached_width, bias=c.attention_bias, quant_config=quant,
                prefix=f"{prefix}.kv_a_proj_with_mqa",
            )  # fmt: skip
        else:
            self.fused_qkv_a_proj = MergedColumnParallelLinear(
                c.hidden_size, [self.q_rank, c.cached_width], bias=c.attention_bias, quant_config=quant,
                prefix=f"{prefix}.fused_qkv_a_proj", disable_tp=True,
            )  # fmt: skip
            self.q_a_layernorm = RMSNorm(self.q_rank, eps=LATENT_EPS)
            self.q_b_proj = ColumnParallelLinear(
                self.q_rank, query_width, bias=False, quant_config=quant, prefix=f"{prefix}.q_b_proj"
            )
        self.kv_a_layernorm = RMSNorm(self.rank, eps=LATENT_EPS)
        self.kv_b_proj = ColumnParallelLinear(
            self.kernel_rank, c.num_attention_heads * (self.nope + self.value), bias=False, quant_config=quant,
            prefix=f"{prefix}.kv_b_proj",
        )  # fmt: skip
        if self.kernel_rank != self.rank:
            _load_padded(self.kv_b_proj, self.kernel_rank)
        self.o_proj = RowParallelLinear(
            c.num_attention_heads * self.value, c.hidden_size, bias=c.attention_bias, quant_config=quant,
            prefix=f"{prefix}.o_proj",
        )  # fmt: skip
        if self.latent:
            self.mla_attn = MLAAttention(
                num_heads=self.heads,
                scale=softmax_scale(c),
                qk_nope_head_dim=self.nope,
                qk_rope_head_dim=self.kernel_rope,
                v_head_dim=self.value,
                q_lora_rank=self.q_rank,
                kv_lora_rank=self.kernel_rank,
                kv_b_proj=self.kv_b_proj,
                cache_config=vllm_config.cache_config,
                quant_config=quant,
                prefix=f"{prefix}.attn",
                # By name: on CPUs with AMX vLLM would prefer a backend that takes 512 + 64 in bfloat16 alone.
                attn_backend=AttentionBackendEnum.CPU_MLA.get_class() if current_platform.is_cpu() else None,
            )
        else:
            self.head_size = max(c.qk_head_dim, self.value)
            self.attn = PagedAttention(
                self.heads, self.head_size, scale=softmax_scale(c), num_kv_heads=self.heads,
                cache_config=vllm_config.cache_config, quant_config=quant, prefix=f"{prefix}.attn",
            )  # fmt: skip

    def forward(self, x: Tensor, rows: Rows) -> Tensor:
        if self.q_rank is None:
            q, _ = self.q_proj(x)
            compressed, _ = self.kv_a_proj_with_mqa(x)
        else:
            both, _ = self.fused_qkv_a_proj(x)
            q, compressed = both.split([self.q_rank, self.rank + self.rope], dim=-1)
            q, _ = self.q_b_proj(self.q_a_layernorm(q.contiguous()))
        q_nope, q_rope = q.view(-1, self.heads, self.nope + self.rope).split([self.nope, self.rope], dim=-1)
        latent, k_rope = compressed.split([self.rank, self.rope], dim=-1)
        latent = self.kv_a_layernorm(latent.contiguous())  # (N, R)
        k_rope = k_rope[:, None]  # (N, 1, P)
        if self.rope:
            q_rope, k_rope = self.rotate(q_rope, *rows), self.rotate(k_rope, *rows)
        attend = self._attend_latents if self.latent else self._attend_heads
        out, _ = self.o_proj(attend(q_nope, q_rope, latent, k_rope))
        return out

    def _attend_latents(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        wider, more = self.kernel_rank - self.rank, self.kernel_rope - self.rope
        q = torch.cat((q_nope, F.pad(q_rope, (0, more)) if more else q_rope), dim=-1)
        if wider or more:
            latent, k_rope = F.pad(latent, (0, wider)), F.pad(k_rope, (0, more))
        return self.mla_attn(q, latent, k_rope, output_shape=(q.shape[0], self.heads * self.value))

    def _attend_heads(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        keys_values, _ = self.kv_b_proj(latent)
        k_nope, v = keys_values.view(-1, self.heads, self.nope + self.value).split([self.nope, self.value], dim=-1)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.heads, -1)), dim=-1)
        q, k, v = (F.pad(y, (0, self.head_size - y.shape[-1])).flatten(1) for y in (q, k, v))
        out = self.attn(q, k, v).view(-1, self.heads, self.head_size)
        return out[..., : self.value].flatten(1)


def _load_padded(layer: nn.Module, columns: int) -> None:
    """Makes a layer load a matrix of fewer columns, with zeros for the others.

    Raises:
        ValueError: at loading, for quantised weights.
    """
    weight: Any = getattr(layer, "weight", None)  # a parameter of one of vLLM's classes
    if weight is None or not weight.is_floating_point():
        raise ValueError(
            "a latent that is padded for the kernel cannot be quantised: leave --quantization out, or set "
            "VLLM_MLA_DISABLE=1"
        )
    load = weight.weight_loader

    def load_padded(parameter: Tensor, loaded: Tensor, *args: object, **kwargs: object) -> None:
        load(parameter, F.pad(loaded, (0, columns - loaded.shape[1])), *args, **kwargs)

    # The parameter's own attribute, or a property over it, by vLLM's parameter class.
    name = "_weight_loader" if hasattr(weight, "_weight_loader") else "weight_loader"
    setattr(weight, name, load_padded)
