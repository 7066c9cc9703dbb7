"""The architectures of this project, one line each.

Standard library only: reading this table loads neither torch, transformers nor vllm. Classes are named by
``"package.module:Class"`` strings and imported when first asked for; vLLM takes the same strings, so that its API
server never imports a model (and never initialises CUDA before it forks).
"""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        model_type: ``model_type`` in ``config.json``; the key of Hugging Face's ``AutoConfig``.
        hf_name: entry of ``architectures`` in ``config.json``; the key of vLLM's model registry.
        config: ``"module:Class"`` of the Hugging Face configuration.
        model: ``"module:Class"`` of the trainable torch module.
        vllm_model: ``"module:Class"`` of the vLLM class.
    """

    model_type: str
    hf_name: str
    config: str
    model: str
    vllm_model: str

    def config_class(self) -> Any:
        return load(self.config)

    def model_class(self) -> Any:
        return load(self.model)


def _architecture(package: str, model_type: str, hf_name: str, config_class: str) -> Architecture:
    return Architecture(
        model_type=model_type,
        hf_name=hf_name,
        config=f"{package}.config:{config_class}",
        model=f"{package}.model:{hf_name}",
        vllm_model=f"{package}.vllm_model:{hf_name}",
    )


REGISTRY: dict[str, Architecture] = {
    arch.model_type: arch
    for arch in (_architecture("modeling.medassist", "medassist_gpt", "MedAssistGPTForCausalLM", "MedAssistGPTConfig"),)
}


def load(target: str) -> Any:
    """Imports ``"package.module:Name"`` and returns the object."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def get(model_type: str) -> Architecture:
    """The architecture of a ``model_type``.

    Raises:
        ValueError: no such architecture; the message lists those there are.
    """
    if model_type not in REGISTRY:
        raise ValueError(f"unknown model_type {model_type!r}; this project has {', '.join(sorted(REGISTRY))}")
    return REGISTRY[model_type]
