"""How an architecture's published files are laid out: their tensor names, and their configurations.

Each architecture has one :class:`Layout`, in its ``published.py``. It is a table and a few small functions; reading
files, comparing shapes and writing the checkpoint are the same for all and lie beside this file.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Shapes = Mapping[str, tuple[int, ...]]
# Reads a tensor of the file by its bare name; None when it is not there.
Read = Callable[[str], Any]


@dataclass(frozen=True)
class Layout:
    """The published layout of one architecture. Tensor names are bare: ``_orig_mod.`` is already gone.

    Attributes:
        signature: regular expression; a file holds this layout when one of its tensor names matches in full.
        tensors: for a configuration, every published tensor's name, and the names of ours that it becomes. Several
            share its rows, in that order (a fused projection). A tied head is left out.
        sizes: what tensor shapes tell of the configuration, as fields of ours, given the fields that are known already.
            Shapes are those of the file, which may be damaged: names may be missing. Raises ValueError where shapes
            contradict each other.
        tied: published name of the tied head -> that of the tensor it equals; a file may hold either or both.
        ignored: regular expression of tensors that hold nothing trained (rotary tables, masks).
        model_types: ``model_type`` and ``architectures`` entries of published configurations.
        aliases: other names of fields, as published configurations have them -> names of ours, or names that ``settle``
            consumes.
        settle: completes a configuration in names of ours, once aliases are resolved, such as ``gqa_groups`` ->
            ``num_key_value_heads``; may raise ValueError.
        doubtful: for a published configuration, as it is in the file, the fields of ours whose value is known to be
            wrong at times: the tensors decide, with a warning.
        check: compares ignored tensors with the configuration; raises ValueError where they say otherwise.
        asked: fields that no shape tells -> how to find out, for the message when they are missing.
        derived: field -> the field that it follows from by ``sizes``, so that it is not asked for beside that one.
        defaults: fields that published configurations leave out because all of them are the same.
        notes: field -> what to tell about a value that came from ``defaults``.
        tokenizers: vocabulary size -> tiktoken encoding that the published models of that size use.
        refused: regular expression of a tensor name -> why a file that holds it cannot be imported.
        own_names: published tensors are called as in checkpoints of ours; ``tensors`` and ``tied`` are not used.
        copies: regular expression of tensors that published files have besides -> the tensor that they must equal.
        in_files: names and shapes of the module's tensors -> those of its checkpoints, where these differ.
    """

    signature: str
    tensors: Callable[[Any], dict[str, tuple[str, ...]]]
    sizes: Callable[[Shapes, Mapping[str, Any]], Mapping[str, Any]]
    tied: Mapping[str, str] = field(default_factory=dict)
    ignored: str = r"(?!)"
    model_types: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    settle: Callable[[dict[str, Any]], dict[str, Any]] = dict
    doubtful: Callable[[Mapping[str, Any]], tuple[str, ...]] = lambda given: ()
    check: Callable[[Any, Read], None] = lambda config, read: None
    asked: Mapping[str, str] = field(default_factory=dict)
    derived: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)
    tokenizers: Mapping[int, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    own_names: bool = False
    copies: Mapping[str, str] = field(default_factory=dict)
    in_files: Callable[[Shapes], Shapes] = dict


def layer_count(shapes: Shapes, pattern: str) -> int | None:
    """One more than the highest layer number in names that begin with ``pattern`` (whose group 1 is the number)."""
    matches = (re.match(pattern, name) for name in shapes)
    # Longer numbers are no layers of anything, and would take long to convert.
    numbers = [int(match[1]) for match in matches if match and len(match[1]) < 10]
    return max(numbers) + 1 if numbers else None


def side(shapes: Shapes, name: str, dimension: int, dimensions: int = 2) -> int | None:
    """Size of one dimension of a tensor, or None where the tensor is missing or has another number of dimensions."""
    shape = shapes.get(name, ())
    return shape[dimension] if len(shape) == dimensions else None


def told(**sizes: int | None) -> dict[str, int]:
    """The sizes that are known."""
    return {name: size for name, size in sizes.items() if size is not None}
