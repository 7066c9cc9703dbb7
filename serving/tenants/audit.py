"""The audit log: who used what and when, in lines that nobody can change unseen.

``home/audit/audit-YYYY-MM-DD.jsonl`` (days in UTC) holds a JSON object a line: ``sequence``, ``time``, ``log`` (the
log's id), the event's own fields, ``previous`` and ``hash``. A hash is HMAC-SHA256, by the store's secret, of the
file's day, the hash before and the line: a line cannot be changed, removed, added, moved or taken to another day's
file without the secret. What a chain cannot tell by itself is where it begins and ends, and which it is. ``head`` says
so, under a MAC of its own; ``home/log_id`` says which log is this home's; and the store has a copy of the last line's
number and hash, which may lag behind, and which must be in the log (:meth:`AuditLog.compare`, and
:func:`serving.tenants.audit_verify.verify`).

An append is one write and one ``fdatasync`` for all its events, then the head in place. A process that dies in between
leaves whole lines that the head does not know, and at most one torn one: whole ones are kept, since nobody else could
have written them; the torn one is cut off; the event "audit.recovered" says so. Lines that the head, the store or the
process knows and the files do not have, or have otherwise, are no accident: the log goes on behind them, with
"audit.damaged", which the verifier reports for as long as it is kept.

Standard library and orjson only: the keeper imports this.
"""

import contextlib
import os
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from serving.tenants.audit_files import (
    LOG_ID,
    Head,
    backwards,
    days,
    ends_with_newline,
    hash_line,
    home_log,
    locked,
    name_of,
    size_of,
    sync_folder,
    whole,
    write_all,
)

if TYPE_CHECKING:
    import re

CHECKPOINT = 10_000  # lines after which the positions are repeated, so that a start need not read a whole day
RESERVED = frozenset(("sequence", "log", "previous", "hash"))
_POSITIONS = b'"event":"audit.positions"'
_NUMBER = b'{"sequence":'  # how a line begins


def today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(time.time()))


