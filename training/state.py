"""Training checkpoints: what a run needs to go on as if it had never stopped."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from training.optimizer import Optimizers


def save(folder: Path, step: int, model: nn.Module, optimizers: Optimizers, recipe: dict[str, Any], keep: int) -> None:
    """Writes ``folder/step-N.pt`` atomically and removes all but the newest ``keep``."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "step": step,
        "model": model.state_dict(),
        "optimizers": optimizers.state_dict(),
        "rng": torch.get_rng_state(),
        "recipe": recipe,
    }
    path = folder / f"step-{step:08d}.pt"
    temporary = path.with_suffix(".partial")
    with temporary.open("wb") as f:
        torch.save(state, f)
        f.flush()
        os.fsync(f.fileno())
    temporary.rename(path)
    for old in sorted(folder.glob("step-*.pt"))[: -max(1, keep)]:
        old.unlink()


def latest(folder: Path) -> Path | None:
    """The newest checkpoint, if there is one."""
    return max(folder.glob("step-*.pt"), default=None)


def resume(path: Path, model: nn.Module, optimizers: Optimizers, recipe: dict[str, Any]) -> int:
    """Restores a run and returns the number of steps it had made.

    Raises:
        ValueError: the checkpoint belongs to a run with another recipe.
    """
    state = torch.load(path, weights_only=True)
    if state["recipe"] != recipe:
        changed = sorted(
            f"{section}.{name}"
            for section, values in recipe.items()
            if isinstance(values, dict)
            for name, value in values.items()
            if state["recipe"].get(section, {}).get(name) != value
        )
        raise ValueError(
            f"{path.parent.parent} holds a run with another recipe ({', '.join(changed) or 'name'}): "
            "choose another --out, or delete it to start over"
        )
    model.load_state_dict(state["model"])
    optimizers.load_state_dict(state["optimizers"])
    torch.set_rng_state(state["rng"])
    return int(state["step"])
