"""Files of ``torch.save``: training dictionaries and state dictionaries. Nothing in them is ever executed.

torch's restricted unpickler builds tensors and plain containers and refuses everything else by name.
"""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modeling.importing.weights import Stored, Weights

# What training dictionaries call the weights.
STATE_KEYS = ("model_state_dict", "state_dict", "model")
CONFIG_KEYS = ("config", "model_config")
# The structure of a file with thousands of tensors takes less than a megabyte; tensors lie beside it.
LARGEST_STRUCTURE = 64 * 2**20


def read(path: Path) -> Weights:
    """The tensors of a file, mapped where the format allows it (since PyTorch 1.6).

    Raises:
        ValueError: the file is damaged or holds something else than tensors; the message names it.
    """
    mapped = zipfile.is_zipfile(path)
    if mapped:
        _check_archive(path)
    elif _begins_as_archive(path):
        raise ValueError(f"{path} is cut off: it begins as a file of torch.save, but its table of contents is missing")
    content = _load(path, mapped)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {_a(content)}, not a dictionary of tensors: save model.state_dict()")
    key = next((k for k in STATE_KEYS if isinstance(content.get(k), dict)), None)
    state, format = content if key is None else content[key], "state dictionary (torch.save)"
    config: Any = None
    extras: tuple[str, ...] = ()
    if key is not None:
        format, config = f"training dictionary (torch.save, weights under {key!r})", None
        config_key = next((k for k in CONFIG_KEYS if content.get(k) is not None), None)
        config = None if config_key is None else content[config_key]
        extras = tuple(str(k)[:80] for k in content if k not in (key, config_key))
    if not state:
        raise ValueError(f"{path}: {'the file' if key is None else key} holds no tensors")
    stored: dict[str, Stored] = {}
    for name, value in state.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} has an entry called {str(name)[:80]!r}, and names of tensors must be strings")
        if not isinstance(value, Tensor):
            raise ValueError(
                f"{path}: {name[:200]!r} is {_a(value)}, not a tensor; a state dictionary holds tensors alone. Save "
                "model.state_dict(), or a dictionary with it under 'model_state_dict' and the sizes under 'config'"
            )
        stored[name] = _stored(path, name, value.detach(), mapped)
    return Weights(format, (path,), stored, config=config, extras=extras)


def _begins_as_archive(path: Path) -> bool:
    with path.open("rb") as f:
        return f.read(4) == b"PK\x03\x04"


def _check_archive(path: Path) -> None:
    """What the restricted unpickler does not look at: the archive itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, KeyError, IndexError) as e:
        raise ValueError(f"{path} is damaged: {e}") from e
    if packed := next((e.filename for e in entries if e.compress_type != zipfile.ZIP_STORED), None):
        raise ValueError(
            f"{path}: {packed!r} is compressed, which torch.save never does; unpacked it may be of any size. Save the "
            "weights again with torch.save"
        )
    if sum(e.file_size for e in entries) > path.stat().st_size:
        raise ValueError(f"{path} is damaged: its entries are larger than the file")
    structure = [e for e in entries if e.filename.rpartition("/")[2] == "data.pkl"]
    if len(structure) != 1:
        raise ValueError(f"{path} is an archive, but not one of torch.save (it has {len(structure)} data.pkl)")
    if structure[0].file_size > LARGEST_STRUCTURE:
        raise ValueError(f"{path}: {structure[0].filename} is too large to be the structure of a checkpoint")


def _load(path: Path, mapped: bool) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except pickle.UnpicklingError as e:
        raise ValueError(_refusal(path, str(e))) from None
    except Exception as e:  # a damaged pickle can make the unpickler raise nearly anything
        if "TorchScript" in str(e):
            raise ValueError(
                f"{path} is a TorchScript program, which could do anything when loaded: save model.state_dict()"
            ) from None
        first = str(e).strip().partition("\n")[0]
        raise ValueError(f"{path} is damaged or no file of torch.save: {type(e).__name__} ({first[:200]})") from None


def _refusal(path: Path, message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message) or re.search(r"[Cc]lass ([\w.]+)", message)
    if found is None:
        reason = message.strip().rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        return f"{path} is damaged or no file of torch.save ({reason[:200]})"
    return (
        f"{path} holds {found[1]}, and not just tensors: loading it could execute a program, so it is refused and "
        "nothing of it was executed. If the file is yours, load it where you trust it and save the weights alone: "
        "torch.save(model.state_dict(), ...)"
    )


def _stored(path: Path, name: str, tensor: Tensor, mapped: bool) -> Stored:
    where = f"{path}: {name}"
    if tensor.is_quantized or tensor.layout != torch.strided or tensor.device.type != "cpu":
        kind = "quantised" if tensor.is_quantized else f"{tensor.device.type}, {tensor.layout}"
        raise ValueError(f"{where} is not an ordinary tensor ({kind}): save the weights as dense tensors")
    reach = 1
    for stride, count in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if count > 1 and stride < reach:
            raise ValueError(
                f"{where} {tuple(tensor.shape)} is a smaller tensor whose elements are used several times (strides "
                f"{tensor.stride()}), as no trained weight is: the file is damaged"
            )
        reach = max(reach, stride * count)
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"{where} {tuple(tensor.shape)} is larger than what the file holds of it: the file is damaged")
    return Stored(name, tuple(tensor.shape), tensor.dtype, path, lambda: tensor, mapped)


def _a(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
