"""Rotary position embedding (Su et al. 2021, "RoFormer", section 3.4.2), in the two layouts of the family.

``per_head`` is the standard one, as in Llama: every head rotates with the same ``head_dim / 2`` frequencies, and
dimension ``j`` pairs with ``j + head_dim / 2``.

``flattened`` is what the published MedAssistGPT and GatorGPT checkpoints were trained with: the rotation acts on the
projection *before* it is split into heads. Neighbours ``(2i, 2i + 1)`` form a pair and the frequency falls over the
whole width ``W``, so every head has frequencies of its own, and a query and its key (whose widths differ under
grouped-query attention) rotate by different angles. Scores then depend on absolute positions: no position shifting
and no context extension.

Angles are computed in float32 whatever the model's dtype: a bfloat16 position is wrong from 257 on.

Shapes: B batch, T tokens, H heads, D head_dim, W = H * D.
"""

import torch
from torch import Tensor


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """``theta ** (-2i / width)`` for ``i`` in ``0 .. width/2 - 1``, float32 on the CPU. Shape ``(width / 2,)``.

    ``width`` is ``head_dim`` in the per-head layout, the whole projection's width in the flattened one.
    """
    # dtype and device are spelled out because vLLM builds models under a default dtype of bfloat16 and a CUDA device.
    exponent = torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width
    return 1.0 / (theta**exponent)


def cos_sin(positions: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every angle, float32, each of shape ``positions.shape + (len(inv_freq),)``."""
    angles = positions[..., None].float() * inv_freq.to(positions.device)
    return angles.cos(), angles.sin()


def rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs ``(j, j + D/2)``. ``x`` is ``(..., D)``; ``cos`` and ``sin`` broadcast to ``(..., D/2)``."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def rotate_neighbours(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates pairs ``(2i, 2i + 1)``. ``x`` is ``(..., W)``; ``cos`` and ``sin`` broadcast to ``(..., W/2)``."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)
