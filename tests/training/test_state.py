"""Training checkpoints on disk, on one process. (On more: test_state_ranks.)"""

import hashlib
import json
import math
import multiprocessing
import os
import pickle
import random
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from modeling import registry
from tests.disks import small_disk
from training import state
from training.data import Batch
from training.optimizer import Optimizers
from training.state import Checkpoints


class Tiny(nn.Module):
    """Dropout, tied embedding and head, and a buffer that training moves."""

    def __init__(self, width: int = 8, seed: int = 0, dropout: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(20, width)
        self.layer = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 20, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("bias", torch.zeros(width))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.layer(self.dropout(self.embed(ids))).tanh() + self.bias
        return nn.functional.cross_entropy(self.head(x), ids, reduction="sum")


def made(name: str = "muon", **settings: Any) -> tuple[Tiny, Optimizers]:
    model = Tiny(**settings)
    return model, Optimizers(model, name, 0.02, 0.1, (0.9, 0.95))


def train(model: Tiny, optimizers: Optimizers, steps: int) -> None:
    """Steps on data that all three generators draw."""
    for _ in range(steps):
        ids = torch.tensor([random.randrange(20), int(np.random.randint(20)), int(torch.randint(20, ()))])
        model(ids).backward()
        optimizers.step()
        model.bias += 0.01 * torch.rand(model.bias.shape)


def everything(model: nn.Module, optimizers: Optimizers) -> dict[str, Tensor]:
    found = {f"model {name}": tensor for name, tensor in model.state_dict().items()}
    for i, states in enumerate(optimizers.state_dict()):
        for p, values in states["state"].items():
            found |= {f"{i} {p} {key}": value for key, value in values.items()}
    return {name: tensor.clone() for name, tensor in found.items()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])] == []


def checkpoints(folder: Path, said: list[str] | None = None, **settings: Any) -> Checkpoints:
    defaults = {"keep": 3, "keep_best": False, "keep_every": 0, "asynchronous": False}
    say = (lambda text: pytest.fail(text)) if said is None else said.append
    return Checkpoints(folder, say=say, **(defaults | settings))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    model, optimizers = made()
    train(model, optimizers, 2)
    checkpoints(tmp_path).save(2, model, optimizers.all, {"recipe": {"lr": 0.02}, "best": None})
    return tmp_path / "step-00000002"


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_resumed_run_is_bit_equal_to_one_that_never_stopped(name: str, asynchronous: bool, tmp_path: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    model, optimizers = made(name)
    train(model, optimizers, 3)
    writing = checkpoints(tmp_path, asynchronous=asynchronous)
    writing.save(3, model, optimizers.all, {"recipe": {"steps": 9}})
    train(model, optimizers, 4)  # while it is written
    writing.close()

    random.seed(2)
    np.random.seed(2)
    again, its = made(name, seed=5)
    facts = state.load(tmp_path / "step-00000003", again, its.all)
    assert facts == state.read_facts(tmp_path / "step-00000003") == {"recipe": {"steps": 9}, "step": 3}
    train(again, its, 4)
    assert again.head.weight is again.embed.weight
    assert_same(everything(model, optimizers), everything(again, its))


def test_selection_biases_of_experts_are_in_it(tmp_path: Path) -> None:
    arch = registry.get("medassist_deepseek")

    def one(seed: int) -> tuple[Any, Optimizers]:
        torch.manual_seed(seed)
        model: Any = arch.model_class()(arch.config_class().tiny(router="aux_free"))
        return model, Optimizers(model, "muon", 0.02, 0.1, (0.9, 0.95))

    def steps(model: Any, optimizers: Optimizers) -> None:
        ids = torch.randint(1, 100, (2, 16))
        positions = torch.arange(16).expand(2, -1).contiguous()
        made = model.objective(Batch(ids, positions, ids.roll(-1, 1), torch.ones(2, 16, dtype=torch.bool)))
        torch.stack(list(made.sums.values())).sum().backward()
        optimizers.step()
        model.after_step(made.statistics)

    model, optimizers = one(0)
    steps(model, optimizers)
    checkpoints(tmp_path).save(1, model, optimizers.all, {})
    assert any("e_score_correction_bias" in name and tensor.any() for name, tensor in model.named_buffers())
    steps(model, optimizers)
    again, its = one(1)
    state.load(tmp_path / "step-00000001", again, its.all)
    steps(again, its)
    assert_same(everything(model, optimizers), everything(again, its))


def test_a_parameter_without_state_goes_on_without(tmp_path: Path) -> None:
    """Saving before the first step, or with a part of the model that had no gradient, invents no state."""
    model, optimizers = made()
    checkpoints(tmp_path).save(0, model, optimizers.all, {})
    state.load(tmp_path / "step-00000000", model, optimizers.all)
    assert [optimizer.state for optimizer in optimizers.all] == [{}, {}]


def test_dtypes_of_optimizer_states_survive(tmp_path: Path) -> None:
    model, optimizers = made("adamw")
    train(model, optimizers, 1)
    for values in optimizers.all[0].state.values():
        values["exp_avg_sq"] = values["exp_avg_sq"].bfloat16()
    checkpoints(tmp_path).save(1, model, optimizers.all, {})
    again, its = made("adamw", seed=1)
    state.load(tmp_path / "step-00000001", again, its.all)
    assert_same(
        {k: v for values in optimizers.all[0].state.values() for k, v in values.items()},
        {k: v for values in its.all[0].state.values() for k, v in values.items()},
    )


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"keep": 2}, [100, 101]),
        ({"keep": 0}, [101]),
        ({"keep": 1, "keep_every": 10}, [10, 100, 101]),
        ({"keep": 1, "keep_best": True}, [9, 101]),
        ({"keep": 1, "keep_best": True, "keep_every": 5}, [5, 9, 10, 100, 101]),
    ],
)
def test_what_is_kept(settings: dict[str, Any], left: list[int], tmp_path: Path) -> None:
    assert state.newest(tmp_path) is None
    model, optimizers = made("adamw")
    scores = {4: 3.0, 5: math.nan, 9: 1.0, 10: 1.5, 100: None, 101: math.inf}
    for step, score in scores.items():
        checkpoints(tmp_path, **settings).save(step, model, optimizers.all, {}, score)  # as runs that were resumed
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]
    assert state.newest(tmp_path) == tmp_path / "step-00000101"


