"""Which files of a folder hold the weights and the configuration, and reading them whatever their format."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modeling.importing import pickles, safetensor_files
from modeling.importing.weights import Stored, Weights

PICKLES = (".pt", ".pth", ".bin")
SUFFIXES = (".safetensors", *PICKLES)
INDEX = (".safetensors.index.json", ".bin.index.json")
# Files that trainers write beside the weights.
NO_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.(bin|pt|pth)")
PART = re.compile(r".*-of-\d+\.(safetensors|bin|pt|pth)")
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
          "tokenizer_manifest.json", "chat_template.jinja", "vocab.json", "merges.txt")  # fmt: skip
LARGEST_JSON = 64 * 2**20
# Configurations have a few dozen values, two or three deep.
DEEPEST, MOST_VALUES = 20, 100_000


@dataclass(frozen=True)
class Source:
    """A model's files.

    Attributes:
        name: as the user called it.
        folder: where the files beside the weights are.
        weights: what the weight files hold.
        config: the configuration as published, or None.
        config_origin: where it was found, in words.
    """

    name: str
    folder: Path
    weights: Weights
    config: dict[str, Any] | None
    config_origin: str


def open_source(path: Path, name: str | None = None) -> Source:
    """Opens a weight file, or a folder with one, and the configuration in or beside it.

    Raises:
        ValueError: files are missing, damaged, or there are several to choose from.
        OSError: a file cannot be read.
    """
    if path.is_dir():
        names = [p.name for p in path.iterdir() if not p.is_dir()]
        weights = read_weights(path / choose(names, str(path)))
        folder = path
    elif path.exists():
        weights, folder = read_weights(path), path.parent
    else:
        raise ValueError(f"{path} does not exist")
    if weights.config is not None:
        if not isinstance(weights.config, dict) or not all(isinstance(key, str) for key in weights.config):
            raise ValueError(f"{weights.files[0]}: 'config' is no dictionary of settings")
        _check_plain(weights.config, f"the configuration in {weights.files[0]}")
        return Source(name or str(path), folder, weights, weights.config, f"in {weights.files[0].name}")
    beside = folder / "config.json"
    config = read_json(beside) if beside.exists() else None
    _check_plain(config or {}, str(beside))
    return Source(name or str(path), folder, weights, config, "config.json" if config is not None else "none")


def choose(names: Iterable[str], where: str) -> str:
    """The name of the weight file, or of its index, among the files of a folder.

    Raises:
        ValueError: there is none, or there are several and nothing says which.
    """
    names = list(names)
    weights = [n for n in names if n.endswith((*SUFFIXES, *INDEX))]
    candidates = sorted(n for n in weights if not NO_WEIGHTS.fullmatch(n) and not PART.fullmatch(n))
    for standard in ("model.safetensors", "model.safetensors.index.json"):
        if standard in candidates:
            return standard
    adapters = [n for n in candidates if n.startswith("adapter_model.")]
    rest = [n for n in candidates if n not in adapters]
    safetensors = [n for n in rest if n.endswith((".safetensors", INDEX[0]))]
    if not safetensors:
        for standard in ("pytorch_model.bin", "pytorch_model.bin.index.json"):
            if standard in rest:
                return standard
    found = safetensors or rest
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(
            f"{where} holds several weight files, name the one you mean: {', '.join(found[:20])} "
            f"(such as {where}/{found[0]})"
        )
    if adapters:
        raise ValueError(f"{where} holds a LoRA adapter ({adapters[0]}), not a model: import the model it belongs to")
    if parts := sorted(n for n in names if PART.fullmatch(n)):
        raise ValueError(f"{where} holds parts of weights ({parts[0]}), but not the index that names them all")
    raise ValueError(f"{where} holds no weights (no file that ends in {', '.join(SUFFIXES)})")


def _check_plain(config: dict[str, Any], where: str) -> None:
    """Whatever reads a configuration later may rely on its values being what JSON has, and on their depth.

    Raises:
        ValueError: a value is a tensor or another object, or there are too many or too deep ones.
    """
    count = 0

    def check(value: Any, setting: str, depth: int) -> None:
        nonlocal count
        count += 1  # a pickle may hold one list many times, so that few bytes are values without end
        if depth > DEEPEST or count > MOST_VALUES:
            raise ValueError(
                f"{where}: {setting!r} is nested too deeply or has too many values to be a setting; correct it or "
                "remove it from the configuration"
            )
        if isinstance(value, dict):
            if not all(isinstance(key, str) for key in value):
                raise ValueError(f"{where}: {setting!r} has keys that are no strings; remove it from the configuration")
            value = value.values()
        elif not isinstance(value, list | tuple):
            if value is None or isinstance(value, bool | int | float | str):
                return
            raise ValueError(
                f"{where}: {setting!r} holds a {type(value).__name__}, and settings are numbers, strings, true or "
                "false, lists and dictionaries of these; correct it or remove it from the configuration"
            )
        for item in value:
            check(item, setting, depth + 1)

    for name, value in config.items():
        check(value, name[:80], 1)


def read_weights(path: Path) -> Weights:
    """Reads a weight file, or all that an index names, as what its first bytes say it is."""
    if path.name.endswith(INDEX):
        return _read_shards(path)
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    with path.open("rb") as f:
        head = f.read(64)
    if not head:
        raise ValueError(f"{path} is empty")
    if head.startswith(b"version https://git-lfs"):
        raise ValueError(f"{path} is a pointer of git-lfs, not the file itself: fetch it with `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise ValueError(f"{path} is a web page, not a weight file: the download went wrong")
    # A safetensors file begins with the length of its header, which is JSON.
    if head[8:9] == b"{" or path.suffix == ".safetensors":
        return safetensor_files.read(path)
    return pickles.read(path)


def shard_names(index: Path) -> list[str]:
    """The files that an index names, in order.

    Raises:
        ValueError: the index is damaged.
    """
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(n, str) for n in names.values()):
        raise ValueError(f"{index} has no weight_map from tensor names to files")
    files = sorted(set(names.values()))
    if outside := next((n for n in files if "/" in n or "\\" in n or n.startswith(".") or "\0" in n), None):
        raise ValueError(f"{index} names {outside!r}, which is no file beside it")
    return files


def _read_shards(index: Path) -> Weights:
    stored: dict[str, Stored] = {}
    aliases: dict[str, str] = {}
    paths = [index.with_name(name) for name in shard_names(index)]
    for path in paths:
        if not path.exists():
            raise ValueError(f"{path} is missing; {index.name} names it as one of {len(paths)} files of the weights")
        part = read_weights(path)
        if twice := sorted(set(part.stored) & set(stored)):
            raise ValueError(f"{twice[0]} is in two files: {stored[twice[0]].path} and {path}")
        stored |= part.stored
        aliases |= part.aliases
    for name, file in read_json(index)["weight_map"].items():
        if name not in stored and name not in aliases:
            raise ValueError(f"{name} is missing in {index.with_name(file)}, where {index.name} says it is")
    kind = "safetensors" if index.name.endswith(INDEX[0]) else "state dictionary (torch.save)"
    return Weights(f"{kind} in {len(paths)} files", tuple(paths), stored, aliases)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        ValueError: it is damaged, too large, or no object.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} is too large for what it should hold")
    try:
        content = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path} is nested too deeply to be what it should be") from None
    except ValueError as e:  # JSON, Unicode, and numbers of thousands of digits
        raise ValueError(f"{path} is no valid JSON: {str(e)[:200]}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object of settings")
    return content
