"""LoRA adapters in PEFT's layout: does one fit a checkpoint, so that every tensor of it is applied?

    W' = W + scaling * B @ A        A: (rank, in)   B: (out, rank)   (Hu et al. 2021)

vLLM loads what it recognises of an adapter and leaves out the rest without a word. So all of it is checked beforehand,
against the shapes in the headers of the checkpoint's files. Standard library only: no tensor is computed with.

    adapter_config.json        peft_type, r, lora_alpha, target_modules, ...
    adapter_model.safetensors  base_model.model.MODULE.lora_A.weight, ....lora_B.weight
"""

import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
# Linear layers' matrices end in ".weight"; those of embeddings do not.
_MATRIX = re.compile(r"(?P<module>.+)\.lora_(?:(?P<side>[AB])\.weight|(?P<embedding>embedding_)[AB])")
_LONGEST_HEADER = 100 * 2**20  # bytes, as in the safetensors library

# Settings of PEFT under which an adapter computes something else than the formula above, and what they mean.
_REFUSED = {
    "use_dora": "DoRA rescales the adapted weights",
    "lora_bias": "its B matrices have biases",
    "modules_to_save": "it replaces whole modules",
    "trainable_token_indices": "it replaces embeddings of single tokens",
    "layer_replication": "it repeats layers",
    "alora_invocation_tokens": "it is active only after certain tokens (activated LoRA)",
    "use_bdlora": "its matrices are block-diagonal (BD-LoRA)",
    "use_qalora": "it pools its inputs (QA-LoRA)",
    "target_parameters": "it adapts parameters other than a layer's weight",
    "megatron_config": "it was trained on Megatron's layers",
    "arrow_config": "it routes between several adapters",
}
# Initial values that also change the base weights when PEFT loads the adapter.
_CHANGES_BASE = ("pissa", "olora", "loftq", "corda")


@dataclass(frozen=True)
class Adapter:
    """An adapter that fits its checkpoint.

    Attributes:
        directory: where it lies.
        rank: the largest that its configuration names, r or one of rank_pattern: vLLM asks for room for that, even
            where no matrix has it.
        modules: last parts of the names of the modules it changes, such as ``("k_proj", "q_proj")``.
        silent: full names of modules whose B is all zeros; the adapter changes nothing there.
        changes: whether any B is not all zeros.
    """

    directory: Path
    rank: int
    modules: tuple[str, ...]
    silent: tuple[str, ...]
    changes: bool


@dataclass(frozen=True)
class Entry:
    """A tensor in a file's header: its shape, and where its bytes lie in the file."""

    shape: tuple[int, ...]
    begin: int
    end: int


def read(directory: Path, base: Path) -> Adapter:
    """Checks an adapter against the checkpoint directory ``base`` that it is to change.

    Raises:
        ValueError: it does not fit, or is not a plain LoRA adapter; the message names the tensor or the setting.
    """
    config = _read_config(directory)
    entries = header(directory / WEIGHTS)
    matrices = _matrices(base)
    pairs = _pairs(directory, entries, matrices)
    _check_targets(directory, config, set(pairs), matrices)
    silent = []
    with (directory / WEIGHTS).open("rb") as f:
        for module, (a, b) in pairs.items():
            _check_shapes(directory, config, module, entries[a], entries[b], matrices[module])
            if _all_zero(f, entries[b]):
                silent.append(module)
    return Adapter(
        directory,
        max([config["r"], *(config.get("rank_pattern") or {}).values()]),
        tuple(sorted({module.rpartition(".")[2] for module in pairs})),
        tuple(silent),
        len(silent) < len(pairs),
    )


