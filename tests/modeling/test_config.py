"""Configurations: published sizes, and messages for sizes that do not fit."""

from typing import Any

import pytest
import torch

from modeling.gatorgpt.config import GatorGPTConfig
from modeling.gpt.config import GPTConfig
from modeling.medassist.config import MedAssistGPTConfig
from modeling.registry import REGISTRY
from modeling.tinymorfer.config import TinymorferConfig

PUBLISHED = {
    ("medassist_gpt", "published_73m"): 72_930_304,
    ("medassist_gpt", "published_86m"): 86_578_176,
    ("medassist_gpt", "published_259m"): 259_155_968,
    ("medassist_gpt", "published_303m"): 303_196_160,
    ("gatorgpt", "published_v1"): 32_587_008,
    ("gatorgpt", "published_v2"): 40_598_656,
    ("gpt", "published_155m"): 155_332_608,
    ("gpt", "published_211m"): 211_871_700,
}


@pytest.mark.parametrize(("model_type", "preset"), PUBLISHED)
def test_published_preset_has_the_published_number_of_parameters(model_type: str, preset: str) -> None:
    arch = REGISTRY[model_type]
    with torch.device("meta"):
        model = arch.model_class()(arch.presets()[preset]())
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[model_type, preset]


def test_published_models_have_the_published_mathematics() -> None:
    """Flattened rotation in MedAssistGPT and GatorGPT; no causal mask in GPT."""
    for model_type, preset in PUBLISHED:
        config = REGISTRY[model_type].presets()[preset]()
        assert config.causal is False if model_type == "gpt" else config.rope_layout == "flattened"


def test_published_head_sizes() -> None:
    heads = [GatorGPTConfig.published_v1(), GatorGPTConfig.published_v2(), GPTConfig.published_155m(),
             GPTConfig.published_211m()]  # fmt: skip
    assert [config.head_dim for config in heads] == [48, 56, 64, 45]


def test_a_tinymorfer_block_has_the_published_number_of_parameters() -> None:
    arch = REGISTRY["tinymorfer"]
    with torch.device("meta"):
        block = arch.model_class()(TinymorferConfig.base()).model.layers[0]
    assert sum(p.numel() for p in block.parameters()) == 131_840


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (MedAssistGPTConfig, {"hidden_size": 65, "num_attention_heads": 4}, ["hidden_size", "num_attention_heads"]),
        (MedAssistGPTConfig, {"head_dim": 3}, ["head_dim"]),
        (
            MedAssistGPTConfig,
            {"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8},
            ["num_attention_heads", "num_key_value_heads"],
        ),
        (MedAssistGPTConfig, {"rope_layout": "diagonal"}, ["rope_layout", "per_head", "flattened"]),
        (MedAssistGPTConfig, {"tie_word_embeddings": False}, ["tie_word_embeddings"]),
        (
            MedAssistGPTConfig,
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
            ["rope_parameters.rope_type", "yarn"],
        ),
        (GPTConfig, {"hidden_size": 100, "num_attention_heads": 3}, ["hidden_size", "num_attention_heads"]),
        (GPTConfig, {"num_hidden_layers": 0}, ["num_hidden_layers"]),
        (GPTConfig, {"tie_word_embeddings": True}, ["tie_word_embeddings"]),
        (TinymorferConfig, {"hidden_size": 100, "num_attention_heads": 3}, ["hidden_size", "num_attention_heads"]),
        (TinymorferConfig, {"tie_word_embeddings": False}, ["tie_word_embeddings"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else getattr(value, "model_type", ""),
)
def test_sizes_that_do_not_fit_are_refused_by_name(config: Any, changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError, match=named[0]) as error:
        config(**changes)
    assert all(name in str(error.value) for name in named)
