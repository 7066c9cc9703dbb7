"""The tensors of a file, by name, without having read them: shape, dtype, and a way to read one at a time."""

import ctypes
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Elements that are converted, checked and written at a time: 16 MiB in float32.
PIECE = 4 * 2**20
_MADV_DONTNEED = 4


@dataclass(frozen=True)
class Stored:
    """One tensor of a file.

    Attributes:
        name: as in the file, prefix and all.
        read: returns it; a view of the mapped file where ``mapped``, which costs no memory until it is used.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    read: Callable[[], Tensor]
    mapped: bool

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Weights:
    """What one or several weight files hold.

    Attributes:
        format: what the file is, in words.
        files: the files, in order.
        stored: name in the file -> tensor.
        aliases: further names, which the file only says are equal to a stored one.
        config: the configuration inside a training dictionary, as it is there.
        extras: what else a training dictionary holds.
    """

    format: str
    files: tuple[Path, ...]
    stored: Mapping[str, Stored]
    aliases: Mapping[str, str] = field(default_factory=dict)
    config: Any = None
    extras: tuple[str, ...] = ()


def pieces(stored: Stored, start: int, stop: int) -> Iterator[Tensor]:
    """Rows ``start`` to ``stop`` of a tensor in float32, as flat pieces of at most ``PIECE`` elements (or one row).

    Raises:
        ValueError: an element is not a finite number.
    """
    tensor = stored.read()[start:stop]
    if tensor.is_contiguous():
        parts: Iterator[Tensor] = iter(tensor.view(-1).split(PIECE))
    else:
        row = max(1, tensor[0].numel())
        parts = iter(tensor.split(max(1, PIECE // row)))
    for part in parts:
        piece = part.to(torch.float32).contiguous().view(-1)
        if not bool(torch.isfinite(piece).all()):
            bad = piece[~torch.isfinite(piece)][0].item()
            raise ValueError(
                f"{stored.name} in {stored.path} has elements that are no finite numbers in float32 (the first is "
                f"{bad}): the training diverged, or the file is damaged; use an earlier checkpoint"
            )
        yield piece
        if stored.mapped:
            release(part)


def release(tensor: Tensor) -> None:
    """Gives back the memory of a view of a mapped file; its pages are read from the file again when needed.

    Without it, a file that is read once through is in memory as a whole at the end. Only for mapped files: other memory
    would lose its content.
    """
    if not tensor.numel():
        return
    length = (sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * tensor.element_size()
    start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    libc = ctypes.CDLL(None, use_errno=True)
    # A failure costs memory and nothing else.
    libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(tensor.data_ptr() + length - start), _MADV_DONTNEED)
