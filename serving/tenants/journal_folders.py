"""Where gateways keep their journals: a folder for each, below ``home/journal``.

A folder is locked by its gateway for as long as that lives. What a dead one has left is taken over by another that
works with the same store; its folder's name says which.
"""

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from uuid import uuid4

YOUNG = 5.0  # seconds in which a folder's maker may not have locked it yet


class JournalFolder:
    """A folder that is locked here."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path, self._fd = path, fd

    def renew(self) -> None:
        """Makes it again, if somebody has removed it. Raises OSError."""
        with contextlib.suppress(FileExistsError):
            self.path.mkdir(mode=0o700, parents=True)
            again = _lock(self.path)
            if again is None:
                raise OSError(errno.EBUSY, "another gateway has taken it")
            os.close(self._fd)
            self._fd = again._fd

    def release(self) -> None:
        """Gives it up, and removes it if there is no journal in it."""
        with contextlib.suppress(OSError):
            for unfinished in self.path.glob("*.new"):
                unfinished.unlink()
            self.path.rmdir()
        os.close(self._fd)


def create(root: Path, store: str) -> JournalFolder:
    """A new one.

    Args:
        store: id of the store.

    Raises:
        OSError: it cannot be made.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    while True:
        path = root / f"{store}-{uuid4().hex}"
        path.mkdir(mode=0o700)
        if (folder := _lock(path)) is not None:
            return folder


def adopt(root: Path, store: str) -> list[JournalFolder]:
    """Those of gateways that have ended."""
    found = []
    with contextlib.suppress(OSError):
        for path in sorted(root.glob(f"{store}-*")):
            with contextlib.suppress(OSError):
                if time.time() - path.stat().st_mtime > YOUNG or any(path.iterdir()):
                    folder = _lock(path)
                    if folder is not None:
                        found.append(folder)
    return found


def journals(root: Path) -> set[str]:
    """Names of all that there are, of living gateways and dead ones, of any store. Raises OSError."""
    return {name for folder in os.scandir(root) if folder.is_dir() for name in os.listdir(folder)}


def _lock(path: Path) -> JournalFolder | None:
    """None: somebody else has it, or it has gone."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        here, there = os.fstat(fd), os.stat(path)
        if (here.st_ino, here.st_dev) != (there.st_ino, there.st_dev):
            raise FileNotFoundError
    except OSError:
        os.close(fd)
        return None
    return JournalFolder(path, fd)
