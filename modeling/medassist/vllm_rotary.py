"""MedAssistGPT's rotary embedding in vLLM: float32 tables, gathered once per step, whatever the serving dtype.

Shapes: N tokens of all running requests, H query heads, K key/value heads and D head_dim of this rank.
"""

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

from modeling.layers.rope import cos_sin, inverse_frequencies, rotate_halves, rotate_neighbours
from modeling.medassist.config import MedAssistGPTConfig


def vllms_kernel_is_exact(config: MedAssistGPTConfig) -> bool:
    """Whether vLLM's own kernel computes the configured layout in float32.

    In the 16-bit formats its table is rounded to them, and on CPUs it crashes for some head sizes, such as 56.
    """
    return config.rope_layout == "per_head" and torch.get_default_dtype() == torch.float32


def rotary(config: MedAssistGPTConfig) -> "FlattenedRotary | PerHeadRotary":
    """The tables for the configured layout. Built under the serving dtype and on its device, as vLLM does."""
    return PerHeadRotary(config) if config.rope_layout == "per_head" else FlattenedRotary(config)


def _tables(config: MedAssistGPTConfig, inv_freq: Tensor) -> tuple[nn.Buffer, nn.Buffer]:
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu")
    device = torch.get_default_device()
    cos, sin = (nn.Buffer(table.to(device), persistent=False) for table in cos_sin(positions, inv_freq))
    return cos, sin


class PerHeadRotary(nn.Module):
    """Llama's layout: every head has the same angles."""

    def __init__(self, config: MedAssistGPTConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.rope_parameters is not None
        inv_freq = inverse_frequencies(config.head_dim, config.rope_parameters["rope_theta"])
        self.cos, self.sin = _tables(config, inv_freq)  # (max_position_embeddings, D/2)

    def rows(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines, ``(N, 1, D/2)`` each."""
        return self.cos[positions][:, None], self.sin[positions][:, None]

    @staticmethod
    def rotate(qk: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """Rotates ``qk`` of shape ``(N, (H + K) * D)``."""
        cos, sin = rows
        return rotate_halves(qk.unflatten(-1, (-1, 2 * cos.shape[-1])), cos, sin).flatten(-2)


class FlattenedRotary(nn.Module):
    """The flattened layout for this rank's heads: one table row holds the angles of the queries, then of the keys.

    Queries and keys lie side by side in the fused projection, so a single rotation serves both.
    """

    def __init__(self, config: MedAssistGPTConfig) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.rope_parameters is not None
        rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        num_heads, num_kv_heads = config.num_attention_heads // ranks, max(1, config.num_key_value_heads // ranks)
        half = config.head_dim // 2
        first_q = rank * num_heads
        # With more ranks than key/value heads, neighbouring ranks hold copies of the same head.
        copies = max(1, ranks // config.num_key_value_heads)
        first_kv = (rank // copies) * num_kv_heads
        # Frequencies run over the whole width, of which this rank holds a contiguous part.
        theta = config.rope_parameters["rope_theta"]
        inv_q = inverse_frequencies(config.num_attention_heads * config.head_dim, theta)
        inv_k = inverse_frequencies(config.num_key_value_heads * config.head_dim, theta)
        inv_freq = torch.cat(
            (
                inv_q[first_q * half : (first_q + num_heads) * half],
                inv_k[first_kv * half : (first_kv + num_kv_heads) * half],
            )
        )
        self.cos, self.sin = _tables(config, inv_freq)  # (max_position_embeddings, (H + K) * D/2)

    def rows(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Gathered once per step, shared by all layers: cosines and sines, ``(N, (H + K) * D/2)`` each.

        In eager mode on a CPU one complex tensor ``cos + i sin``: a complex product is several times faster there than
        real arithmetic, and as fast as vLLM's own kernel for Llama.
        """
        cos, sin = self.cos[positions], self.sin[positions]
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            return (torch.complex(cos, sin),)
        return cos, sin

    @staticmethod
    def rotate(qk: Tensor, rows: tuple[Tensor, ...]) -> Tensor:
        """Rotates ``qk`` of shape ``(N, (H + K) * D)``, which it may overwrite."""
        if len(rows) == 2:
            return rotate_neighbours(qk, *rows)
        exact = qk.float()  # itself in float32: no memory is allocated, and none must be faulted in
        torch.view_as_complex(exact.unflatten(-1, (-1, 2))).mul_(rows[0])
        return exact.to(qk.dtype)
