"""The files of a training checkpoint (:mod:`training.state`): complete or not there, verified, and never executed."""

import errno
import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import SavePlan, SavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

PARTIAL = ".partial"
CHECKSUMS, STATE, METADATA = "checksums.json", "state.json", ".metadata"


def begin(partial: Path, state: str, random_states: list[dict[str, Any]]) -> None:
    """Makes the folder of an unfinished checkpoint, with what only the main rank writes."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    (partial / STATE).write_text(state)
    for rank, states in enumerate(random_states):
        with (partial / f"rng-{rank}.pt").open("wb") as f:
            torch.save(states, f)


def finish(partial: Path, path: Path) -> None:
    """Forces everything to the disk, and gives the folder its name."""
    digests = {file.name: _digest(file, sync=True) for file in sorted(partial.iterdir())}
    (partial / CHECKSUMS).write_text(_as_text(digests))
    _sync(partial / CHECKSUMS)
    _sync(partial)
    replaced = path.with_name(f"{path.name}.replaced{PARTIAL}")
    if path.exists():
        path.rename(replaced)
    partial.rename(path)
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _digest(path: Path, sync: bool = False) -> str:
    with path.open("rb") as f:
        if sync:  # DCP does not flush .metadata before it does
            os.fsync(f.fileno())
        return hashlib.file_digest(f, "sha256").hexdigest()


def _as_text(checksums: dict[str, str]) -> str:
    return json.dumps(checksums, indent=1) + "\n"


def _read_checksums(path: Path) -> dict[str, str]:
    if not path.is_dir():
        raise ValueError(f"{path} is no checkpoint: there is no such folder")
    try:
        text = (path / CHECKSUMS).read_text()
        checksums: dict[str, str] = json.loads(text)
        intact = text == _as_text(checksums) and {STATE, METADATA, "rng-0.pt"} <= checksums.keys()
    except FileNotFoundError:
        raise ValueError(_damaged(path / CHECKSUMS, "is missing")) from None
    except (ValueError, AttributeError):
        intact = False
    if not intact:
        raise ValueError(_damaged(path / CHECKSUMS, "is not what was written"))
    return checksums


def verify(path: Path) -> None:
    """Compares every file with its checksum; files that no checkpoint has are ignored.

    Raises:
        ValueError: ``path`` is no checkpoint, or a file of it is missing or changed.
    """
    for name, digest in _read_checksums(path).items():
        _verify_file(path / name, digest)


def _verify_file(file: Path, digest: str) -> None:
    if not file.is_file():
        raise ValueError(_damaged(file, "is missing"))
    if _digest(file) != digest:
        raise ValueError(_damaged(file, "is not what was written: its SHA-256 differs"))


def read_state(path: Path) -> dict[str, Any]:
    """``state.json``, verified; raises as :func:`verify` does."""
    _verify_file(path / STATE, _read_checksums(path)[STATE])
    state = json.loads((path / STATE).read_text())
    if not isinstance(state, dict) or not {"step", "score", "ranks", "facts"} <= state.keys():
        raise ValueError(f"{path / STATE} is not what a training checkpoint has")
    return state


def _damaged(file: Path, what: str) -> str:
    return f"{file} {what}. Delete the folder {file.parent} to go on from the checkpoint before it"


def cause(e: BaseException) -> BaseException:
    """The error behind torch's exception about one, preferably the system's."""
    errors = [error for error, _ in e.failures.values()] if isinstance(e, dcp.CheckpointException) else [e]
    for error in errors:
        behind: BaseException | None = error
        while behind is not None:
            if isinstance(behind, OSError):
                return behind
            behind = behind.__cause__ or behind.__context__
    return errors[0]


def described(e: BaseException) -> str:
    """In words for the user, on one line."""
    if isinstance(e, OSError) and e.strerror:
        hint = "; free some space, or lower train.keep" if e.errno in (errno.ENOSPC, errno.EDQUOT) else ""
        return e.strerror + hint
    return f"{type(e).__name__}: {str(e).strip().partition(chr(10))[0][:300]}"


def read_random_states(path: Path, rank: int) -> dict[str, Any]:
    """What :func:`begin` was given for a rank.

    Raises:
        ValueError: the file is not there or holds something else.
    """
    file = path / f"rng-{rank}.pt"
    try:
        states = torch.load(file, weights_only=True)
        assert {"python", "numpy", "torch"} <= states.keys()
    except Exception as e:  # a foreign file can make torch raise nearly anything
        raise ValueError(f"{file} is not what a training checkpoint has ({type(e).__name__})") from e
    return states


class Writer(dcp.FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        return StorageMeta()  # the default is the path at the time of writing, which is nobody's business

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except Exception as e:  # torch.save hides what the system said, and another rank would get no more than that
            raise cause(e) from None


class Reader(dcp.FileSystemReader):
    """Reads ``.metadata``, a pickle, and executes nothing in it."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / METADATA
        try:
            with file.open("rb") as f:
                metadata = _Unpickler(f).load()
            assert isinstance(metadata, Metadata)
            assert all(isinstance(stored, TensorStorageMetadata) for stored in metadata.state_dict_metadata.values())
            files = {info.relative_path for info in metadata.storage_data.values()}
        except pickle.UnpicklingError as e:
            raise ValueError(f"{file} {e}") from None
        except Exception as e:  # a damaged or hostile pickle can raise nearly anything
            raise ValueError(f"{file} is not what a training checkpoint has ({type(e).__name__})") from e
        if unknown := sorted(map(str, files - _read_checksums(file.parent).keys())):
            raise ValueError(f"{file} refers to {unknown[0]!r}, which {CHECKSUMS} does not list")
        return metadata


class _Unpickler(pickle.Unpickler):
    """Knows what describes tensors and no other class: torch would load pickled objects without restrictions."""

    KNOWN = {
        "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name in self.KNOWN.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"holds {module}.{name}, which no training checkpoint does: reading it could execute a program, so it is "
            "refused and nothing of it was executed"
        )
