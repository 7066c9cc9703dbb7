"""``medassist import``: a published model's files become a checkpoint directory of ours."""

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling import fingerprint
from modeling.importing import configuration, hub, mapping, recognition, writer
from modeling.importing import tokenizer as tokenizers
from modeling.importing.configuration import Gathered
from modeling.importing.mapped import load_mapped
from modeling.importing.recognition import Recognised
from modeling.importing.source import Source, open_source, read_json

# Below this a progress line is gone before it can be read.
LARGE = 64 * 2**20
WEIGHTS = "model.safetensors"
LOCK, STAGED = "lock", "checkpoint"  # in the hidden folder
# Seconds within which an import has surely locked its folder.
STARTING = 60


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        parameters: trained elements, a tied head counted once.
        origins: field of the configuration -> where its value is from.
        tokenizer: where it is from, in words.
        notes: choices that were made, and how to make another.
        warnings: what may not be as expected.
    """

    directory: Path
    source: str
    format: str
    model_type: str
    config: Any
    origins: Mapping[str, str]
    parameters: int
    tokenizer: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]


def import_checkpoint(
    source: str | Path,
    out: str | Path,
    *,
    tokenizer: str | None = None,
    revision: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Imported:
    """Writes a checkpoint directory from files of somebody else's, or of ours. Nothing in them is executed.

    Memory stays near that of the largest tensor. The directory appears as a whole or not at all.

    Args:
        source: a file, a folder, or a repository's id (``owner/name``) on a Hugging Face hub, or
            a weight file of one (``owner/name/FILE``).
        out: the directory to write; must not exist, or be empty.
        tokenizer: see :func:`modeling.importing.tokenizer.choose`.
        revision: branch, tag or commit of the repository.
        settings: configuration fields that the files lack, or choices such as ``{"causal": True}``.

    Raises:
        ValueError: the source cannot be read or is no model of this project's architectures, or ``out`` is not empty.
        OSError: a file cannot be read, or the disk is full.
    """
    directory = Path(os.path.abspath(out))
    _check_out(directory)
    opened = locate(source, revision)
    found = recognition.recognise(opened.weights, opened.config)
    gathered = gather(found, opened, settings or {})
    config = configuration.build(found, gathered)
    targets, heads = mapping.plan(found, config, gathered)
    found.layout.check(config, _reader(found))
    mapping.check_heads(heads)
    chosen = tokenizers.choose(
        tokenizer, opened.folder, found.layout, config.vocab_size, config.max_position_embeddings
    )
    generation = _ends(found, opened, config, chosen.tokenizer)
    with staging(directory) as folder:
        writer.check_space(directory.parent, targets)
        try:
            with _progress(writer.size(targets)) as progress:
                writer.write(folder / WEIGHTS, targets, progress)
            _write_rest(folder, found, config, generation, chosen.tokenizer)
        except OSError as e:
            raise writer.explained(e, directory.parent, writer.size(targets)) from None
    notes = tuple(note for name, note in found.layout.notes.items() if gathered.origins.get(name) == "as published")
    warnings = (*found.warnings, *gathered.warnings, *([chosen.warning] if chosen.warning else []))
    return Imported(
        directory, opened.name, opened.weights.format, found.arch.model_type, config, gathered.origins,
        sum(target.elements for target in targets), chosen.origin, notes, warnings,
    )  # fmt: skip


def locate(source: str | Path, revision: str | None = None) -> Source:
    """Opens a source on disk or on a hub.

    Raises:
        ValueError: there is no such source, or it cannot be read.
    """
    name, path = str(source), Path(source)
    try:
        on_disk = path.exists()
    except (OSError, ValueError):  # too long for a path, or with a null byte
        on_disk = False
    if on_disk:
        if revision is not None:
            raise ValueError(f"--revision is for repositories on a hub, and {name} is on this disk")
        return open_source(path)
    if isinstance(source, Path) or not hub.is_repository(name):
        raise ValueError(
            f"{name[:300]} does not exist; a repository on a hub is named owner/name, a file of it owner/name/FILE"
        )
    return open_source(hub.fetch(name, revision), name)


def gather(found: Recognised, source: Source, settings: Mapping[str, Any]) -> Gathered:
    """The configuration's fields from the source and the user."""
    shapes = {name: tensor.shape for name, tensor in found.tensors.items()}
    trained, _ = mapping.resolve_ties(found)
    shapes |= {name: tensor.shape for name, tensor in trained.items()}
    return configuration.gather(found, source.config, settings, shapes)


