"""Training checkpoints on disk."""

from pathlib import Path

import pytest
import torch
from torch import nn

from training import state
from training.optimizer import Optimizers

RECIPE = {"name": "mine", "train": {"steps": 9, "window": 64}, "optimizer": {"lr": 0.1}}


@pytest.fixture
def run() -> tuple[nn.Linear, Optimizers]:
    torch.manual_seed(0)
    model = nn.Linear(3, 3, bias=False)
    return model, Optimizers(model, "adamw", 0.1, 0.1, (0.9, 0.95))


def test_the_newest_checkpoints_are_kept(tmp_path: Path, run: tuple[nn.Linear, Optimizers]) -> None:
    assert state.latest(tmp_path) is None
    for step in (5, 9, 10, 100):
        state.save(tmp_path, step, *run, RECIPE, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["step-00000010.pt", "step-00000100.pt"]
    assert state.latest(tmp_path) == tmp_path / "step-00000100.pt"


def test_resume_restores_step_weights_and_random_numbers(tmp_path: Path, run: tuple[nn.Linear, Optimizers]) -> None:
    model, optimizers = run
    weight = model.weight.detach().clone()
    state.save(tmp_path, 3, model, optimizers, RECIPE, keep=1)
    drawn = torch.rand(4)
    nn.init.zeros_(model.weight)
    assert state.resume(tmp_path / "step-00000003.pt", model, optimizers, RECIPE) == 3
    assert torch.equal(model.weight, weight)
    assert torch.equal(torch.rand(4), drawn)


def test_checkpoint_of_another_recipe_is_refused_by_field(tmp_path: Path, run: tuple[nn.Linear, Optimizers]) -> None:
    state.save(tmp_path, 3, *run, RECIPE, keep=1)
    other = RECIPE | {"train": {"steps": 10, "window": 64}}
    with pytest.raises(ValueError, match=r"\(train\.steps\)"):
        state.resume(tmp_path / "step-00000003.pt", *run, other)


def test_half_written_checkpoint_is_no_checkpoint(tmp_path: Path, run: tuple[nn.Linear, Optimizers]) -> None:
    state.save(tmp_path, 3, *run, RECIPE, keep=1)
    (tmp_path / "step-00000004.partial").write_bytes(b"half")
    assert state.latest(tmp_path) == tmp_path / "step-00000003.pt"
