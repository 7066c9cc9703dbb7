"""Reads the audit log: whether it is whole, and what it says."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from serving.tenants.audit_files import (
    GENESIS,
    LINE,
    LOG_ID,
    Head,
    days,
    hash_line,
    home_log,
    locked,
    name_of,
    size_of,
    whole,
)

EVENTS = (
    "request", "key.created", "key.updated", "key.rotated", "key.revoked", "capture.started", "capture.ended",
    "gateway.started", "gateway.stopped", "settings.changed", "store.upgraded", "store.downgraded", "audit.recovered",
    "audit.damaged", "audit.removed", "audit.positions",
)  # fmt: skip
MOST = 100  # problems that are told; after a few hundred the log is another one
TRIES = 3  # of a verification that retention or a mending comes across


@dataclass(frozen=True, slots=True)
class Problem:
    """Attributes:
    file: name in the folder, or "log_id", which is beside it.
    line: from 1; 0: the file as a whole.
    """

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"


@dataclass(slots=True)
class Report:
    """Attributes:
    log: the log's id; empty where there is none.
    files, lines: how many were read.
    first, last: sequence numbers of the first and the last line; 0 without any.
    problems: what is not as it was written, in order.
    notes: what is in order, and worth knowing.
    """

    log: str = ""
    files: int = 0
    lines: int = 0
    first: int = 0
    last: int = 0
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.problems


class _Full(Exception):
    """More problems than are told."""


@dataclass(frozen=True)
class _Snapshot:
    """How a log was at one moment. What is appended later is not looked at, so that nobody has to wait.

    Attributes:
        head: None: there is none.
        refused: why it cannot be read; empty: it can.
        log: which is this home's; empty: nothing says so.
        sizes: of the days' files.
    """

    head: Head | None
    refused: str
    log: str
    sizes: dict[str, int]

    @classmethod
    def take(cls, folder: Path, secret: bytes) -> "_Snapshot":
        """Raises OSError."""
        head, refused = None, ""
        with locked(folder, exclusive=False) if folder.is_dir() else contextlib.nullcontext():
            try:
                head = Head.read(folder / "head", secret)
            except ValueError:
                refused = "it was changed, or belongs to another store"
            sizes = {day: size_of(folder / name_of(day)) for day in days(folder)}
            return cls(head, refused, home_log(folder), sizes)

    def outdated(self, later: "_Snapshot") -> bool:
        """Whether files that were there may be others now: removed by retention, or mended behind the head."""
        then, now = self.head, later.head
        if then is None or now is None:
            return then != now
        behind = self.sizes.get(then.day, 0) != then.end or any(self.sizes[day] for day in self.sizes if day > then.day)
        return then.removed_day != now.removed_day or (behind and then != now)


class _Verifier:
    def __init__(self, folder: Path, secret: bytes, snapshot: _Snapshot) -> None:
        self.folder, self.secret, self.snapshot = folder, secret, snapshot
        self.report = Report()
        self.known: tuple[int, str] | None = None  # what the store has
        self.met = False

    def run(self, known: tuple[int, str] | None) -> None:
        self.known = known
        head = self._head()
        if head is None:
            return
        self.report.log = head.log
        sequence, digest = head.removed_sequence, head.removed_hash
        before = f"{name_of(head.removed_day)} that retention has removed" if sequence else "the log's beginning"
        place, at_head = (name_of(head.day), 0), not head.sequence
        torn = ""
        for day in self.snapshot.sizes:
            name = name_of(day)
            if day <= head.removed_day:
                self._left_over(head, day)
                continue
            self.report.files += 1
            for number, raw in enumerate(self._lines(day), 1):
                line = raw.removesuffix(b"\n")
                place = name, number
                beyond = sequence >= head.sequence
                if beyond and not raw.endswith(b"\n") and line.startswith(_begin(sequence)[: len(line)]):
                    torn = f"{name}, line {number}"
                    continue
                found = LINE.fullmatch(line)
                if not found or not raw.endswith(b"\n"):
                    self._problem(name, number, "is not a whole line of the log: it was changed, or cut off")
                    continue
                own, previous, said = int(found[2]), found[4].decode(), found[5].decode()
                if hash_line(self.secret, day, previous, found[1]) != said:
                    self._problem(name, number, "was changed, or is from another day or log: its hash is wrong")
                    continue
                self.report.lines += 1
                if found[3].decode() != head.log:
                    self._problem(name, number, "is of another log")
                    continue
                if own != sequence + 1:
                    self._problem(name, number, _gap(own, sequence, before))
                elif previous != digest:
                    self._problem(name, number, f"does not follow {before}: one of them was exchanged")
                if own > sequence:
                    sequence, digest, before = own, said, f"{name}, line {number}"
                self.report.first = self.report.first or own
                if (own, said) == (head.sequence, head.hash):
                    at_head = True
                self._meets(name, number, own, said)
                if b'"event":"audit.damaged"' in line:
                    what = orjson.loads(line).get("what", "")
                    self._problem(name, number, f"a process found that the log had been changed: {what}")
        self.report.last = sequence
        if not at_head:
            name, number = place
            text = f"is the end, with number {sequence}; the head knows number {head.sequence}: the rest was removed"
            if sequence >= head.sequence:
                text = f"number {head.sequence} is not the line that the head knows"
            self._problem(name, number, text)
        elif sequence > head.sequence or torn:
            self.report.notes.append(
                f"a process died while it appended: {sequence - head.sequence} whole lines"
                + (f" and a torn one ({torn})" if torn else "")
                + " behind the head; the next append mends that"
            )
        self._compare(head, sequence)

    def _lines(self, day: str) -> Iterator[bytes]:
        """With their ends, as far as the file went."""
        left = self.snapshot.sizes[day]
        with (self.folder / name_of(day)).open("rb") as file:
            for raw in file:
                if not left:
                    return
                yield raw[:left]
                left -= min(left, len(raw))
        if left:
            raise FileNotFoundError(f"{name_of(day)} has become shorter")

    def _left_over(self, head: Head, day: str) -> None:
        """A file that should not be there any more."""
        for number, raw in enumerate(self._lines(day), 1):
            found = whole(self.secret, day, raw.removesuffix(b"\n"))
            if not found or int(found[2]) > head.removed_sequence:
                text = "is not of this log: somebody has put that file there. It is never removed"
                self._problem(name_of(day), number, text)
                return
        self.report.notes.append(f"{name_of(day)} is left over: its lines are too old, and the next start removes it")

    def _head(self) -> Head | None:
        head, log, there = self.snapshot.head, self.snapshot.log, any(self.snapshot.sizes.values())
        if (head or there) and not log:
            self._problem(LOG_ID, 0, "it was removed or changed, and says which log is this home's")
        if head is not None:
            if log and head.log != log:
                self._problem("head", 0, f"it is of log {head.log}, in the place of this home's, {log}")
            return head
        if self.snapshot.refused:
            self._problem("head", 0, self.snapshot.refused)
        elif there:
            self._problem("head", 0, "it was removed")
        elif self.known:
            self._problem("head", 0, f"there is no log, and the store knows {self.known[0]} lines of it")
        # The lines are still worth a look: each tells its log.
        for day in self.snapshot.sizes:
            for line in self._lines(day):
                if found := LINE.fullmatch(line.removesuffix(b"\n")):
                    first = int(found[2])
                    before = found[4].decode() if first > 1 else GENESIS
                    return Head(found[3].decode(), removed_sequence=first - 1, removed_hash=before)
        return None

    def _meets(self, name: str, number: int, sequence: int, digest: str) -> None:
        if self.known and sequence == self.known[0]:
            self.met = True
            if digest != self.known[1]:
                self._problem(name, number, "is not the line that the store knows: the log was written anew")

    def _compare(self, head: Head, last: int) -> None:
        """With the store's head, which may lag behind and never be ahead."""
        if self.known is None or self.met or not self.known[0]:
            return
        sequence, digest = self.known
        if sequence == head.removed_sequence and digest == head.removed_hash:
            return
        if sequence > last:
            text = f"the store knows of {sequence} lines, the log ends with {last}: the rest was removed"
            self._problem("head", 0, text)
        elif sequence > head.removed_sequence:
            self._problem("head", 0, f"the line with number {sequence}, that the store knows, is missing")

    def _problem(self, file: str, line: int, text: str) -> None:
        self.report.problems.append(Problem(file, line, text))
        if len(self.report.problems) >= MOST:
            raise _Full


