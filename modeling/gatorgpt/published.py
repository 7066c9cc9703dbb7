"""The layout of published GatorGPT files: MedAssistGPT's, but for the head's name and the configurations.

Version 2 was published with a program and a configuration of another network; both are ignored.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from modeling.medassist import published


def doubtful(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Configurations written for version 2's remote code count 50257 tokens, where the weights have 50281."""
    architectures = given.get("architectures")
    remote = "auto_map" in given or (isinstance(architectures, list) and "GatorModel" in architectures)
    return ("vocab_size",) if remote else ()


LAYOUT = replace(
    published.LAYOUT,
    signature=r"unembed\.weight",
    tied={"unembed.weight": "embed.weight"},
    model_types=("gator-transformer", "gator", "gatorgpt", "GatorGPT", "GatorModel", "GatorGPTForCausalLM"),
    doubtful=doubtful,
    asked={
        **published.LAYOUT.asked,
        "num_attention_heads": "the number of query heads; both published versions have 8",
    },
)
