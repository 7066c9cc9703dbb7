"""Models whose every token sees the whole sequence, in vLLM: each step computes each running sequence again.

In a bidirectional model a new token changes the states of all earlier ones, so no key or value can be kept. What is
kept, in vLLM's paged cache, are the token ids: :class:`TokenCache` is a cache layer that stores one id a position. A
step writes the ids it was given, reads each running request's sequence back, and the model computes all of it.
Batching, preemption and tensor parallelism work as for any model. Chunked prefill and prefix caching are switched off
by vLLM, because the cache's specification says that it is not causal.

What it costs: a token costs a pass over the whole sequence, ``length`` times the arithmetic of a cached token.

Shapes: N tokens given in this step, M tokens of all running sequences, H heads, D head_dim.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheSpec


@dataclass
class TokenCacheMetadata(AttentionMetadata):
    """Where this step's tokens go and where the running sequences lie.

    Attributes:
        query_ends: for each request, the end of its tokens among this step's.
        lengths: for each request, tokens in its sequence with this step's.
        block_table: (requests, blocks) int32.
        slots: (N,) where each of this step's tokens is stored.
    """

    query_ends: list[int]
    lengths: list[int]
    block_table: Tensor
    slots: Tensor


class TokenCacheMetadataBuilder(AttentionMetadataBuilder[TokenCacheMetadata]):
    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> TokenCacheMetadata:
        common = common_attn_metadata
        return TokenCacheMetadata(
            query_ends=common.query_start_loc_cpu[1 : common.num_reqs + 1].tolist(),
            lengths=common.seq_lens[: common.num_reqs].tolist(),
            block_table=common.block_table_tensor,
            slots=common.slot_mapping[: common.num_actual_tokens],
        )


class TokenCacheBackend(AttentionBackend):
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]

    @staticmethod
    def get_name() -> str:
        return "TOKEN_CACHE"

    @staticmethod
    def get_impl_cls() -> Any:
        raise NotImplementedError("a token cache stores ids; it has no attention of its own")

    @staticmethod
    def get_builder_cls() -> type[TokenCacheMetadataBuilder]:
        return TokenCacheMetadataBuilder

    @classmethod
    def supports_non_causal(cls) -> bool:
        return True


@dataclass
class Window:
    """The running sequences, one after the other.

    Attributes:
        input_ids: (M,)
        positions: (M,), from 0 in each sequence.
        lengths: of the sequences; their sum is M.
        rows: (N,) which of the M tokens this step's tokens are.
    """

    input_ids: Tensor
    positions: Tensor
    lengths: list[int]
    rows: Tensor

    def parts(self, limit: int) -> list[slice]:
        """The sequences in runs of whole ones, as slices of ``lengths``, each of at most ``limit`` tokens in all.

        A step has a few new tokens of many sequences: computing all of them at once could take far more memory than
        vLLM has measured that a step takes. A single sequence may be longer than ``limit``.
        """
        parts, start, tokens = [], 0, 0
        for number, length in enumerate(self.lengths):
            if tokens and tokens + length > limit:
                parts.append(slice(start, number))
                start, tokens = number, 0
            tokens += length
        return [*parts, slice(start, len(self.lengths))]


class TokenCache(nn.Module, AttentionLayerBase):
    """A layer that keeps token ids in vLLM's paged cache, and gives whole sequences back."""

    def __init__(self, longest: int, prefix: str) -> None:
        """``longest`` is the model's number of positions."""
        super().__init__()
        self.longest, self.prefix = longest, prefix
        self.kv_cache = torch.tensor([])
        context = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in context:
            raise ValueError(f"duplicate layer name: {prefix}")
        context[prefix] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return TokenCacheBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        return FullAttentionSpec(
            block_size=vllm_config.cache_config.block_size,
            num_kv_heads=1,
            head_size=1,
            head_size_v=0,  # one number a position, no value beside it
            dtype=torch.int32,
            max_tp_shards=1,
            non_causal=True,
        )

    def forward(self, input_ids: Tensor) -> Window:
        """Stores this step's ``input_ids`` (N,) and returns the sequences that they belong to."""
        metadata = get_forward_context().attn_metadata
        if metadata is None:  # a run that only measures memory or warms up
            count = input_ids.shape[0]
            lengths = [min(self.longest, count - start) for start in range(0, count, self.longest)]
            every = torch.cat([torch.arange(n, device=input_ids.device) for n in lengths])
            return Window(input_ids, every, lengths, torch.arange(count, device=input_ids.device))
        step: TokenCacheMetadata = metadata[self.prefix]
        cache = self.kv_cache  # (blocks, 1, block_size, 1)
        block_size, device = cache.shape[2], input_ids.device
        slots = step.slots
        cache[slots // block_size, 0, slots % block_size, 0] = input_ids[: slots.shape[0]].to(cache.dtype)

        ids: list[Tensor] = []
        positions: list[Tensor] = []
        rows: list[Tensor] = []
        start, begin = 0, 0
        for request, (length, end) in enumerate(zip(step.lengths, step.query_ends, strict=True)):
            position = torch.arange(length, device=device)
            block = step.block_table[request, position // block_size]
            ids.append(cache[block, 0, position % block_size, 0])
            positions.append(position)
            rows.append(position[length - (end - begin) :] + start)
            start, begin = start + length, end
        row = torch.cat(rows)
        return Window(
            torch.cat(ids).to(input_ids.dtype),
            torch.cat(positions),
            step.lengths,
            F.pad(row, (0, input_ids.shape[0] - row.shape[0])),  # vLLM may pad a step; those rows are not read
        )


class WindowAttention(nn.Module):
    """Attention in which every token of a sequence sees all of it.

    ``forward`` takes q, k, v (M, H * D) and the sequences' lengths, and returns (M, H * D).
    """

    def __init__(self, head_dim: int, scale: float) -> None:
        super().__init__()
        self.head_dim, self.scale = head_dim, scale

    def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
        out = []
        for sequence in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            # (1, H, T, D) each
            heads = (x.unflatten(-1, (-1, self.head_dim)).transpose(0, 1)[None] for x in sequence)
            qs, ks, vs = heads
            y = F.scaled_dot_product_attention(qs, ks, vs, scale=self.scale)
            out.append(y[0].transpose(0, 1).flatten(1))  # (T, H * D)
        return torch.cat(out)
