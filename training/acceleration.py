"""What makes a step faster or smaller and must change nothing else: precision, compilation, recomputed activations.

All of it works on the decoder's layers, ``model.model.layers`` of every architecture, in place: names of weights, and
what is saved, stay as they are. The order is :func:`compile_layers`, :func:`checkpoint_activations`, then DDP or FSDP.
"""

import warnings
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

PRECISIONS = ("auto", "float32", "bfloat16")
LEAST_CAPABILITY = 8  # of CUDA devices whose matrix units take bfloat16


def compile_layers(model: Any) -> None:
    """Compiles each layer for the shapes that training has; layers alike share the result. Evaluation stays as it is.

    Embedding, mask, final norm and losses stay as they are, and so do modules whose shapes depend on the data
    (``data_dependent``: experts, which would be compiled anew in every step): a layer that has one is compiled around
    it. Random numbers are not drawn as without compilation.
    """
    compiled: dict[type, Callable[..., Any]] = {}
    for layer in model.model.layers:
        assert "forward" not in vars(layer), "compilation comes before recomputation"
        for module in layer.modules():
            if getattr(module, "data_dependent", False):
                module.forward = MethodType(torch.compiler.disable(type(module).forward), module)
        kind = type(layer)
        if kind not in compiled:
            compiled[kind] = _in_training(torch.compile(kind.forward, dynamic=False), kind.forward)
        layer.forward = MethodType(compiled[kind], layer)


def _in_training(compiled: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    """Samples grow by a token at a time, and each length would be compiled anew: only training is compiled."""

    def forward(layer: Any, *inputs: Any) -> Any:
        return (compiled if layer.training else plain)(layer, *inputs)

    return forward


def checkpoint_activations(model: Any) -> None:
    """Lets each layer keep only its input in training, and compute the rest again in the backward pass.

    Random numbers are drawn again as they were (dropout, a router's noise). What a layer returns, such as what its
    router did, is that of the first time.
    """
    for layer in model.model.layers:
        layer.forward = partial(_recomputed, layer.forward)  # of a bound method, so that a copied model has its own


def _recomputed(forward: MethodType, *inputs: Any) -> Any:
    """Outside of training a layer may fill a cache, which must not happen twice."""
    if not forward.__self__.training:  # type: ignore[attr-defined]
        return forward(*inputs)
    return checkpoint(forward, *inputs, use_reentrant=False)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for the recipe's ``train.precision``.

    Args:
        precision: "float32"; "bfloat16"; or "auto": bfloat16 on GPUs that multiply in it, else float32. CPUs that do
            are not taken for it: the same recipe must give the same numbers on any of them.

    Raises:
        ValueError: no such precision, or bfloat16 on a GPU that is too old for it. On a CPU that is a warning: it is
            slow there, and right.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"train.precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    able = _multiplies_bfloat16(device)
    if precision == "bfloat16" and not able:
        if device.type == "cuda":
            raise ValueError(
                f"train.precision 'bfloat16' needs a GPU of compute capability {LEAST_CAPABILITY}.0 or above, and "
                f"{torch.cuda.get_device_name(device)} is below: use 'float32' or 'auto'"
            )
        warnings.warn(
            "train.precision 'bfloat16' is several times slower than 'float32' on this CPU, which has neither "
            "avx512_bf16 nor AMX",
            stacklevel=2,
        )
    return (
        torch.bfloat16
        if precision == "bfloat16" or (precision == "auto" and able and device.type == "cuda")
        else torch.float32
    )


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= LEAST_CAPABILITY
    # torch has no public way to ask.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, precision: torch.dtype) -> Any:
    """The context that forward passes run in. Weights stay float32; so do softmax, norms and the loss."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)


def out_of_memory(error: BaseException, batch_size: int, accumulation: int) -> str | None:
    """What to change in the recipe after ``error``; None where it says nothing of memory.

    Args:
        batch_size, accumulation: the recipe's.
    """
    refused = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    if not (refused or isinstance(error, torch.OutOfMemoryError | MemoryError)):
        return None
    where = "GPU" if isinstance(error, torch.OutOfMemoryError) else "machine"
    smaller = "train.window lower, since one window is the smallest batch"
    if batch_size > 1:
        factor = next(n for n in range(2, batch_size + 1) if batch_size % n == 0)
        smaller = f"train.batch_size={batch_size // factor} with train.accumulation={accumulation * factor} (same step)"
    return (
        f"the {where}'s memory is not enough for this step: set {smaller}; or train.activation_checkpointing=true, a "
        "lower train.loss_chunk, or parallel.strategy=fsdp on more ranks"
    )
