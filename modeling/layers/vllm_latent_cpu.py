"""Latent attention (MLA) on CPUs for latents of any width, as vLLM's backend ``CPU_MLA``.

vLLM 0.32's own takes one size, 512 + 64, one new token of a sequence at a time, and the platform switches prefix
caching and chunked prefill off with it. This one derives from it and keeps its prefill; what it replaces is the step
over the paged cache: the latents of each sequence are gathered and attended over in plain torch, by as many new tokens
as speculative decoding brings. :func:`register` puts it in the other's place.

Shapes: R requests in decode, T most new tokens of one of them, H heads of this rank, L kv_lora_rank, P
qk_rope_head_dim, S longest sequence.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonDecodeMetadata,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from modeling.registry import REGISTRY

DEFAULT_BLOCK_SIZE = 128  # tokens; that of CPU engines without latent attention


@dataclass
class LatentDecodeMetadata(MLACommonDecodeMetadata):
    """``rows``: (tokens,) where each new token stands among R * T. ``hidden``: (R, T, S) true where it sees nothing;
    None where every token sees all S. ``blocks``: (R, blocks of S tokens)."""

    requests: int
    most: int
    longest: int
    rows: Tensor | None
    hidden: Tensor | None
    blocks: Tensor


class LatentMetadata(MLACommonMetadata[LatentDecodeMetadata]):
    def __post_init__(self) -> None:
        """No list of sizes to be on."""


class LatentMetadataBuilder(MLACommonMetadataBuilder[LatentMetadata]):
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, metadata_cls=LatentMetadata)

    def _build_decode(
        self,
        block_table_tensor: Tensor,
        seq_lens_device: Tensor,
        max_seq_len: int,
        query_start_loc_cpu: Tensor,
        query_start_loc_device: Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: Tensor | None,
    ) -> LatentDecodeMetadata:
        new = query_start_loc_cpu.diff()  # (R,)
        requests, most, longest = len(new), int(new.max()), max(1, int(seq_lens_device.max()))
        offsets = torch.arange(most)
        rows = None
        if num_decode_tokens != requests * most:
            rows = (offsets < new[:, None]).flatten().nonzero()[:, 0]
        # A new token sees what was there before it, and itself. Rows that stand for no token see the whole sequence.
        seen = seq_lens_device[:, None] - new[:, None] + offsets + 1  # (R, T)
        hidden = torch.arange(longest) >= seen[..., None]
        size = self.kv_cache_spec.block_size
        return LatentDecodeMetadata(
            block_table=block_table_tensor,
            seq_lens=seq_lens_device,
            dcp_tot_seq_lens=dcp_tot_seq_lens_device,
            requests=requests,
            most=most,
            longest=longest,
            rows=rows,
            hidden=hidden if bool(hidden.any()) else None,
            blocks=block_table_tensor[:, : -(-longest // size)].long(),
        )


class LatentImpl(CPUMLAImpl):
    """The cache and the attention of decoding tokens over it."""

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        """Stores latents (tokens, L) and rotary keys (tokens, 1, P), of which the original cannot take P = 0."""
        if not kv_cache.numel():
            return
        slots = slot_mapping.flatten().long()
        entries = torch.cat((kv_c_normed, k_pe[:, 0]), dim=-1)[: len(slots)]
        if (stored := slots >= 0).all():
            kv_cache.flatten(0, 1)[slots] = entries.to(kv_cache.dtype)
        else:  # padding of a step
            kv_cache.flatten(0, 1)[slots[stored]] = entries[stored].to(kv_cache.dtype)

    def forward_mqa(
        self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: MLACommonMetadata, layer: Any
    ) -> tuple[Tensor, None]:
        """``q`` is (tokens, H, L + P), or its two parts; the cache (blocks, block size, L + P). Returns (tokens, H, L)
        in the query's dtype; computes in float32."""
        step = attn_metadata.decode
        assert isinstance(step, LatentDecodeMetadata)
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        dtype, heads = query.dtype, query.shape[1]
        query = query.float()
        if step.rows is not None:
            query = query.new_zeros(step.requests * step.most, *query.shape[1:]).index_copy_(0, step.rows, query)
        query = query.view(step.requests, step.most * heads, -1)  # (R, T * H, L + P)
        keys = kv_c_and_k_pe_cache[step.blocks].flatten(1, 2)[:, : step.longest].float()  # (R, S, L + P)
        scores = torch.bmm(query, keys.transpose(1, 2)) * self.scale  # (R, T * H, S)
        if step.hidden is not None:
            by_token = scores.view(step.requests, step.most, heads, step.longest)
            by_token.masked_fill_(step.hidden[:, :, None], float("-inf"))
        out = torch.bmm(scores.softmax(-1), keys[..., : self.kv_lora_rank])  # (R, T * H, L)
        out = out.view(-1, heads, self.kv_lora_rank)
        if step.rows is not None:
            out = out[step.rows]
        return out.to(dtype), None


class LatentBackend(CPUMLABackend):
    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # vLLM's way to say any

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        from vllm.v1.attention.backend import MultipleOf

        return [MultipleOf(1)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        return True

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        return LatentMetadataBuilder

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        return LatentImpl


def register() -> None:
    """Makes it vLLM's ``CPU_MLA``, and leaves prefix caching, chunked prefill and block size of our models alone.

    Harmless when repeated.
    """
    register_backend(AttentionBackendEnum.CPU_MLA, f"{__name__}.{LatentBackend.__name__}")
    original = CpuPlatform.check_and_update_config.__func__
    if not hasattr(original, "keeps_settings"):
        CpuPlatform.check_and_update_config = classmethod(_keeping_settings(original))


def _keeping_settings(original: Any) -> Any:
    ours = {architecture.hf_name for architecture in REGISTRY.values()}

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        model, cache, scheduler = vllm_config.model_config, vllm_config.cache_config, vllm_config.scheduler_config
        kept = (
            (cache, "enable_prefix_caching"),
            (scheduler, "enable_chunked_prefill"),
            (scheduler, "max_num_batched_tokens"),
        )
        before = [(where, name, getattr(where, name)) for where, name in kept]
        block_size = cache.block_size if cache.user_specified_block_size else DEFAULT_BLOCK_SIZE
        original(cls, vllm_config)
        # Those of others may have backends of their own, with sizes of their own.
        if model is not None and model.use_mla and model.architecture in ours:
            for where, name, value in before:
                setattr(where, name, value)
            cache.block_size = block_size

    check_and_update_config.keeps_settings = True  # type: ignore[attr-defined]
    return check_and_update_config
