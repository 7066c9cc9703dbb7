"""Writes a safetensors file tensor by tensor; the library's own function wants all of them in memory at once."""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

from modeling.importing.mapping import Target
from modeling.importing.weights import pieces

FLOAT32 = 4


def size(targets: list[Target]) -> int:
    """Bytes of all tensors in float32."""
    return sum(target.elements for target in targets) * FLOAT32


def check_space(folder: Path, targets: list[Target]) -> None:
    """
    Raises:
        OSError: the disk has too little space left.
    """
    free = shutil.disk_usage(folder).free
    if free < size(targets):
        raise OSError(
            f"{folder} is on a disk with {free / 1e9:.2f} GB left, and the weights take {size(targets) / 1e9:.2f} GB: "
            "free some space, or choose another --out"
        )


def write(path: Path, targets: list[Target], progress: Callable[[int], object] = lambda count: None) -> None:
    """Writes the targets in float32.

    Args:
        progress: called with the number of bytes after each piece.

    Raises:
        ValueError: an element is no finite number.
        OSError: the disk is full; see :func:`explained`.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for target in targets:
        end = offset + target.elements * FLOAT32
        header[target.name] = {"dtype": "F32", "shape": list(target.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that tensors begin at a multiple of 8
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for target in targets:
            rows = target.shape[0]
            for piece in pieces(target.source, target.first_row, target.first_row + rows):
                f.write(piece.numpy().data.cast("B"))
                progress(piece.numel() * FLOAT32)
        f.flush()
        os.fsync(f.fileno())


def explained(error: OSError, folder: Path, needed: int) -> OSError:
    """The error in words, where it says that no more can be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return OSError(
            f"the disk of {folder} is full: the checkpoint takes {needed / 1e9:.3f} GB; free some space, or choose "
            "another --out"
        )
    if error.errno == errno.EFBIG:
        return OSError(
            f"a file of {needed / 1e9:.3f} GB is larger than this process or the disk of {folder} allows (ulimit -f); "
            "raise the limit, or choose another --out"
        )
    return error
