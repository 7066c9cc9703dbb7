"""MedAssistGPT's configuration: published sizes and messages for sizes that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from modeling.medassist.config import MedAssistGPTConfig
from modeling.medassist.model import MedAssistGPTForCausalLM


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [("published_86m", 86_578_176), ("published_259m", 259_155_968), ("published_303m", 303_196_160)],
)
def test_published_preset_has_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    config = getattr(MedAssistGPTConfig, preset)()
    with torch.device("meta"):
        model = MedAssistGPTForCausalLM(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert config.rope_layout == "flattened"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 65, "num_attention_heads": 4}, ["hidden_size", "num_attention_heads"]),
        ({"head_dim": 3}, ["head_dim"]),
        (
            {"num_attention_heads": 6, "num_key_value_heads": 4, "head_dim": 8},
            ["num_attention_heads", "num_key_value_heads"],
        ),
        ({"rope_layout": "diagonal"}, ["rope_layout", "per_head", "flattened"]),
        ({"tie_word_embeddings": False}, ["tie_word_embeddings"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["rope_parameters.rope_type", "yarn"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_that_do_not_fit_are_refused_by_name(changes: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError, match=named[0]) as error:
        MedAssistGPTConfig(**changes)
    assert all(name in str(error.value) for name in named)


def test_saved_configuration_loads_through_the_auto_class_unchanged(tmp_path: Path) -> None:
    config = MedAssistGPTConfig.tiny(rope_layout="flattened", rope_parameters={"rope_theta": 500.0}, rms_norm_eps=1e-6)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is MedAssistGPTConfig
    assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
