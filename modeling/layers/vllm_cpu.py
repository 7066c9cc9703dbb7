"""Two faults of vLLM 0.32 on CPUs, mended when one of our models is built. GPUs are not touched.

**Requests without an adapter were answered with one.** A batch mixes requests of several LoRA adapters and of the base
model; an index per token says which adapter's slot applies, and -1 says none. The torch kernels use the index as it
is, and index -1 of a tensor is its last slot: with as many adapters loaded as there are slots (``max_loras``, by
default 1), base requests get the last adapter, silently.

**Pipeline stages failed without torch.compile.** What a later stage receives is allocated in the trial run before
compiling, which eager engines do not make.
"""

from typing import Any

from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.v1.worker.cpu_model_runner import CPUModelRunner


def mend() -> None:
    """Replaces the faulty methods; harmless when repeated."""
    for name in ("_shrink_prefill", "_shrink_decode"):
        _wrap(PunicaWrapperCPU, name, _without_base_requests)
    _wrap(CPUModelRunner, "sync_and_gather_intermediate_tensors", _allocated)


def _without_base_requests(original: Any) -> Any:
    def shrink(self: Any, y: Any, x: Any, w: Any, scale: float) -> None:
        original(self, y, x, w, scale)  # y (N, rank): the low-rank product, zero where no adapter applies
        y[self.token_lora_indices[: y.shape[0]] < 0] = 0

    return shrink


def _allocated(original: Any) -> Any:
    def gather(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                batch_size=self.max_num_tokens, dtype=self.model_config.dtype, device=self.device
            )
        return original(self, *args, **kwargs)

    return gather


def _wrap(owner: type, name: str, wrapper: Any) -> None:
    original = getattr(owner, name)
    if not getattr(original, "mended", False):
        replaced = wrapper(original)
        replaced.mended = True
        setattr(owner, name, replaced)
