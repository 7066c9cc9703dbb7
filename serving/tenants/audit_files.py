"""What the files of the audit log are like: lines, days, the head. :mod:`serving.tenants.audit` writes them."""

import contextlib
import errno
import fcntl
import hmac
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import orjson

GENESIS = "0" * 64  # the hash before the first line
LOG_ID = "log_id"
HEAD_SIZE = 1024  # bytes, within a sector or two of one page: written in place, at once
LINE = re.compile(
    rb'(\{"sequence":(\d{1,18}),"time":"[^"]*","log":"([0-9a-f]{16})",.*)'
    rb',"previous":"([0-9a-f]{64})","hash":"([0-9a-f]{64})"\}'
)
_FILE = re.compile(r"audit-(\d{4}-\d{2}-\d{2})\.jsonl")
_BLOCK = 2**18


@dataclass(frozen=True, slots=True)
class Head:
    """Where the log ends and begins.

    Attributes:
        log: id of the log, 16 hexadecimal digits.
        sequence, hash: of its last line; 0 and :data:`GENESIS` before the first.
        day, end: the last line's file, and that file's size in bytes.
        removed_sequence, removed_hash, removed_day: the last line that retention has removed, and its file's day.
        missing: hash of the line that the store knew and the log did not have, which the log has been told.
    """

    log: str
    sequence: int = 0
    hash: str = GENESIS
    day: str = ""
    end: int = 0
    removed_sequence: int = 0
    removed_hash: str = GENESIS
    removed_day: str = ""
    missing: str = ""

    def pack(self, secret: bytes) -> bytes:
        body = orjson.dumps([getattr(self, name) for name in self.__dataclass_fields__])
        return (body + b" " + _mac_of_head(secret, body) + b"\n").ljust(HEAD_SIZE)

    @classmethod
    def read(cls, path: Path, secret: bytes) -> "Head | None":
        """None: there is none.

        Raises:
            ValueError: it was changed, or written with another secret.
        """
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        try:
            head = cls(*orjson.loads(content.partition(b" ")[0]))
        except (orjson.JSONDecodeError, TypeError):
            head = cls("")
        if not hmac.compare_digest(content, head.pack(secret)):
            raise ValueError(f"{path} was changed, or belongs to another store")
        return head


def _mac_of_head(secret: bytes, body: bytes) -> bytes:
    return hmac.digest(secret, b"head" + body, "sha256").hex().encode()


def hash_line(secret: bytes, day: str, previous: str, body: bytes) -> str:
    """``body``: the line up to ``,"previous"``."""
    return hmac.digest(secret, day.encode() + previous.encode() + body, "sha256").hex()


def whole(secret: bytes, day: str, line: bytes) -> "re.Match[bytes] | None":
    """The parts of a line of this store, without its end; None: it is not."""
    found = LINE.fullmatch(line)
    ours = found and hash_line(secret, day, found[4].decode(), found[1]) == found[5].decode()
    return found if ours else None


def name_of(day: str) -> str:
    return f"audit-{day}.jsonl"


def days(folder: Path) -> list[str]:
    """Of the files that there are, in order."""
    try:
        return sorted(found[1] for name in os.listdir(folder) if (found := _FILE.fullmatch(name)))
    except FileNotFoundError:
        return []


def home_log(folder: Path) -> str:
    """Which log is that of the home folder above, whatever ``folder`` holds: so ``log_id`` says, which is written once,
    beside ``folder``. Empty: nothing says so."""
    try:
        content = (folder.parent / LOG_ID).read_bytes()
    except FileNotFoundError:
        return ""
    return content.strip().decode() if re.fullmatch(rb"[0-9a-f]{16}\n", content) else ""


@contextlib.contextmanager
def locked(folder: Path, exclusive: bool = True, patience: float | None = None) -> Iterator[None]:
    """Waits for the log's lock.

    Args:
        patience: seconds; None: however long it takes.

    Raises:
        TimeoutError: somebody else has it for longer.
    """
    fd = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        how = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
        deadline = None if patience is None else time.monotonic() + patience
        while True:
            try:
                fcntl.flock(fd, how if deadline is None else how | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if deadline is None or time.monotonic() >= deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "another process has its lock") from None
            time.sleep(0.01)
        yield
    finally:
        os.close(fd)


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def ends_with_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def write_all(fd: int, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def backwards(path: Path) -> Iterator[bytes]:
    """A file's lines from the last to the first, without their ends."""
    with path.open("rb") as file:
        at = file.seek(0, os.SEEK_END)
        rest = b""
        while at:
            at, size = max(0, at - _BLOCK), min(at, _BLOCK)
            file.seek(at)
            lines = (file.read(size) + rest).split(b"\n")
            rest = lines[0]
            yield from reversed(lines[1:])
        if rest:
            yield rest
