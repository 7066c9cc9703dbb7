"""Multi-head latent attention (DeepSeek-V2, section 2.1), as torch modules.

    latent = RMSNorm(W_DKV x)             (R)      what is cached, with
    key_r  = RoPE(W_KR x)                 (P)      one rotated key for all heads
    head h: q = [W_UQ,h x ; RoPE(W_QR,h x)],  k = [W_UK,h latent ; key_r],  v = W_UV,h latent

Two forms compute the same. The explicit one makes keys and values of all heads from the latents: cheaper where every
token is new, as in training. The absorbed one moves ``W_UK`` to the query, head by head, ``(W_UK,h^T q) . latent``, and
``W_UV`` behind the attention, so that a step attends over the cached latents as they are, as if all heads shared one
key and value.

Without rotary dimensions (P = 0) the rotated parts are left out.

Shapes: B batch, T new tokens, S tokens with the cached ones, C hidden_size, H heads, N qk_nope_head_dim, P
qk_rope_head_dim, V v_head_dim, R kv_lora_rank.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from modeling.deepseek.config import MedAssistDeepseekConfig
from modeling.layers.rope import cos_sin, inverse_frequencies, rotate_halves, rotate_neighbours

LATENT_EPS = 1e-6
FORMS = ("auto", "explicit", "absorbed")


def rope_table(config: MedAssistDeepseekConfig) -> tuple[Tensor, float]:
    """Inverse frequencies (P / 2,) in float32 on the CPU, and the factor on cosines and sines (YaRN has one)."""
    assert config.rope_parameters is not None
    kind = config.rope_parameters["rope_type"]
    if kind == "default" or not config.qk_rope_head_dim:
        return inverse_frequencies(config.qk_rope_head_dim, config.rope_parameters["rope_theta"]), 1.0
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies.float(), float(factor)


def softmax_scale(config: MedAssistDeepseekConfig) -> float:
    """Factor on the scores: ``1 / sqrt(N + P)``, and under YaRN its temperature (``mscale_all_dim``) squared."""
    assert config.rope_parameters is not None
    rope, scale = config.rope_parameters, config.qk_head_dim**-0.5
    if rope["rope_type"] != "default" and rope.get("mscale_all_dim") and rope["factor"] > 1:
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1.0) ** 2
    return scale


def rope_cos_sin(config: MedAssistDeepseekConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines for :class:`LatentAttention`, float32, each of shape ``positions.shape + (P / 2,)``."""
    frequencies, factor = rope_table(config)
    cos, sin = cos_sin(positions, frequencies)
    return cos * factor, sin * factor


class LatentAttention(nn.Module):
    """Causal latent attention.

    Attributes:
        form: "explicit", "absorbed", or "auto": absorbed for one new token with a cache, else explicit.
    """

    def __init__(self, config: MedAssistDeepseekConfig, layer_idx: int) -> None:
        super().__init__()
        c = config
        self.layer_idx, self.form = layer_idx, "auto"
        self.heads, self.nope, self.rope, self.value = (
            c.num_attention_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim,
        )  # fmt: skip
        self.rank, self.interleave, self.dropout = c.kv_lora_rank, c.rope_interleave, c.attention_dropout
        self.scale = softmax_scale(c)
        query_width = c.num_attention_heads * c.qk_head_dim
        self.q_proj = self.q_a_proj = self.q_a_layernorm = self.q_b_proj = None
        if c.q_lora_rank is None:
            self.q_proj = nn.Linear(c.hidden_size, query_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=c.attention_bias)
            self.q_a_layernorm = nn.RMSNorm(c.q_lora_rank, eps=LATENT_EPS)
            self.q_b_proj = nn.Linear(c.q_lora_rank, query_width, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, c.cached_width, bias=c.attention_bias)
        self.kv_a_layernorm = nn.RMSNorm(c.kv_lora_rank, eps=LATENT_EPS)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, c.hidden_size, bias=c.attention_bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: Cache | None) -> Tensor:
        """``x`` (B, T, C), ``mask`` (B, 1, T, S) or None -> (B, T, C)."""
        q_nope, q_rope = self._queries(x).split([self.nope, self.rope], dim=-1)  # (B, H, T, N), (B, H, T, P)
        latent, k_rope = self.kv_a_proj_with_mqa(x)[:, None].split([self.rank, self.rope], dim=-1)
        latent = self.kv_a_layernorm(latent)  # (B, 1, T, R); k_rope is (B, 1, T, P)
        if self.rope:
            rotate = rotate_neighbours if self.interleave else rotate_halves
            cos, sin = rope[0][:, None], rope[1][:, None]  # (B, 1, T, P/2)
            q_rope, k_rope = rotate(q_rope, cos, sin), rotate(k_rope, cos, sin)
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer_idx)  # (B, 1, S, R), (B, 1, S, P)
        absorbed = self.form == "absorbed" or (self.form == "auto" and cache is not None and x.shape[1] == 1)
        attend = self.absorbed if absorbed else self.explicit
        y = attend(q_nope, q_rope, latent, k_rope, mask)  # (B, H, T, V)
        return self.o_proj(y.transpose(1, 2).flatten(2))

    def explicit(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over keys and values made from the latents: (B, H, T, V)."""
        keys_values = self.kv_b_proj(latent[:, 0]).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = keys_values.split([self.nope, self.value], dim=-1)  # (B, H, S, N), (B, H, S, V)
        q = torch.cat((q_nope, q_rope), dim=-1)
        k = torch.cat((k_nope, k_rope.expand(-1, self.heads, -1, -1)), dim=-1)  # (B, H, S, N + P)
        return self._attention(q, k, v, mask)

    def absorbed(self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, mask: Tensor | None) -> Tensor:
        """Attention over the latents themselves: (B, H, T, V)."""
        up = self.kv_b_proj.weight.unflatten(0, (self.heads, -1))  # (H, N + V, R)
        key_up, value_up = up.split([self.nope, self.value], dim=1)
        q = torch.cat((q_nope @ key_up, q_rope), dim=-1)  # (B, H, T, R + P)
        k = torch.cat((latent, k_rope), dim=-1).expand(-1, self.heads, -1, -1)
        y = self._attention(q, k, latent.expand(-1, self.heads, -1, -1), mask)  # (B, H, T, R)
        return y @ value_up.transpose(1, 2)

    def _queries(self, x: Tensor) -> Tensor:
        if self.q_proj is None:
            assert self.q_a_proj is not None
            assert self.q_a_layernorm is not None
            assert self.q_b_proj is not None
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        return q.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, H, T, N + P)

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        # Without a mask the sequence is either whole (causal) or one new token (which sees everything).
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, scale=self.scale,
            dropout_p=self.dropout if self.training else 0.0,
        )  # fmt: skip
