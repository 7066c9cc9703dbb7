"""vLLM's paged attention for heads of any size.

Attention kernels take some head sizes only (on CPUs 32, 64, 80, 96, ...). Queries, keys and values of another size are
padded with zeros to the next size that the platform's backend takes: zeros add nothing to a score, the padded part of
the output is cut off, and the scale stays that of the original size. The numbers do not change; the KV cache grows by
the padding.

Shapes: N tokens of all running requests, H query heads, K key/value heads, D head_dim, P padded head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import CacheConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.v1.attention.selector import get_attn_backend

LARGEST_HEAD = 512


def padded_head_size(head_dim: int, cache_config: CacheConfig | None) -> int:
    """The smallest multiple of 8 of at least ``head_dim`` that an attention backend of this platform takes.

    Other sizes than multiples of 8 are taken by the slowest backends alone, where at all.

    Raises:
        ValueError: there is none.
    """
    cache_dtype = cache_config.cache_dtype if cache_config else "auto"
    for size in range(-(-head_dim // 8) * 8, LARGEST_HEAD + 1, 8):
        try:
            backend = get_attn_backend(size, torch.get_default_dtype(), cache_dtype)
        except ValueError:  # how CUDA's selection says that no backend takes this size
            continue
        if backend.supports_head_size(size):
            return size
    raise ValueError(f"no attention backend of this platform takes heads of {head_dim} or more (up to {LARGEST_HEAD})")


class PagedAttention(nn.Module):
    """Causal attention through the paged KV cache.

    ``forward`` takes q (N, H * D), k and v (N, K * D), and returns (N, H * D).
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        scale: float,
        num_kv_heads: int,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.padded = padded_head_size(head_dim, cache_config)
        self.attn = Attention(
            num_heads,
            self.padded,
            scale=scale,
            num_kv_heads=num_kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=prefix,
        )

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.padded == self.head_dim:
            return self.attn(q, k, v)
        out = self.attn(self._pad(q), self._pad(k), self._pad(v))  # (N, H * P)
        return out.unflatten(-1, (-1, self.padded))[..., : self.head_dim].flatten(-2)

    def _pad(self, x: Tensor) -> Tensor:
        return F.pad(x.unflatten(-1, (-1, self.head_dim)), (0, self.padded - self.head_dim)).flatten(-2)
