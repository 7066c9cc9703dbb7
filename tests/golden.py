"""Golden numbers of an architecture's reference, as a file in its published layout."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.importing.importer import import_checkpoint
from modeling.reference import Golden
from modeling.registry import Architecture


def published_tensors(arch: Architecture, golden: Golden, config: Any) -> dict[str, Tensor]:
    """The published tensors, filled by the formula of :class:`modeling.reference.Golden`."""
    with torch.device("meta"):
        ours = {name: tuple(p.shape) for name, p in arch.model_class()(config).named_parameters()}
    tensors = {}
    for i, (name, targets) in enumerate(sorted(arch.layout().tensors(config).items()), 1):
        shape = (sum(ours[target][0] for target in targets), *ours[targets[0]][1:])
        wave = torch.sin(0.37 * torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + 1.1 * i)
        gain = re.fullmatch(golden.gains, name)
        tensors[name] = (1 + 0.1 * wave if gain else 0.3 * wave).reshape(shape).float()
    return tensors


def import_golden(arch: Architecture, golden: Golden, directory: Path, config: Any) -> Path:
    """Writes the published file, a training dictionary with its configuration, and imports it.

    Args:
        config: of ours, of the same sizes; only shapes are taken from it.
    """
    directory.mkdir(parents=True)
    content = {"step": 1, "model_state_dict": published_tensors(arch, golden, config), "config": dict(golden.config)}
    torch.save(content, directory / "checkpoint.pt")
    out = directory / "imported"
    import_checkpoint(directory / "checkpoint.pt", out, tokenizer="none", settings=golden.settings)
    return out


def sizes(arch: Architecture, golden: Golden) -> Any:
    """A configuration of ours with a golden model's sizes."""
    layout = arch.layout()
    values: dict[str, Any] = {}
    for name, value in golden.config.items():
        values[layout.aliases.get(name, name)] = value
    known = arch.config_class().tiny().to_dict()
    values = layout.settle(values) | dict(golden.settings)
    return arch.config_class()(**json.loads(json.dumps({k: v for k, v in values.items() if k in known})))
