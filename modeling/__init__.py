"""The architectures: configuration, trainable torch module and vLLM class of each, one folder an architecture.

``import modeling`` makes Hugging Face's ``AutoConfig`` and ``AutoModelForCausalLM`` know every architecture of
:mod:`modeling.registry`. It loads neither vllm nor fastapi. Without torch and transformers (an installation with the
clients and the gateway alone) it does nothing.

That loads torch and all of transformers' auto classes, which takes seconds. A process that is after tokenizers alone
sets ``MEDASSIST_AUTO_CLASSES=0`` before it imports anything from here, as the one that makes a data set's tokenizer
does.
"""

import os
from importlib.util import find_spec


def register_with_transformers() -> None:
    """Registers every architecture with transformers' auto classes; harmless when repeated."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from modeling.registry import REGISTRY

    for arch in REGISTRY.values():
        AutoConfig.register(arch.model_type, arch.config_class(), exist_ok=True)
        AutoModelForCausalLM.register(arch.config_class(), arch.model_class(), exist_ok=True)


if os.environ.get("MEDASSIST_AUTO_CLASSES") != "0" and find_spec("torch") and find_spec("transformers"):
    register_with_transformers()
