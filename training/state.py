"""Training checkpoints: all that a run needs to go on as if it had never stopped.

    checkpoints/step-00000010/
        .metadata, __0_0.distcp, ...    weights, buffers, optimizers' states (torch.distributed.checkpoint)
        rng-0.pt, ...                   random states, one file a rank
        state.json                      step, score, number of ranks, and the run's own facts
        checksums.json                  SHA-256 of every other file

A folder of that name is complete: it is written as ``step-00000010.partial``, every file is forced to the disk, and
only then it gets its name. One process, DDP and FSDP write the same and read one another's, on any number of ranks;
ranks on several machines must see one file system. Nothing that a checkpoint holds is ever executed.
"""

import json
import math
import random
import re
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from training.checkpoint_files import (
    PARTIAL,
    Reader,
    Writer,
    begin,
    cause,
    described,
    finish,
    read_random_states,
    read_state,
    verify,
)

_NAME = re.compile(r"step-(\d{8,})")

# What it says at every save and load of a run on one process is what is meant there.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Checkpoints:
    """The checkpoints of a run: writes them, beside training, and removes old ones. All ranks call it together.

    A checkpoint that cannot be written never ends the run: what there is of it is removed, ``say`` tells why, and the
    next one is tried as if nothing had happened.

    Args:
        folder: made if it is not there. What a killed run left half-written in it is removed.
        keep: how many of the newest are kept.
        keep_best: whether the one with the lowest score is kept, too.
        keep_every: steps that this number divides are kept for good; 0 for none.
        asynchronous: the training thread copies the tensors to the host's memory, another one writes them.
        say: is told what the user should know, on the main rank alone.

    Raises:
        OSError: ``folder`` cannot be made or cleaned.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int,
        keep_best: bool,
        keep_every: int,
        asynchronous: bool,
        say: Callable[[str], None],
    ) -> None:
        self.folder = folder
        self.keep, self.keep_best, self.keep_every = keep, keep_best, keep_every
        self.asynchronous = asynchronous
        self.say = say
        self._thread: threading.Thread | None = None
        # A group of its own: messages of the writing thread must not meet those of training. Ranks wait in it while one
        # writes and hashes, which can take long; of a dead rank they hear at once.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(hours=3)) if dist.is_initialized() else None
        if _rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left in folder.glob(f"step-*{PARTIAL}"):
                shutil.rmtree(left)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        facts: dict[str, Any],
        score: float | None = None,
    ) -> None:
        """Writes ``step-STEP``, after the one before it is on the disk; replaces one of that name.

        Args:
            model: the bare module, not DDP's wrapper. Its parameters must be sharded where they ever are: not gathered.
            facts: what the run wants to know when it goes on, as JSON has it.
            score: held-out loss; lower is better.
        """
        self.wait()
        tensors = _tensors(model, optimizers)
        state = {
            "step": step,
            "score": score if score is not None and math.isfinite(score) else None,
            "ranks": _ranks(),
            "torch": torch.__version__,
            "facts": facts,
        }
        text = json.dumps(state, indent=1) + "\n"
        if not self.asynchronous:
            self._write(step, tensors, text, _random_states())
            return
        copies = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        self._thread = threading.Thread(target=self._write, args=(step, copies, text, _random_states()))
        self._thread.start()

    def wait(self) -> None:
        """Until what is being written is on the disk, or was given up."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Waits, and leaves the group of ranks."""
        self.wait()
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group = None

    def _write(self, step: int, tensors: dict[str, Tensor], state: str, random_states: dict[str, Any]) -> None:
        path = self.folder / f"step-{step:08d}"
        partial = path.with_name(path.name + PARTIAL)
        try:
            gathered = self._gather(random_states)
            self._on_main(lambda: begin(partial, state, gathered))
            dcp.save(
                tensors,
                storage_writer=Writer(partial),
                planner=DefaultSavePlanner(flatten_state_dict=False),
                process_group=self._group,
            )
            self._on_main(lambda: finish(partial, path))
        except (Exception, dcp.CheckpointException) as e:
            reason = cause(e)
            if not isinstance(reason, Exception):  # an interrupt, which torch wraps like any error
                raise reason from None
            if _rank() == 0:
                shutil.rmtree(partial, ignore_errors=True)
                last = newest(self.folder)
                good = "there is none before it" if last is None else f"the last good one is {last}"
                self.say(
                    f"The checkpoint of step {step} could not be written ({described(reason)}): {good}. Training goes "
                    "on, and the next one will be tried"
                )
            return
        if _rank() == 0:
            try:
                self._remove_old()
            except OSError as e:
                self.say(f"Old checkpoints in {self.folder} could not be removed: {described(e)}")

    def _gather(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        """The values of all ranks, on the main one; an empty list on others."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * _ranks()
        dist.gather_object(value, values if _rank() == 0 else None, group=self._group)
        return values if _rank() == 0 else []

    def _on_main(self, work: Callable[[], None]) -> None:
        """Has the main rank do something. Where it fails, all ranks raise."""
        failure: Exception | None = None
        if _rank() == 0:
            try:
                work()
            except Exception as e:
                failure = e
        failed = [failure is not None]
        if self._group is not None:
            dist.broadcast_object_list(failed, group=self._group)
        if failed[0]:
            raise failure or RuntimeError("the main rank failed")  # which is the one that tells why

    def _remove_old(self) -> None:
        paths = _all(self.folder)
        kept = set(paths[-max(1, self.keep) :])
        if self.keep_every:
            kept.update(path for path in paths if _step(path) % self.keep_every == 0)
        if self.keep_best:
            scores = {path: _score(path) for path in paths}
            kept.add(min(paths, key=lambda path: scores[path]))
        for path in paths:
            if path not in kept:
                # So that one which is half removed is not taken for a checkpoint.
                shutil.rmtree(path.rename(path.with_name(path.name + PARTIAL)))


def newest(folder: Path) -> Path | None:
    """The checkpoint with the most steps, if there is one."""
    return next(reversed(_all(folder)), None)


def read_facts(path: Path) -> dict[str, Any]:
    """What :meth:`Checkpoints.save` was given as ``facts``, and "step"; tensors are not read.

    Raises:
        ValueError: there is no such checkpoint, or it is damaged.
    """
    state = read_state(path)
    return state["facts"] | {"step": state["step"]}


def load(
    path: Path, model: nn.Module, optimizers: list[torch.optim.Optimizer], say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Restores a run, and returns what :func:`read_facts` does. All ranks call it together.

    Random states are restored on the number of ranks that wrote them; with another, ``say`` tells that they were not.

    Raises:
        ValueError: the checkpoint is damaged, holds something else than tensors, or is of another model or optimizer.
            The message names the file or the tensor. A model that was to be restored may have been, in part.
    """
    refused: list[str | None] = [None]
    if _rank() == 0:  # not every rank all files
        try:
            verify(path)
        except (ValueError, OSError) as e:
            refused = [str(e)]
    if dist.is_initialized():
        dist.broadcast_object_list(refused)
    if refused[0] is not None:
        raise ValueError(refused[0])
    state = read_state(path)
    reader = Reader(path)
    tensors, states = _places(path, reader.read_metadata(), model, optimizers)
    try:
        dcp.load(tensors, storage_reader=reader, planner=DefaultLoadPlanner(flatten_state_dict=False))
    except dcp.CheckpointException as e:
        raise ValueError(f"{path} could not be read: {described(cause(e))}") from e
    for optimizer in optimizers:
        optimizer.state.clear()
    for optimizer, p, values in states:
        optimizer.state[p] = values
    if state["ranks"] == _ranks():
        _restore_random_states(read_random_states(path, _rank()))
    elif _rank() == 0:
        say(
            f"{path.name} was written by {state['ranks']} ranks and is continued by {_ranks()}: the same data in the "
            "same order, but other random numbers (dropout)"
        )
    return state["facts"] | {"step": state["step"]}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _all(folder: Path) -> list[Path]:
    """Complete checkpoints, by their steps."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _score(path: Path) -> tuple[float, int]:
    """For finding the best checkpoint: its score, and of equal ones the newest."""
    try:
        score = read_state(path)["score"]
    except ValueError:  # a damaged one is not the best
        score = None
    return math.inf if score is None else score, -_step(path)


# Tensors


def _parameters(
    model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> Iterator[tuple[str, torch.optim.Optimizer, dict[str, Any], Tensor]]:
    """Name, optimizer, group and parameter of all that optimizers move."""
    names = {p: name for name, p in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                assert p in names, "an optimizer has a parameter that the model has not: FSDP's may not be gathered"
                yield f"{type(optimizer).__name__}.{names[p]}", optimizer, group, p


def _tensors(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """Weights and buffers as "model.NAME", what optimizers have for a parameter as "OPTIMIZER.NAME.KEY".

    The tensors are the live ones. Settings of optimizers are not in it: they are the recipe's and the step's.

    Why not ``get_state_dict`` of torch.distributed.checkpoint: it makes an optimizer without state take a step to get
    one, writes a head tied to the embedding twice, and adds settings as pickles that are executed when read.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            found[f"model.{name}"] = tensor.detach()
            seen.add(id(tensor))
    for name, optimizer, _, p in _parameters(model, optimizers):
        for key, value in optimizer.state.get(p, {}).items():
            assert isinstance(value, Tensor), f"{name}.{key}"
            found[f"{name}.{key}"] = value
    return found


def _places(
    path: Path, metadata: Metadata, model: nn.Module, optimizers: list[torch.optim.Optimizer]
) -> tuple[dict[str, Tensor], list[tuple[torch.optim.Optimizer, Tensor, dict[str, Tensor]]]]:
    """Where the tensors of a checkpoint go: the model's own, and new ones for the optimizers' states.

    Raises:
        ValueError: names, shapes or dtypes are not the model's.
    """
    stored = metadata.state_dict_metadata
    by_parameter: dict[str, list[str]] = {}
    for name in stored:
        by_parameter.setdefault(name.rpartition(".")[0], []).append(name)
    places = _tensors(model, [])
    misfits = [f"it has no {name}" for name in places if name not in stored]
    for name, tensor in places.items():
        if name not in stored:
            continue
        saved = stored[name]
        assert isinstance(saved, TensorStorageMetadata)
        if (saved.size, saved.properties.dtype) != (tensor.shape, tensor.dtype):
            misfits.append(
                f"{name} is {tuple(saved.size)} {saved.properties.dtype} in it and {tuple(tensor.shape)} "
                f"{tensor.dtype} in the model"
            )
    states = []
    for parameter, optimizer, group, p in _parameters(model, optimizers):
        values: dict[str, Tensor] = {}
        for name in by_parameter.get(parameter, ()):
            saved, key = stored[name], name.rpartition(".")[2]
            assert isinstance(saved, TensorStorageMetadata)
            if saved.size == p.shape:
                values[key] = torch.empty_like(p, dtype=saved.properties.dtype, requires_grad=False)
            elif saved.size == ():  # counts of steps are where the update is computed
                on = p.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
                values[key] = torch.empty((), dtype=saved.properties.dtype, device=on)
            else:
                misfits.append(f"{name} is {tuple(saved.size)} in it, and the parameter {tuple(p.shape)}")
            places[name] = values.get(key, p)
        if values:
            states.append((optimizer, p, values))
    misfits += [f"it has {name}, and this run has not" for name in stored if name not in places]
    if misfits:
        more = f" (and {len(misfits) - 3} more)" if len(misfits) > 3 else ""
        raise ValueError(
            f"{path} is a checkpoint of another model or optimizer: {'; '.join(misfits[:3])}{more}. Continue it with "
            "the recipe that it was made with, or choose another --out"
        )
    return places, states


# Random states


def _random_states() -> dict[str, Any]:
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),  # type: ignore[union-attr]
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _restore_random_states(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"])
