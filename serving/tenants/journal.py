"""What a worker writes down, so that it survives the worker: records in files that are mapped into its memory.

An append is a copy into memory. The kernel has the record from then on, whatever happens to the process; the keeper
makes it survive the machine, too. Each file ("segment") is allocated whole by a thread before it is needed, so that a
full disk is an error in that thread and neither a wait nor a SIGBUS. Its owner holds a lock on it: one without is
complete, because its owner has ended or has gone on to the next.

A segment starts with ``MAGIC``; a record is its length and its CRC-32, as little-endian 32-bit numbers, and itself.
Zeros follow. A position is a number of bytes from the segment's start.
"""

import contextlib
import fcntl
import mmap
import os
import struct
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Self
from uuid import uuid4

SUFFIX = ".journal"
MAGIC = b"MAJ1\0\0\0\0"
SEGMENT = 2**20  # bytes
RESERVE = 4  # part of a segment, the last 1/4, for the records of running requests while there is no next one
MOST_WAITING = 2**22  # bytes of records that wait in memory for a segment
RETRY = 1.0  # seconds between attempts to get a segment
UNNAMED = 60.0  # seconds after which a segment that its owner did not finish is rubbish
_HEADER = struct.Struct("<II")


class Journal:
    """One worker's journal. Not for use from several threads; a forked child loses it.

    Args:
        folder: of the segments; it must exist.
        size: of each segment, in bytes.

    Attributes:
        room: whether requests may be taken. False while the disk is full or slow: what is left of the segment is for
            those that are being answered. Beyond that, records wait in memory, and a crash would lose them.

    Raises:
        OSError: there is no room for the first segment.
    """

    def __init__(self, folder: Path, size: int = SEGMENT) -> None:
        self._folder, self._size, self._name, self._count = folder, size, uuid4().hex, 0
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._preparing: threading.Thread | None = None
        self._retry_at = 0.0
        self._closing = self._forgotten = False
        self._reserve = size - size // RESERVE  # where it begins
        self.room = True
        self._next: _Segment | None = None
        self._segment: _Segment | None = self._create()
        self._map, self._position = self._segment.map, len(MAGIC)
        self._prepare()
        _forget_in_children(self)

    def append(self, line: bytes) -> bool:
        """Writes a record down; returns False if it is lost: too many wait, or the disk is full at the end."""
        start = self._position
        end = start + 8 + len(line)
        if end > self._reserve or self._waiting:
            return self._append_late(line)
        self._map[start:end] = _HEADER.pack(len(line), zlib.crc32(line)) + line
        self._position = end
        return True

    def tick(self) -> None:
        """Gets what is missing. To be called a few times a second."""
        self._write_waiting()
        self._mend()
        if self._next is None:
            self._prepare()

    def close(self) -> None:
        """Writes what waits, if there is room, and gives the files up. Waits for the disk."""
        self._closing = True
        if self._preparing is not None:
            self._preparing.join(RETRY)
        while self._waiting:
            left = len(self._waiting)
            if self._next is None:
                try:
                    self._next = self._create()
                except OSError:
                    break
            self._write_waiting()
            if len(self._waiting) == left:
                break
        self._give_up()

    def _append_late(self, line: bytes) -> bool:
        if self._forgotten or self._waiting_bytes + len(line) > MOST_WAITING:
            return False
        if self._closing and self._next is None:  # of a request that ended after all: nobody waits for this thread
            try:
                self._next = self._create()
            except OSError:
                return False
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._write_waiting()
        return True

    def _write_waiting(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            end = self._position + 8 + len(line)
            if end > self._size:
                if len(MAGIC) + 8 + len(line) > self._size:
                    raise ValueError(f"a record of {len(line)} bytes is too long for a journal")
                if self._next is None:
                    self._prepare()
                    break
                if self._segment is not None:
                    self._segment.close()
                self._segment, self._next = self._next, None
                self._map, self._position = self._segment.map, len(MAGIC)
                self._prepare()
                continue
            self._map[self._position : end] = _HEADER.pack(len(line), zlib.crc32(line)) + line
            self._position = end
            self._waiting_bytes -= len(self._waiting.popleft())
        self.room = not self._waiting and (self._next is not None or self._position <= self._reserve)

    def _mend(self) -> None:
        """Where somebody has removed the segment's file, writes it again: under its name, so that nothing that was
        read before counts twice."""
        segment, following = self._segment, self._next
        if segment is None or following is None:
            return
        if _is_gone(following.path):
            following.close()
            self._next = None
        elif _is_gone(segment.path):
            with contextlib.suppress(OSError):
                following.path.rename(segment.path)  # first: under the other name its records would be new
                following.path = segment.path
                following.map[: self._position] = segment.map[: self._position]
                segment.close()
                self._segment, self._next, self._map = following, None, following.map

    def _prepare(self) -> None:
        """Has the next segment made, unless that has just failed."""
        idle = self._preparing is None or not self._preparing.is_alive()
        if idle and not self._closing and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + RETRY
            self._preparing = threading.Thread(target=self._create_next, name="journal", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread can be had now
                self._preparing.start()

    def _create_next(self) -> None:
        with contextlib.suppress(OSError):
            self._next = self._create()
            self._retry_at = 0.0

    def _create(self) -> "_Segment":
        self._count += 1
        return _Segment(self._folder / f"{self._name}-{self._count:06d}{SUFFIX}", self._size)

    def _give_up(self) -> None:
        for segment in (self._segment, self._next):
            if segment is not None:
                segment.close()
        self._segment = self._next = None
        self._position = self._size


class _Segment:
    """A new file of zeros, mapped and locked.

    Raises:
        OSError: it cannot be had.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        # Under another name until it is locked: it would look like one that its owner has given up.
        new = path.with_suffix(".new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(fd, 0, size)
            # Written as well: a page's first use would have to wait for the file system's own journal.
            block = bytes(2**16)
            for at in range(0, size, len(block)):
                os.pwrite(fd, block[: size - at], at)
            os.fdatasync(fd) if hasattr(os, "fdatasync") else os.fsync(fd)
            self.map = mmap.mmap(fd, size)  # with a descriptor of its own, which keeps the lock
            self.map[: len(MAGIC)] = MAGIC
            new.rename(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)

    def close(self) -> None:
        self.map.close()


def _is_gone(path: Path) -> bool:
    try:
        path.stat()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return False


def _forget_in_children(journal: Journal) -> None:
    reference = weakref.ref(journal)

    def forget() -> None:
        if (found := reference()) is not None:
            found._forgotten = True
            found._give_up()

    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=forget)


class JournalFile:
    """A segment, as its reader sees it; a context manager.

    Attributes:
        id: its name.
        complete: nothing will be added to it. Look at this before reading what may be its last records.

    Raises:
        OSError: it is gone, or may not be read.
    """

    def __init__(self, path: Path) -> None:
        self.id, self.path = path.name, path
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._complete = False

    @property
    def complete(self) -> bool:
        if not self._complete:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                self._complete = True
        return self._complete

    def read(self, position: int, limit: int = 2**18) -> tuple[list[bytes], list[int]]:
        """Whole records from a position on, about ``limit`` bytes of them at most.

        Returns:
            The records, and the position after each. None: there is nothing new, or the next was torn: its owner is
            writing it now or, if the file is complete, has died meanwhile, and it does not count.
        """
        position = max(position, len(MAGIC))
        # Most looks find nothing, so they read little.
        head = os.pread(self._fd, _HEADER.size, position)
        if len(head) < _HEADER.size or not any(head):
            return [], []
        data = os.pread(self._fd, max(limit, _HEADER.size + _HEADER.unpack(head)[0] % SEGMENT), position)
        lines, ends = [], []
        for line, end in frames(data):
            lines.append(line)
            ends.append(position + end)
        return lines, ends

    def sync(self) -> None:
        """Has the disk keep what has been read."""
        os.fdatasync(self._fd) if hasattr(os, "fdatasync") else os.fsync(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)


def remove(path: Path) -> None:
    """Deletes a segment for good: it will not be back after a power failure. Raises OSError."""
    path.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def frames(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Whole records at the start of ``data``, and where each ends."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, crc = _HEADER.unpack_from(data, at)
        line = data[at + _HEADER.size : at + _HEADER.size + length]
        if not length or len(line) < length or zlib.crc32(line) != crc:
            break
        at += _HEADER.size + length
        yield line, at


def segments(folder: Path) -> list[Path]:
    """Those of a folder, the oldest of each worker first. Removes what was never finished.

    Raises:
        OSError: it cannot be read.
    """
    found = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                found.append(Path(entry.path))
            elif entry.name.endswith(".new"):
                with contextlib.suppress(OSError):
                    if time.time() - entry.stat().st_mtime > UNNAMED:
                        os.unlink(entry.path)
    return sorted(found)