def _begin(sequence: int) -> bytes:
    return b'{"sequence":%d,"time":"' % (sequence + 1)


def _gap(own: int, last: int, before: str) -> str:
    if own > last + 1:
        missing = f"number {last + 1} is" if own == last + 2 else f"numbers {last + 1} to {own - 1} are"
        return f"has number {own}, behind {before}: {missing} missing"
    return f"has number {own}, behind number {last}: it is there twice, or not in its place"


def verify(folder: Path, secret: bytes, head: tuple[int, str] | None = None) -> Report:
    """Checks every line that is there now. Appends go on meanwhile.

    Args:
        head: sequence and hash that the store knows of this log, read before the call.

    Raises:
        OSError: a file cannot be read.
    """
    snapshot = _Snapshot.take(folder, secret)
    for tries_left in reversed(range(TRIES)):
        verifier = _Verifier(folder, secret, snapshot)
        gone: FileNotFoundError | None = None
        try:
            verifier.run(head)
        except _Full:
            verifier.report.notes.append(f"there may be more: only {MOST} are told")
        except FileNotFoundError as e:
            gone = e
        if verifier.report.ok and not gone:
            break
        earlier, snapshot = snapshot, _Snapshot.take(folder, secret)
        if not gone and not earlier.outdated(snapshot):
            break
        if gone and not tries_left:
            raise gone
    return verifier.report


def log_id(folder: Path, secret: bytes) -> str:
    """The id of the log that a folder has, or should have; empty: nothing says so."""
    try:
        head = Head.read(folder / "head", secret)
    except ValueError:
        head = None
    return home_log(folder) or (head.log if head else "")


def events(
    folder: Path,
    since: str = "",
    until: str = "9999",
    *,
    secret: bytes | None = None,
    left_out: Callable[[], None] = lambda: None,
) -> Iterator[dict[str, Any]]:
    """What the log says, in order, of the days ``since`` to ``until`` (YYYY-MM-DD).

    Args:
        secret: of the store; lines that were not written with it are left out, and days that retention has removed.
            None: lines are taken as they are.
        left_out: called for each line that is left out.

    Raises:
        OSError: a file cannot be read.
    """
    removed = ""
    if secret is not None:
        with contextlib.suppress(ValueError):
            removed = head.removed_day if (head := Head.read(folder / "head", secret)) else ""
    for day in days(folder):
        if since <= day <= until and day > removed:
            with (folder / name_of(day)).open("rb") as file:
                for raw in file:
                    line = raw.removesuffix(b"\n")
                    if whole(secret, day, line) if secret is not None else LINE.fullmatch(line):
                        event: dict[str, Any] = orjson.loads(line)
                        yield event
                    elif raw.endswith(b"\n"):  # else it may be that of an append under way
                        left_out()