class AuditLog:
    """The log in a folder, which is made if need be. Several processes of a machine may append to one.

    Not for several threads at once.

    Args:
        secret: the store's.
        retention_days: after which a day's file is removed.
        patience: seconds to wait for others that have the log's lock, in each call; None: however long it takes.
        living: names of the journals that there are, whose positions are kept; None: all are, or it cannot be told.
    """

    def __init__(
        self, folder: Path, secret: bytes, retention_days: int, patience: float | None = None,
        living: Callable[[], Set[str] | None] = lambda: None,
    ) -> None:  # fmt: skip
        """
        Raises:
            OSError: the folder cannot be used; TimeoutError: somebody has the lock for too long.
        """
        self._patience, self._living = patience, living
        self._folder, self._secret, self._retention = folder, secret, retention_days
        self._head = Head("")
        self._marked = False  # whether home/log_id names this log
        self._anchor: tuple[int, str] | None = None  # a line that was found in the log
        self._positions: dict[str, int] = {}
        self._seen: tuple[str, int] | None = None  # day and end up to which the positions are known
        self._since_checkpoint = 0
        self._second = (-1, "")
        self._retained = ""  # the day on which old files were looked for
        with self._lock():
            head, events = self._current()
            self._write(head, events)
            self._retain()

    @property
    def head(self) -> tuple[int, str]:
        """Sequence and hash of the last line, as of the last append."""
        return self._head.sequence, self._head.hash

    @property
    def log_id(self) -> str:
        return self._head.log

    @property
    def positions(self) -> dict[str, int]:
        """Journal id -> offset up to which its records are in the log."""
        with self._lock(exclusive=False), contextlib.suppress(ValueError):
            self._catch_up(Head.read(self._folder / "head", self._secret) or self._head)
        return self._positions

    def forget(self, journals: Iterable[str]) -> None:
        """Journals that are removed: their positions need not be kept."""
        for journal in journals:
            self._positions.pop(journal, None)

    def append(self, events: Sequence[Mapping[str, Any]]) -> None:
        """Appends a line for each event: its name in ``event``, ``time`` in seconds since the epoch (now, if there is
        none), and fields with numbers and names. ``journal`` and ``offset`` move that journal's position.

        Raises:
            OSError: nothing was appended.
        """
        if not events:
            return
        with self._lock():
            head, found = self._current()
            self._write(head, [*found, *events])
            self._retain()

    def compare(self, stored: tuple[int, str] | None) -> bool:
        """Whether the last line that the store knows of this log is a line of it. If it is not, the log says so, once.

        Args:
            stored: its sequence and hash, read before the call; None: the store knows nothing of it.

        Raises:
            OSError: the log cannot be read, or not be written.
        """
        with self._lock():
            head, found = self._current()
            held = stored is None or stored == self._anchor or self._holds(head, *stored)
            if held:
                self._anchor = stored
            elif stored and head.missing != stored[1]:
                head = replace(head, missing=stored[1])
                found.append(_damaged(f"the line with number {stored[0]}, that the store knows, is not in it"))
            self._write(head, found)
        return held

    @contextlib.contextmanager
    def _lock(self, exclusive: bool = True) -> Iterator[None]:
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # also when somebody has removed it meanwhile
        with locked(self._folder, exclusive, self._patience):
            yield

    # All below with the lock held.

    def _current(self) -> tuple[Head, list[dict[str, Any]]]:
        """The head as the files are, and the events of what had to be mended, or is not as this process knows it."""
        head, events = self._on_disk()
        ours, known = home_log(self._folder), self._head
        self._marked = bool(ours)
        if not ours and head.sequence:
            events.append(_damaged(f"{LOG_ID} was removed or changed, which says which log is this home's"))
        elif ours and head.sequence and head.log != ours:
            events.append(_damaged(f"log {head.log} is in the place of log {ours}"))
        head = replace(head, log=ours or head.log)
        if known.sequence and not self._holds(head, known.sequence, known.hash):
            events.append(_damaged(f"the line with number {known.sequence}, that was the last one, is not in it"))
        if any(event["event"] == "audit.damaged" for event in events):
            self._anchor = self._seen = None
        return head, events

    def _holds(self, head: Head, sequence: int, digest: str) -> bool:
        """Whether a line is in the log, or was before retention."""
        if sequence == head.sequence:
            return digest == head.hash
        if sequence <= head.removed_sequence:
            return sequence < head.removed_sequence or digest == head.removed_hash
        if sequence > head.sequence:
            return False
        for day in reversed(days(self._folder)):
            for line in backwards(self._folder / name_of(day)):
                number = line[: len(_NUMBER) + 19].removeprefix(_NUMBER).partition(b",")[0]
                if number.isdigit() and int(number) <= sequence and (found := self._whole(day, line)):
                    return int(number) == sequence and found[5].decode() == digest
        return False

    def _on_disk(self) -> tuple[Head, list[dict[str, Any]]]:
        """The head as the files are, and the events of what had to be mended."""
        try:
            head = Head.read(self._folder / "head", self._secret)
        except ValueError:
            return self._new_head("the head was changed")
        if head is None:
            if not any(size_of(self._folder / name_of(day)) for day in days(self._folder)):
                return Head(secrets.token_hex(8)), []
            return self._new_head("the head was removed")
        fresh = self._retained and head.day >= today()  # only a new day can have begun without the head
        later = [] if fresh else [day for day in days(self._folder) if day > head.day]
        if size_of(self._folder / name_of(head.day)) == head.end and not any(
            size_of(self._folder / name_of(day)) for day in later
        ):
            return head, []
        return self._mended(head, later)

    def _new_head(self, what: str) -> tuple[Head, list[dict[str, Any]]]:
        """Goes on behind the last line that is ours."""
        head = Head(secrets.token_hex(8))
        for day in reversed(days(self._folder)):
            path = self._folder / name_of(day)
            for line in backwards(path):
                if found := self._whole(day, line):
                    head = Head(found[3].decode(), int(found[2]), found[5].decode(), day, size_of(path))
                    return head, [_damaged(what)]
        return head, [_damaged(f"{what}, and no line is of this store")]

    def _mended(self, head: Head, later: list[str]) -> tuple[Head, list[dict[str, Any]]]:
        """After an append that did not come to its end, or after somebody's hand."""
        start, kept, cut, what = head, 0, 0, ""
        for day in [head.day, *later] if head.day else later:
            path = self._folder / name_of(day)
            begin = start.end if day == start.day else 0
            size, before = size_of(path), head.sequence
            if size < begin:
                what = what or f"{path.name} is shorter than it was"
            elif size > begin:
                with path.open("rb") as file:
                    file.seek(begin)
                    for line in file:
                        found = self._whole(day, line.removesuffix(b"\n"))
                        if not line.endswith(b"\n") and _torn(line, head.sequence):
                            cut = len(line)
                        elif not found or not line.endswith(b"\n") or not _follows(found, head):
                            what = what or f"{path.name} holds lines that nobody of this store has written"
                        else:
                            head = replace(head, sequence=int(found[2]), hash=found[5].decode())
                            kept += 1
                if cut and not what:
                    os.truncate(path, size - cut)
            # What is nobody's, of a later day, must not become the file that all lines go to.
            if day == start.day or head.sequence > before:
                head = replace(head, day=day, end=size_of(path))
        if what:
            return head, [_damaged(what)]
        return head, [{"event": "audit.recovered", "lines": kept, "torn_bytes": cut}]

    def _write(self, head: Head, events: Sequence[Mapping[str, Any]]) -> None:
        """Appends, and writes the head."""
        if not events:
            self._head = head
            return
        day = max(today(), head.day)  # a clock that is set back does not begin an older file
        path = self._folder / name_of(day)
        before = size_of(path)
        if day != head.day or self._since_checkpoint >= CHECKPOINT:
            self._catch_up(head)
            if (living := self._living()) is not None:  # others' journals, too, that have been removed
                self._positions = {name: at for name, at in self._positions.items() if name in living}
            events = [{"event": "audit.positions", "positions": dict(self._positions)}, *events]
            self._since_checkpoint = 0
        if not self._marked:
            self._mark(head.log)
        lines: list[bytes] = []
        if before and not ends_with_newline(path):  # damaged: ours is a line of its own
            lines.append(b"\n")
        sequence, previous, log, secret = head.sequence, head.hash, head.log, self._secret
        for event in events:
            if not RESERVED.isdisjoint(event):
                raise ValueError(f"an event must not have the fields {', '.join(sorted(RESERVED))}")
            sequence += 1
            at = event.get("time")
            body = orjson.dumps(
                {"sequence": sequence, "time": self._time(time.time() if at is None else at), "log": log}
                | {name: value for name, value in event.items() if name != "time"}
            )[:-1]
            digest = hash_line(secret, day, previous, body)
            lines.append(b'%b,"previous":"%b","hash":"%b"}\n' % (body, previous.encode(), digest.encode()))
            previous = digest
        data = b"".join(lines)
        new = replace(head, sequence=sequence, hash=previous, day=day, end=before + len(data))
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                write_all(fd, data)
                os.fdatasync(fd)
                self._write_head(new)
            except BaseException:
                os.ftruncate(fd, before)
                raise
        finally:
            os.close(fd)
        if not before:
            sync_folder(self._folder)
        known = self._seen == (head.day, head.end) or head.sequence == 0
        self._head = new
        self._since_checkpoint += len(events)
        if known:
            for event in events:
                if (journal := event.get("journal")) is not None:
                    self._moved(journal, event["offset"])
            self._seen = (day, new.end)

    def _mark(self, log: str) -> None:
        """Writes down which log is this home's: before the log's first line, so that it is never there without."""
        path = self._folder.parent / LOG_ID
        new = path.with_suffix(".new")
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            write_all(fd, log.encode() + b"\n")
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(new, path)
        sync_folder(path.parent)
        self._marked = True

    def _write_head(self, head: Head) -> None:
        path = self._folder / "head"
        new = not path.exists()
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, head.pack(self._secret), 0)
            if new:
                os.fsync(fd)
        finally:
            os.close(fd)

    def _time(self, at: float) -> str:
        second = int(at)
        if second != self._second[0]:
            self._second = (second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second)))
        return f"{self._second[1]}.{int((at - second) * 1000):03d}Z"

    def _retain(self) -> None:
        """Removes the files that are too old; looks once a day."""
        now = today()
        if now == self._retained:
            return
        self._retained = now
        oldest = time.strftime("%Y-%m-%d", time.gmtime(time.time() - self._retention * 86_400))
        there = days(self._folder)
        old = [day for day in there if day < oldest and day < now]
        if not old:
            return
        head = self._head
        # A file that was removed or renamed by hand must not become one that retention has removed: the days' first
        # and last lines must follow each other. Where they do not, all stays, for the verifier. Files that are not of
        # this store at all are nobody's concern here: they stay, and hold up nothing.
        at = head.removed_sequence, head.removed_hash
        gone = []
        for day in old:
            first, last = self._ends(day)
            if first is None and last is None:
                continue
            if day <= head.removed_day and last and int(last[2]) <= head.removed_sequence:
                (self._folder / name_of(day)).unlink()  # a removal that did not come to its end
                continue
            if not first or not last or (int(first[2]) - 1, first[4].decode()) != at:
                return
            at = int(last[2]), last[5].decode()
            gone.append(day)
        ends = (self._ends(day) for day in there if day not in old)
        first = next((first for first, last in ends if first or last), None)
        if at != ((int(first[2]) - 1, first[4].decode()) if first else (head.sequence, head.hash)):
            return
        if at == (head.removed_sequence, head.removed_hash):
            return
        self._catch_up(head)  # the positions are in the files
        event = {"event": "audit.removed", "files": [name_of(day) for day in gone], "through": at[0]}
        self._write(replace(head, removed_sequence=at[0], removed_hash=at[1], removed_day=gone[-1]), [event])
        for day in gone:
            (self._folder / name_of(day)).unlink(missing_ok=True)
        sync_folder(self._folder)

    def _ends(self, day: str) -> "tuple[re.Match[bytes] | None, re.Match[bytes] | None]":
        """A file's first and last line; None: not what was written."""
        path = self._folder / name_of(day)
        with path.open("rb") as file:
            first = file.readline().removesuffix(b"\n")
        return self._whole(day, first), self._whole(day, next((line for line in backwards(path) if line), b""))

    def _whole(self, day: str, line: bytes) -> "re.Match[bytes] | None":
        return whole(self._secret, day, line)

    # Positions.

    def _moved(self, journal: str, offset: int) -> None:
        self._positions[journal] = max(offset, self._positions.get(journal, 0))

    def _catch_up(self, head: Head) -> None:
        """Reads what others have appended; at first, back to where the positions were last put down."""
        if head.sequence == 0 or self._seen == (head.day, head.end):
            return
        if self._seen is None:
            found: list[tuple[str, bytes]] = []
            for day in reversed(days(self._folder)):
                for line in backwards(self._folder / name_of(day)):
                    if b'"journal":' in line or _POSITIONS in line:
                        found.append((day, line))
                    if _POSITIONS in line:
                        break
                if found and _POSITIONS in found[-1][1]:
                    break
            for day, line in reversed(found):
                self._note(day, line)
        else:
            day, end = self._seen
            for later in (d for d in days(self._folder) if d >= day):
                with (self._folder / name_of(later)).open("rb") as file:
                    file.seek(end if later == day else 0)
                    for line in file:
                        if b'"journal":' in line or _POSITIONS in line:
                            self._note(later, line.removesuffix(b"\n"))
        self._seen = (head.day, head.end)

    def _note(self, day: str, line: bytes) -> None:
        if not self._whole(day, line):
            return
        event = orjson.loads(line)
        if event["event"] == "audit.positions":
            for journal, offset in event["positions"].items():
                self._moved(journal, offset)
        elif "journal" in event:
            self._moved(event["journal"], event["offset"])


def _damaged(what: str) -> dict[str, Any]:
    return {"event": "audit.damaged", "what": what}


def _torn(line: bytes, sequence: int) -> bool:
    """Whether it may be the beginning of a line that was being written."""
    expected = rb'{"sequence":%d,"time":"' % (sequence + 1)
    return line.startswith(expected[: len(line)])


def _follows(found: "re.Match[bytes]", head: Head) -> bool:
    return int(found[2]) == head.sequence + 1 and found[4].decode() == head.hash and found[3].decode() == head.log
