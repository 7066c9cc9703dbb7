"""The architectures: configuration, trainable torch module and vLLM class of each, one folder an architecture.

``import modeling`` makes Hugging Face's ``AutoConfig`` and ``AutoModelForCausalLM`` know every architecture of
:mod:`modeling.registry`. It loads neither vllm nor fastapi. Without torch and transformers (an installation with the
clients and the gateway alone) it does nothing.
"""

from importlib.util import find_spec


def register_with_transformers() -> None:
    """Registers every architecture with transformers' auto classes; harmless when repeated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from modeling.registry import REGISTRY

    for arch in REGISTRY.values():
        AutoConfig.register(arch.model_type, arch.config_class(), exist_ok=True)
        AutoModelForCausalLM.register(arch.config_class(), arch.model_class(), exist_ok=True)


if find_spec("torch") and find_spec("transformers"):
    register_with_transformers()
