"""The registry: what importing it costs, and that every entry leads somewhere."""

import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import modeling
from modeling import registry
from modeling.registry import REGISTRY, Architecture

ROOT = Path(modeling.__file__).parents[1]
every_architecture = pytest.mark.parametrize("arch", REGISTRY.values(), ids=list(REGISTRY))


def python(*arguments: str) -> str:
    result = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_importing_modeling_loads_neither_vllm_nor_fastapi() -> None:
    assert python("-c", "import modeling, sys; print({'vllm', 'fastapi'} & set(sys.modules))") == "set()"


def test_registry_can_be_read_without_torch_and_transformers() -> None:
    # -S leaves out site-packages, and with it everything but the standard library.
    program = (
        "import importlib.util as u, sys; assert not u.find_spec('torch') and not u.find_spec('transformers');"
        "sys.path.insert(0, '.'); from modeling.registry import REGISTRY; print(sorted(REGISTRY))"
    )
    assert python("-I", "-S", "-c", program) == str(sorted(REGISTRY))


@every_architecture
def test_configuration_and_model_resolve_and_carry_the_names_of_the_entry(arch: Architecture) -> None:
    config, model = arch.config_class(), arch.model_class()
    assert issubclass(config, PreTrainedConfig)
    assert issubclass(model, PreTrainedModel)
    assert (config.model_type, model.__name__, model.config_class) == (arch.model_type, arch.hf_name, config)


@every_architecture
def test_auto_classes_know_the_architecture(arch: Architecture) -> None:
    modeling.register_with_transformers()  # a second time
    config = AutoConfig.for_model(arch.model_type)
    assert type(config) is arch.config_class()
    assert AutoModelForCausalLM._model_mapping[type(config)] is arch.model_class()


def test_unknown_model_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="medassist_gpt"):
        registry.get("medassist_gtp")
