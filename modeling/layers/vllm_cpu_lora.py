"""Requests without an adapter stay without one: a fault of vLLM 0.32's LoRA on CPUs, mended.

A batch mixes requests of several adapters and of the base model; an index per token says which adapter's slot applies,
and -1 says none. vLLM's torch kernels use the index as it is, and index -1 of a tensor is its last slot: with as many
adapters loaded as there are slots (``max_loras``, by default 1), base requests are answered with an adapter, silently.
"""

from typing import Any

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


def mend() -> None:
    """Makes the low-rank product of every token without an adapter zero; harmless when repeated."""
    for name in ("_shrink_prefill", "_shrink_decode"):
        original = getattr(PunicaWrapperCPU, name)
        if getattr(original, "mended", False):
            continue

        def shrink(self: Any, y: Any, x: Any, w: Any, scale: float, original: Any = original) -> None:
            original(self, y, x, w, scale)  # y (N, rank)
            y[self.token_lora_indices[: y.shape[0]] < 0] = 0

        shrink.mended = True  # type: ignore[attr-defined]
        setattr(PunicaWrapperCPU, name, shrink)