def header(path: Path) -> dict[str, Entry]:
    """Names, shapes and places of the tensors in a safetensors file.

    Raises:
        ValueError: no such file, or it is damaged.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            if length > min(size - 8, _LONGEST_HEADER):
                raise ValueError("its header is longer than the file")
            content = json.loads(f.read(length))
        entries = {}
        for name, entry in content.items():
            if name == "__metadata__":
                continue
            begin, end = (8 + length + int(offset) for offset in entry["data_offsets"])
            if not 8 + length <= begin <= end <= size:
                raise ValueError(f"{name} lies outside the file")
            entries[name] = Entry(tuple(int(n) for n in entry["shape"]), begin, end)
    except FileNotFoundError:
        raise ValueError(f"there is no {path}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, struct.error) as e:
        raise ValueError(f"{path} is damaged or no safetensors file ({e})") from None
    return entries


def _read_config(directory: Path) -> dict[str, Any]:
    path = directory / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{directory} is not an adapter: it has no {CONFIG}") from None
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is damaged: {e}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a JSON object")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {config.get('peft_type')!r}; only LORA can be served")
    for field, meaning in _REFUSED.items():
        if config.get(field):
            raise ValueError(f"{path}: {field} is set: {meaning}. Merge such an adapter into the checkpoint instead")
    if config.get("bias", "none") != "none":
        raise ValueError(f"{path}: bias is {config['bias']!r}: it changes biases, which cannot be served; merge it")
    initial = config.get("init_lora_weights", True)
    if isinstance(initial, str) and initial.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"{path}: init_lora_weights is {initial!r}, so the adapter belongs to changed base weights: convert it "
            "with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    for field, kind in (("r", int), ("lora_alpha", int | float)):
        value = config.get(field)
        if not isinstance(value, kind) or isinstance(value, bool) or value <= 0:
            raise ValueError(f"{path}: {field} must be a number above 0, got {value!r}")
    for field in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(field) or {}, dict):
            raise ValueError(f"{path}: {field} must be an object")
    for pattern, rank in (config.get("rank_pattern") or {}).items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank <= 0:
            raise ValueError(f"{path}: rank_pattern must give {pattern!r} a whole number above 0, got {rank!r}")
    if not (directory / WEIGHTS).exists() and (directory / "adapter_model.bin").exists():
        raise ValueError(f"{directory} holds adapter_model.bin, a pickle: save the adapter as {WEIGHTS}")
    return config


def _matrices(base: Path) -> dict[str, tuple[int, ...]]:
    """Module -> shape (out, in) of its weight, for every matrix of a checkpoint."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(base.glob("*.safetensors")):
        for name, entry in header(path).items():
            if name.endswith(".weight") and len(entry.shape) == 2:
                found[name.removesuffix(".weight")] = entry.shape
    if not found:
        raise ValueError(f"{base} holds no weights in safetensors, so nothing tells what the adapter would change")
    return found


def _pairs(
    directory: Path, entries: Mapping[str, Entry], matrices: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[str, str]]:
    """Module -> names of its A and B. Every tensor must be one of them."""
    path = directory / WEIGHTS
    sides: dict[str, dict[str, str]] = {}
    for name in entries:
        found = _MATRIX.fullmatch(name)
        if not found:
            hint = " (part of DoRA)" if "lora_magnitude_vector" in name else ""
            raise ValueError(f"{path}: {name}{hint} is no LoRA matrix; nothing would apply it")
        module = found["module"].removeprefix(PREFIX)
        _check_module(path, name, module, matrices)
        if found["embedding"]:
            raise ValueError(f"{path}: {name} is not how PEFT lays out an adapter of {module}")
        sides.setdefault(module, {})[found["side"]] = name
    if not sides:
        raise ValueError(f"{path} holds no tensors")
    for module, pair in sides.items():
        for side, other in (("A", "B"), ("B", "A")):
            if side not in pair:
                raise ValueError(f"{path}: {pair[other]} has no partner: the {side} matrix of {module} is missing")
    return {module: (pair["A"], pair["B"]) for module, pair in sides.items()}


