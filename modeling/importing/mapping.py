"""Which tensor of a file becomes which of ours, with every shape compared before anything is written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from modeling.importing.configuration import Gathered, contradictions
from modeling.importing.recognition import Recognised, own_shapes
from modeling.importing.weights import Stored, pieces

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Target:
    """A tensor of ours and the rows of the file's tensor that it consists of."""

    name: str
    shape: tuple[int, ...]
    source: Stored
    first_row: int

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Head:
    """A tensor, such as a tied head, that the file holds beside the one that it must equal; ``why`` it must."""

    head: Stored
    tied_to: Stored
    why: str = (
        "the head of this architecture is its embedding: the file is damaged, or the model was trained with a head of "
        "its own, which it cannot have"
    )


def resolve_ties(found: Recognised) -> tuple[dict[str, Stored], list[Head]]:
    """The file's trained tensors without tied heads and copies, a head standing in for a tensor that is missing.

    Raises:
        ValueError: head and embedding have different shapes.
    """
    tensors = {name: t for name, t in found.tensors.items() if not re.fullmatch(found.layout.ignored, name)}
    heads = []
    for name, target in found.layout.tied.items():
        head = tensors.pop(name, None)
        if head is None:
            continue
        if target not in tensors:
            tensors[target] = head
        elif tensors[target].name != head.name:
            if head.shape != tensors[target].shape:
                raise ValueError(
                    f"{head.name} {head.shape} must equal {tensors[target].name} {tensors[target].shape}, for the head "
                    "of this architecture is its embedding, and their shapes differ: the file is damaged, or the model "
                    "was trained with a head of its own, which this architecture cannot have"
                )
            heads.append(Head(head, tensors[target]))
    for pattern, original in found.layout.copies.items():
        for name in [name for name in tensors if re.fullmatch(pattern, name)]:
            target = original if original in tensors else found.layout.tied.get(original, original)
            if target in tensors and tensors[name].shape == tensors[target].shape:
                why = "there is one for all places in this architecture: the file is damaged, or another model's"
                heads.append(Head(tensors.pop(name), tensors[target], why))
    return tensors, heads


def plan(found: Recognised, config: Any, gathered: Gathered) -> tuple[list[Target], list[Head]]:
    """Every tensor of ours with its source.

    Raises:
        ValueError: tensors are missing, unexpected, of another shape or not of floating point; the message names them
            as the file does, with both shapes and the likely cause.
    """
    tensors, heads = resolve_ties(found)
    ours = own_shapes(found.arch, config)
    names = found.layout.tensors(config)
    assert {part for parts in names.values() for part in parts} == set(ours), "the layout leaves out tensors of ours"
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    because = contradictions(found, gathered, {name: tensor.shape for name, tensor in tensors.items()} | shapes)
    wanted = {name: _stacked([ours[part] for part in parts]) for name, parts in names.items()}
    targets = []
    for name, parts in names.items():
        stored = tensors.get(name)
        if stored is None:
            continue
        if stored.shape != wanted[name]:
            raise ValueError(_misfit(name, stored, wanted, tensors, because))
        if stored.dtype not in FLOATS:
            raise ValueError(
                f"{stored.name} {stored.shape} in {stored.path} is {str(stored.dtype).removeprefix('torch.')}, where "
                "weights must be float32, float16, bfloat16 or float64: a quantised model cannot be imported, take the "
                "weights from before it was quantised"
            )
        row = 0
        for part in parts:
            targets.append(Target(part, ours[part], stored, row))
            row += ours[part][0]
    missing, unexpected = [n for n in names if n not in tensors], [n for n in tensors if n not in names]
    if missing or unexpected:
        raise ValueError(_incomplete(found, tensors, missing, unexpected, because))
    return targets, heads


def check_heads(heads: list[Head]) -> None:
    """Compares tied heads with what they must equal.

    Raises:
        ValueError: they differ.
    """
    for pair in heads:
        head, tied_to = pair.head.read(), pair.tied_to.read()
        if head.data_ptr() == tied_to.data_ptr() and head.stride() == tied_to.stride():
            continue  # one tensor under two names, as torch.save keeps it
        rows = pair.head.shape[0]
        both = zip(pieces(pair.head, 0, rows), pieces(pair.tied_to, 0, rows), strict=True)
        if not all(torch.equal(a, b) for a, b in both):
            raise ValueError(f"{pair.head.name} and {pair.tied_to.name} differ, but {pair.why}")


def _stacked(shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _misfit(
    name: str,
    stored: Stored,
    wanted: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, Stored],
    because: list[str],
) -> str:
    """What is wrong with a shape, and why: first what can be seen from this file alone."""
    expected, actual = wanted[name], stored.shape
    others = [n for n in wanted if n != name and n in tensors and _kind(n) == _kind(name)]
    if others and all(tensors[n].shape == wanted[n] for n in others):
        cause = (
            "the other layers' tensors of this kind have the right shape, so this one is damaged or from another model"
        )
    elif actual == expected[::-1]:
        cause = "it is stored transposed; transpose it before saving"
    elif because:
        cause = "; ".join(because)
    elif len(actual) != len(expected):
        cause = "it has another number of dimensions, so it is damaged or of another architecture"
    else:
        cause = "it is damaged, or the configuration belongs to another model"
    return f"{stored.name} in {stored.path} has shape {actual}, but {expected} is expected: {cause}"


def _kind(name: str) -> str:
    """A tensor's name without its layer's number."""
    return re.sub(r"\.\d+\.", ".N.", name, count=1)


def _incomplete(
    found: Recognised, tensors: Mapping[str, Stored], missing: list[str], unexpected: list[str], because: list[str]
) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing ({_first(missing)})")
    if unexpected:
        shown = [f"{tensors[name].name[:120]} {tensors[name].shape}" for name in unexpected]
        parts.append(f"{len(unexpected)} are unexpected ({_first(shown)})")
    if because:
        cause = "; ".join(because)
    elif missing and not unexpected:
        cause = "the file is incomplete"
    else:
        cause = f"the file is not, or not only, a {found.arch.model_type}, or its tensors were renamed"
    file = next(iter(found.tensors.values())).path
    return f"{file} does not fit the architecture {found.arch.model_type}: {' and '.join(parts)}: {cause}"


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
