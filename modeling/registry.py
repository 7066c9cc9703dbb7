"""The architectures of this project, one line each.

Standard library only: reading this table loads neither torch, transformers nor vllm. Classes are named by
``"package.module:Class"`` strings and imported when first asked for; vLLM takes the same strings, so that its API
server never imports a model (and never initialises CUDA before it forks).

What belongs to an architecture lies in its folder under names that are the same for all of them:

    config.py      the configuration; its public classmethods are the presets
    model.py       the trainable torch module
    vllm_model.py  the vLLM class
    vllm_config.py (where needed) ConfigUpdate: what the architecture changes in vLLM's settings
    vllm_plugin.py (where needed) register(): what vLLM must be told besides its class, in each process
    published.py   LAYOUT: tensor names and configurations of files published by others (modeling.importing.layout)
    reference.py   REFERENCE: what the architecture is checked against (modeling.reference)
    README.md      the card
"""

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        package: the folder, as a Python package.
        model_type: ``model_type`` in ``config.json``; the key of Hugging Face's ``AutoConfig``.
        hf_name: name of the torch module and of the vLLM class; entry of ``architectures`` in ``config.json``.
        config_name: name of the configuration class.
        no_adapters: why vLLM cannot serve LoRA adapters for it; empty: it can.
    """

    package: str
    model_type: str
    hf_name: str
    config_name: str
    no_adapters: str = ""

    @property
    def vllm_model(self) -> str:
        """``"module:Class"`` of the vLLM class."""
        return f"{self.package}.vllm_model:{self.hf_name}"

    def vllm_config(self) -> Any:
        """Its ``ConfigUpdate`` for vLLM's settings, or None."""
        if importlib.util.find_spec(f"{self.package}.vllm_config") is None:
            return None
        return load(f"{self.package}.vllm_config:ConfigUpdate")

    def register_with_vllm(self) -> None:
        """Calls its ``vllm_plugin.register``, if it has one."""
        if importlib.util.find_spec(f"{self.package}.vllm_plugin") is not None:
            load(f"{self.package}.vllm_plugin:register")()

    def config_class(self) -> Any:
        return load(f"{self.package}.config:{self.config_name}")

    def model_class(self) -> Any:
        return load(f"{self.package}.model:{self.hf_name}")

    def layout(self) -> Any:
        """The :class:`modeling.importing.layout.Layout` of its published files."""
        return load(f"{self.package}.published:LAYOUT")

    def reference(self) -> Any:
        """The :class:`modeling.reference.Reference` that tests check it against."""
        return load(f"{self.package}.reference:REFERENCE")

    def presets(self) -> dict[str, Any]:
        """Names and constructors of its sizes: the public classmethods that its configuration class defines."""
        config = self.config_class()
        names = [n for n, v in vars(config).items() if isinstance(v, classmethod) and not n.startswith("_")]
        return {name: getattr(config, name) for name in names}


REGISTRY: dict[str, Architecture] = {
    arch.model_type: arch
    for arch in (
        Architecture("modeling.medassist", "medassist_gpt", "MedAssistGPTForCausalLM", "MedAssistGPTConfig"),
        Architecture("modeling.gatorgpt", "gatorgpt", "GatorGPTForCausalLM", "GatorGPTConfig"),
        Architecture("modeling.gpt", "gpt", "GPTForCausalLM", "GPTConfig"),
        Architecture("modeling.tinymorfer", "tinymorfer", "TinymorferForCausalLM", "TinymorferConfig"),
        Architecture(
            "modeling.deepseek",
            "medassist_deepseek",
            "MedAssistDeepseekForCausalLM",
            "MedAssistDeepseekConfig",
            no_adapters="its keys and values are folded into other matrices when it is loaded",
        ),
    )
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