def _check_module(path: Path, name: str, module: str, matrices: Mapping[str, tuple[int, ...]]) -> None:
    if module == HEAD:
        raise ValueError(
            f"{path}: {name} adapts the head, which the engine can do only for the tokens that it samples, not for "
            "those of a prompt: merge the adapter into the checkpoint, or train it without lm_head"
        )
    if module == EMBEDDING:
        raise ValueError(
            f"{path}: {name} adapts the embedding, which the engine cannot do for each request apart (and where it is "
            "the head too, would do only half): merge the adapter into the checkpoint, or train it without embed_tokens"
        )
    if module in matrices and _in_a_layer(module):
        return
    hint = ""
    if f"model.{module}" in matrices:
        hint = f"; it was trained on the model without its head: rename it to {PREFIX}model.{module}..."
    elif "_orig_mod." in name:
        hint = "; it was trained on a compiled model: take '_orig_mod.' out of its tensors' names"
    elif len(parts := sorted({m.rpartition(".")[2] for m in matrices if ".layers." in m})) < 20:
        hint = f"; layers have {', '.join(parts)}"
    raise ValueError(f"{path}: {name} names no projection of this model{hint}")


def _check_targets(
    directory: Path, config: Mapping[str, Any], modules: set[str], matrices: Mapping[str, tuple[int, ...]]
) -> None:
    """The configuration and the file must speak of the same modules: what is missing was lost on the way."""
    path, targets = directory / CONFIG, config.get("target_modules")
    missing: list[str] = []
    if targets == "all-linear":
        # PEFT leaves out the head; the embedding is no linear layer.
        selected = {m for m in matrices if _in_a_layer(m)}
    elif isinstance(targets, str):
        selected = {m for m in matrices if _matches(targets, m)}
    elif isinstance(targets, list) and all(isinstance(t, str) for t in targets):
        selected = {m for m in matrices if any(_is_or_ends_with(m, t) for t in targets)}
        missing = [t for t in targets if not any(_is_or_ends_with(m, t) for m in modules)]
    else:
        raise ValueError(f"{path}: target_modules must be a list of names or a pattern")
    extra = sorted(modules - selected)
    if not any(config.get(key) for key in ("layers_to_transform", "layers_pattern", "exclude_modules")):
        missing = missing or sorted(selected - modules)
    if missing:
        raise ValueError(f"{path}: target_modules asks for {missing[0]}, but {WEIGHTS} has no tensors for it")
    if extra:
        raise ValueError(f"{path}: {WEIGHTS} has tensors for {extra[0]}, which is not among target_modules")


def _in_a_layer(module: str) -> bool:
    return re.search(r"\.layers\.\d+\.", module) is not None


def _is_or_ends_with(module: str, target: str) -> bool:
    return module == target or module.endswith("." + target)


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error as e:
        raise ValueError(f"{pattern!r} in {CONFIG} is no regular expression: {e}") from None


def _check_shapes(
    directory: Path, config: Mapping[str, Any], module: str, a: Entry, b: Entry, weight: tuple[int, ...]
) -> None:
    """One module's matrices must have the rank that the configuration gives it."""
    # As in PEFT: the first pattern that matches the name, or its end after a dot.
    patterns = config.get("rank_pattern") or {}
    rank = next((r for p, r in patterns.items() if _matches(rf"(.*\.)?({p})", module)), config["r"])
    out, columns = weight
    if a.shape != (rank, columns) or b.shape != (out, rank):
        raise ValueError(
            f"{directory / WEIGHTS}: the matrices of {module} are A {a.shape} and B {b.shape}; at rank {rank} "
            f"({CONFIG}) they must be {(rank, columns)} and {(out, rank)}: the adapter was made for another model, or "
            "its r is wrong"
        )


def _all_zero(file: BinaryIO, entry: Entry) -> bool:
    file.seek(entry.begin)
    left = entry.end - entry.begin
    while left > 0:
        chunk = file.read(min(left, 2**20))
        if not chunk or chunk.count(0) != len(chunk):
            return False
        left -= len(chunk)
    return True