@contextlib.contextmanager
def staging(directory: Path) -> Iterator[Path]:
    """A folder that takes the name ``directory`` when the block ends, and is removed when it fails.

    It is made inside a hidden one beside ``directory``, with the lock that tells other imports that this one is alive.
    """
    created = [p for p in (directory.parent, *directory.parent.parents) if not p.exists()]
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        _remove_left_overs(directory)
        with _locked_folder(directory) as hidden:
            folder = hidden / STAGED
            folder.mkdir()  # with the usual mode, where the hidden one is its owner's alone
            yield folder
            with _opened(folder) as descriptor:
                os.fsync(descriptor)
            try:
                folder.rename(directory)
            except OSError as e:
                raise ValueError(f"{directory} appeared while this import was running ({e.strerror})") from None
    except BaseException:
        for parent in created:
            with contextlib.suppress(OSError):
                parent.rmdir()
        raise


def _check_out(directory: Path) -> None:
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise ValueError(f"--out {directory} is there already and no directory: choose another name")
    if directory.is_dir() and any(directory.iterdir()):
        raise ValueError(f"--out {directory} is not empty; nothing is overwritten: choose another, or remove it first")


@contextlib.contextmanager
def _locked_folder(directory: Path) -> Iterator[Path]:
    """A hidden folder beside ``directory``, gone when the block ends, with a lock that is held until then."""
    folder = Path(tempfile.mkdtemp(prefix=f".{directory.name}.partial-", dir=directory.parent))
    try:
        with _opened(folder / LOCK, os.O_RDWR | os.O_CREAT) as descriptor:
            with contextlib.suppress(OSError):  # a disk without locks: the folder is never taken for a left-over
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left_overs(directory: Path) -> None:
    """Of imports that were killed: nobody holds their lock. Process ids tell nothing, containers repeat them."""
    for path in directory.parent.iterdir():
        if not path.name.startswith(f".{directory.name}.partial-") or not path.is_dir():
            continue
        try:
            # An import that is starting has not locked its folder yet.
            if time.time() - path.stat().st_mtime < STARTING and not (path / STAGED).exists():
                continue
            with _opened(path / LOCK, os.O_RDWR) as descriptor:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:
            shutil.rmtree(path, ignore_errors=True)
        except OSError:  # it is locked, or somebody else's
            continue


@contextlib.contextmanager
def _opened(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Any]:
    from tqdm import tqdm

    # None: only on a terminal.
    with tqdm(total=total, desc="weights", unit="B", unit_scale=True, leave=False,
              disable=None if total > LARGE else True) as bar:  # fmt: skip
        yield bar.update


def _reader(found: Recognised) -> Any:
    return lambda name: found.tensors[name].read() if name in found.tensors else None


def _ends(found: Recognised, source: Source, config: Any, tokenizer: Any) -> dict[str, Any]:
    """Sets the configuration's token ids, and returns the generation settings.

    Published models of GPT-2's vocabulary end at 50256; of others nothing is known but what their files say. Ids beyond
    the vocabulary would make every request fail, so they are left out.
    """
    given = source.config or {}

    def fits(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < config.vocab_size

    def valid(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [v for v in value if fits(v)] or None
        return value if fits(value) else None

    end, pad = valid(given.get("eos_token_id")), valid(given.get("pad_token_id"))
    if end is None and config.vocab_size in found.layout.tokenizers:
        end = valid(50256)
    if tokenizer is not None:
        end = valid(tokenizer.eos_token_id) if tokenizer.eos_token_id is not None else end
        pad = valid(tokenizer.pad_token_id) if tokenizer.pad_token_id is not None else pad
    config.bos_token_id, config.eos_token_id, config.pad_token_id = valid(given.get("bos_token_id")), end, None
    generation: dict[str, Any] = {"eos_token_id": end, "pad_token_id": pad}
    path = source.folder / "generation_config.json"
    if found.ours and path.exists():
        # Written by us: sampling that the model is meant to be used with.
        known = read_json(path)
        generation |= {k: known[k] for k in ("do_sample", "temperature", "top_p", "top_k") if k in known}
        generation |= {k: valid(known[k]) for k in ("eos_token_id", "pad_token_id") if valid(known.get(k)) is not None}
    return generation


def _write_rest(folder: Path, found: Recognised, config: Any, generation: Mapping[str, Any], tokenizer: Any) -> None:
    """All but the weights: configurations, tokenizer and fingerprint."""
    from transformers import GenerationConfig

    config.architectures, config.dtype = [found.arch.hf_name], "float32"
    config.save_pretrained(folder)
    try:
        GenerationConfig(**generation).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    except OSError:
        raise
    except Exception as e:  # the libraries raise plain exceptions, of a full disk too
        raise OSError(f"cannot write the tokenizer or generation_config.json: {' '.join(str(e).split())[:300]}") from e
    fingerprint.record(load_mapped(found.arch, config, folder / WEIGHTS), folder)
