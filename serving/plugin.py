"""vLLM's way to our architectures: the ``vllm.general_plugins`` entry point.

vLLM calls :func:`register` in each of its processes (API server, engine core, workers, the process that inspects model
classes), possibly several times: it is idempotent and, but for configurations, hands over strings only.
"""

import ctypes
import os
import signal
import sys

# Set by serving.engine to its own process id: all processes of an engine die with their parents.
DIE_WITH_PARENT = "MEDASSIST_DIE_WITH_PARENT"

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def register() -> None:
    """Registers every architecture of :mod:`modeling.registry` with vLLM and with transformers."""
    if os.environ.get(DIE_WITH_PARENT):
        die_with_parent()
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    import modeling  # noqa: F401  registers the configurations with transformers
    from modeling.registry import REGISTRY

    known = ModelRegistry.get_supported_archs()
    for arch in REGISTRY.values():
        if arch.hf_name not in known:
            ModelRegistry.register_model(arch.hf_name, arch.vllm_model)
        if (update := arch.vllm_config()) is not None:
            MODELS_CONFIG_MAP[arch.hf_name] = update
        arch.register_with_vllm()


def die_with_parent() -> None:
    """Makes the kernel kill this process when its parent dies, whatever way it does (Linux; elsewhere nothing).

    A killed supervisor cannot stop its engines, and vLLM's engine core outlives a killed API server for a while.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the kernel was told
        os.kill(os.getpid(), signal.SIGKILL)
