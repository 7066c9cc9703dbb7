"""How an architecture's published files are laid out: their tensor names, and their configurations.

Each architecture has one :class:`Layout`, in its ``published.py``. It is a table and a few small functions; reading
files, comparing shapes and writing the checkpoint are the same for all and lie beside this file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """The published layout of one architecture. Tensor names are bare: ``_orig_mod.`` is already gone.

    Attributes:
        signature: regular expression; a file holds this layout when one of its tensor names matches in full.
        tensors: for a configuration, every published tensor's name, and the names of ours that it becomes. Several
            share its rows equally, in that order (a fused projection). A tied head is left out.
        sizes: what tensor shapes tell of the configuration, as fields of ours. Given only the shapes of the file, which
            may be damaged: names may be missing.
        tied: published name of the tied head -> that of the tensor it equals; a file may hold either or both.
        ignored: regular expression of tensors that hold nothing trained (rotary tables, masks).
        model_types: ``model_type`` and ``architectures`` entries of published configurations.
        aliases: other names of fields, as published configurations have them -> names of ours.
        settle: completes a configuration in names of ours, once aliases are resolved and sizes filled in, such as
            ``gqa_groups`` -> ``num_key_value_heads``; may raise ValueError.
        trusted_sizes: fields whose published value is known to be wrong at times: the tensors decide, with a warning.
        asked: fields that no shape tells -> how to find out, for the message when they are missing.
        defaults: fields that published configurations leave out because all of them are the same.
        tokenizers: vocabulary size -> tiktoken encoding that the published models of that size use.
    """

    signature: str
    tensors: Callable[[Any], dict[str, tuple[str, ...]]]
    sizes: Callable[[Shapes], dict[str, int]]
    tied: Mapping[str, str] = field(default_factory=dict)
    ignored: str = r"(?!)"
    model_types: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    settle: Callable[[dict[str, Any]], dict[str, Any]] = dict
    trusted_sizes: tuple[str, ...] = ()
    asked: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Mapping[int, str] = field(default_factory=dict)
