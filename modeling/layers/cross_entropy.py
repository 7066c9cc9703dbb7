"""Cross-entropy straight from hidden states, a chunk of rows at a time: logits of all tokens never exist at once.

The gradient of a row's loss by its logits is known as soon as the logits are. It is multiplied into the gradients of
hidden states and head there and then, so that the backward pass computes nothing again: three matrix products, as with
whole logits (Hsu et al. 2024, "Liger Kernel", section 3.2). Softmax and sums are float32 whatever the products are.

Shapes: N tokens, C hidden_size, V vocab_size, n rows of a chunk.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Bytes of a chunk's float32 logits, so that the passes over them stay near the processor; and the fewest rows, below
# which the products wait for the head's weights.
CPU_BYTES, CPU_ROWS = 4 << 20, 128
GPU_BYTES, GPU_ROWS = 512 << 20, 1024


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int = 0, z_weight: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sums of the cross-entropy and of the z-loss of logits ``hidden @ weight.T``.

    Under autocast the products are in its dtype; the head's gradient is summed in float32.

    Args:
        hidden: (N, C).
        weight: (V, C), the head's.
        labels: (N,) int64 in [0, V).
        chunk: rows at a time; 0: chosen by the vocabulary.
        z_weight: factor of the z-loss in what is minimised.

    Returns:
        ``ce``, the summed cross-entropy in nats, and ``z``, the summed squares of log(sum(exp(logits))) (the z-loss of
        PaLM, Chowdhery et al. 2022, section 5), both () and at least float32. The gradient of the whole,
        ``ce + z_weight * z``, comes with ``ce``, since it is formed before any factor of the two is known; ``z`` has
        none. It can be asked for once.
    """
    if not torch.is_grad_enabled():
        hidden, weight = hidden.detach(), weight.detach()  # a Function does not see the mode, only its arguments
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    rows = chunk or default_chunk(weight.shape[0], device)
    with torch.autocast(device, enabled=False):
        ce, z = _ChunkedCrossEntropy.apply(hidden, weight, labels, rows, z_weight, dtype)
    return ce, z


def default_chunk(vocab_size: int, device: str) -> int:
    """Rows at a time on a kind of device, "cpu" or another."""
    size, least = (CPU_BYTES, CPU_ROWS) if device == "cpu" else (GPU_BYTES, GPU_ROWS)
    return max(least, size // (4 * vocab_size))


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, rows: int, z_weight: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        wide = torch.promote_types(dtype, torch.float32)
        h, w = hidden.to(dtype), weight.to(dtype)
        (count, width), vocab = h.shape, w.shape[0]
        rows = max(1, min(rows, count))
        losses, lse = h.new_empty(count, dtype=wide), h.new_empty(count, dtype=wide)
        grad_hidden = torch.empty_like(h) if need_hidden else None
        grad_weight = w.new_zeros(vocab, width, dtype=wide) if need_weight else None
        product = torch.empty_like(w) if need_weight and dtype != wide else None
        # One buffer each for all chunks: fresh pages cost more than what is written to them.
        all_logits, all_probabilities = h.new_empty(rows, vocab), h.new_empty(rows, vocab, dtype=wide)
        for start in range(0, count, rows):
            span = slice(start, min(start + rows, count))
            part, targets = h[span], labels[span, None]
            logits = torch.mm(part, w.t(), out=all_logits[: len(part)])  # (n, V)
            p = torch.softmax(logits, -1, dtype=wide, out=all_probabilities[: len(part)])
            # The likeliest token's probability is exp(0) over the sum of exponentials, and cannot be rounded to 0.
            log_sum = logits.amax(-1, keepdim=True) - p.amax(-1, keepdim=True).log()  # (n, 1)
            losses[span] = (log_sum - logits.gather(1, targets)).squeeze(1)
            lse[span] = log_sum.squeeze(1)
            if not (need_hidden or need_weight):
                continue
            if z_weight:
                p *= 1 + 2 * z_weight * log_sum
            p.scatter_add_(1, targets, p.new_full((1, 1), -1.0).expand(len(part), 1))
            by_logits = p if dtype == wide else logits.copy_(p)  # (n, V): the gradient, in the products' dtype
            if grad_hidden is not None:
                torch.mm(by_logits, w, out=grad_hidden[span])
            if product is not None and grad_weight is not None:
                grad_weight += torch.mm(by_logits.t(), part, out=product)
            elif grad_weight is not None:
                grad_weight.addmm_(by_logits.t(), part)
        ctx.save_for_backward(
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
        )
        ce, z = losses.sum(), lse.square().sum()
        ctx.mark_non_differentiable(z)
        return ce, z

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        # In place: another matrix of the head's size would be the peak of a step. A second call is refused by autograd,
        # which sees that what was saved has changed.
        grads = (None if grad is None else grad.mul_(factor) for grad in ctx.saved_tensors)
        return (*grads, None, None, None, None)