def test_the_newest_has_the_most_steps_however_many(tmp_path: Path) -> None:
    for name in ("step-99999999", "step-100000000", "step-200000000.partial", "step-9.pt", "step-3x"):
        (tmp_path / name).mkdir()
    assert state.newest(tmp_path) == tmp_path / "step-100000000"


def test_a_checkpoint_of_the_same_step_is_replaced(saved: Path) -> None:
    model, optimizers = made(seed=3)
    (saved.parent / "step-00000001.partial").mkdir()
    checkpoints(saved.parent).save(2, model, optimizers.all, {"run": "again"})
    assert names(saved.parent) == ["step-00000002"]
    assert state.load(saved, *_fresh()) == {"run": "again", "step": 2}


def _fresh(**settings: Any) -> tuple[Tiny, list[torch.optim.Optimizer]]:
    model, optimizers = made(**settings)
    return model, optimizers.all


def test_every_file_is_verified(saved: Path) -> None:
    rng = random.Random(0)
    files = sorted(saved.iterdir())
    assert [f.name for f in files] == [".metadata", "__0_0.distcp", "checksums.json", "rng-0.pt", "state.json"]
    for file in files:
        intact = file.read_bytes()
        damaged: list[bytes | None] = [None, b"", intact[:-1], intact + b"\0"]
        for _ in range(20):
            flipped = bytearray(intact)
            flipped[rng.randrange(len(intact))] ^= 1 << rng.randrange(8)
            damaged.append(bytes(flipped))
        for content in damaged:
            file.unlink() if content is None else file.write_bytes(content)
            # A changed name or sum in checksums.json is a file that is missing, or changed.
            named = "" if file.name == "checksums.json" else f"/{file.name} "
            with pytest.raises(ValueError, match=rf"step-00000002/.*Delete the folder {saved}") as e:
                state.load(saved, *_fresh())
            assert named in str(e.value)
            file.write_bytes(intact)
    (saved / "notes.txt").write_text("mine")
    state.load(saved, *_fresh())


def test_a_damaged_checkpoint_is_not_the_best(saved: Path) -> None:
    model, optimizers = made("adamw")
    writing = checkpoints(saved.parent, keep=1, keep_best=True)
    writing.save(3, model, optimizers.all, {}, 1.0)
    with (saved.parent / "step-00000003/state.json").open("r+b") as f:
        f.write(b"?")
    writing.save(4, model, optimizers.all, {}, 2.0)
    assert names(saved.parent) == ["step-00000004"]
    with pytest.raises(ValueError, match="no such folder"):
        state.read_facts(saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 16}, r"model\.embed\.weight is \(20, 8\) torch\.float32 in it and \(20, 16\)"),
        ({"name": "adamw"}, r"it has Muon\.layer\.weight\.momentum, and this run has not"),
    ],
)
def test_another_model_or_optimizer_is_refused_by_name(settings: dict[str, Any], message: str, saved: Path) -> None:
    with pytest.raises(ValueError, match=message):
        state.load(saved, *_fresh(**settings))


def test_missing_and_unknown_tensors_are_refused_by_name(saved: Path) -> None:
    model, optimizers = _fresh()
    model.second = nn.Linear(2, 2, bias=False)
    del model.bias
    model.layer.double()
    with pytest.raises(ValueError, match="another model") as e:
        state.load(saved, model, optimizers)
    for part in ("it has no model.second.weight", "torch.float64 in the model", "(and 1 more)"):
        assert part in str(e.value)


# Hostile checkpoints


class Call:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def _sign(path: Path) -> None:
    """Makes checksums fit, as whoever wrote the files could."""
    files = [file for file in path.iterdir() if file.name != "checksums.json"]
    sums = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (path / "checksums.json").write_text(json.dumps(sums, indent=1) + "\n")


@pytest.mark.parametrize("where", [".metadata", "planner_data", "objects", "__0_0.distcp", "rng-0.pt", "elsewhere"])
def test_nothing_in_a_checkpoint_is_executed(where: str, saved: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    metadata = pickle.loads((saved / ".metadata").read_bytes())
    message = where
    if where == ".metadata":
        (saved / where).write_bytes(pickle.dumps(Call(marker)))
        message = r"holds (posix|os)\.mkdir.*nothing of it was executed"
    elif where == "planner_data":
        metadata.planner_data = Call(marker)
        message = r"holds (posix|os)\.mkdir"
    elif where == "objects":  # which torch loads without restrictions
        metadata.state_dict_metadata["model.bias"] = BytesStorageMetadata()
        message = "holds .*BytesStorageMetadata"
    elif where == "elsewhere":
        next(iter(metadata.storage_data.values())).relative_path = "../../secret"
        message = "refers to '../../secret'"
    elif where == "rng-0.pt":
        torch.save(Call(marker), saved / where)
    else:
        with (saved / where).open("wb") as f:
            torch.save(Call(marker), f)
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, (saved / where).stat().st_size
        message = "Weights only load failed"
    if where != ".metadata":
        (saved / ".metadata").write_bytes(pickle.dumps(metadata))
    _sign(saved)
    with pytest.raises(ValueError, match=message):
        state.load(saved, *_fresh())
    assert not marker.exists()


# Writing that fails


@pytest.mark.parametrize("asynchronous", [False, True])
def test_full_disk_is_said_and_the_last_good_checkpoint_survives(asynchronous: bool, tmp_path: Path) -> None:
    model, optimizers = made("adamw", width=64)
    train(model, optimizers, 1)
    said: list[str] = []
    before = everything(model, optimizers)
    with small_disk(tmp_path / "disk", 400_000) as disk:
        writing = checkpoints(disk / "checkpoints", said, asynchronous=asynchronous)
        writing.save(1, model, optimizers.all, {})
        writing.wait()
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_bsize
        tried = 0
        # Until nothing fits, not even the folder: whatever is being written then, it is said and removed.
        for left in (*range(0, free, 4096 * 3), free):
            (disk / "filler").write_bytes(bytes(free - left))
            train(model, optimizers, 1)
            writing.save(2, model, optimizers.all, {})
            writing.wait()
            tried += 1
            if (disk / "checkpoints/step-00000002").exists():
                break
            assert names(disk / "checkpoints") == ["step-00000001"]
        assert tried > 5
        assert len(said) == tried - 1
        for text in said:
            assert text.startswith("The checkpoint of step 2 could not be written (No space left on device; free ")
            assert f"the last good one is {disk}/checkpoints/step-00000001." in text
        after = everything(model, optimizers)
        state.load(disk / "checkpoints/step-00000001", model, optimizers.all)
        assert_same(everything(model, optimizers), before)
        state.load(disk / "checkpoints/step-00000002", model, optimizers.all)
        assert_same(everything(model, optimizers), after)


def test_a_folder_that_went_away_ends_no_run(saved: Path) -> None:
    model, optimizers = made()
    said: list[str] = []
    writing = checkpoints(saved.parent / "run", said)
    shutil.rmtree(saved.parent / "run")
    writing.save(1, model, optimizers.all, {})
    assert len(said) == 1
    assert "No such file or directory): there is none before it" in said[0]


def _write_on(folder: Path, width: int) -> None:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    model, optimizers = made("adamw", width=width)
    train(model, optimizers, 1)
    writing = checkpoints(folder, asynchronous=True)
    for step in range(1, 1000):
        model.bias.fill_(step)
        writing.save(step, model, optimizers.all, {"at": step})


@pytest.mark.skipif(torch.cuda.is_available(), reason="forks, which CUDA does not survive")
@pytest.mark.parametrize("file", ["state.json", "__0_0.distcp", ".metadata", "checksums.json"])
def test_killed_while_writing(file: str, tmp_path: Path) -> None:
    """Early, late and at the end of a checkpoint: whatever has a checkpoint's name is one."""
    width = 700
    child = multiprocessing.get_context("fork").Process(target=_write_on, args=(tmp_path, width))
    child.start()
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(f"step-*[2-9].partial/{file}")):
        assert time.monotonic() < deadline
        assert child.is_alive()
    child.kill()
    child.join()
    complete = [name for name in names(tmp_path) if not name.endswith(".partial")]
    assert complete
    for name in complete:
        model, optimizers = made("adamw", width=width)
        step = state.load(tmp_path / name, model, optimizers.all)["at"]
        assert name == f"step-{step:08d}"
        assert (model.bias == step).all()
    checkpoints(tmp_path)
    assert names(tmp_path) == complete
