"""What the keeper reads: the journals of living and dead workers, and how far each reader is in them."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from serving.tenants.journal import JournalFile, remove, segments
from serving.tenants.ledger import FINISHED, Batch
from serving.tenants.record import Record
from serving.tenants.troubles import Troubles

BUDGET = 2**17  # bytes of journals that are read at once, for each reader
UNKNOWN = -1  # position of the audit log, while that cannot be asked


@dataclass(frozen=True, slots=True)
class News:
    """Records of a journal, and the position after each; ``end`` is that after all that was read."""

    journal: str
    records: Sequence[Record]
    ends: Sequence[int]
    end: int


class Readers(Protocol):
    """Who gets the records, beside the ledger. ``audits``: whether requests are audited."""

    @property
    def audits(self) -> bool: ...

    @property
    def ready(self) -> bool:
        """Whether it is worth a try to give something to the audit log."""

    def audited(self) -> Mapping[str, int] | None:
        """Journal -> how far the audit log has it; None: that cannot be told now."""

    def audit(self, news: Sequence[News]) -> bool:
        """Returns whether it has them."""

    def tell(self, records: Sequence[Record]) -> None:
        """To those who get each record once at most."""

    def forget(self, journal: str) -> None:
        """It is removed."""


@dataclass(slots=True)
class _Source:
    """A journal.

    Attributes:
        ledger: its position; None: the store must be asked; FINISHED: only its file is to be removed.
        audit, told: positions of the audit log, or UNKNOWN, and of those who get each record once at most; None: they
            get none.
        complete: nothing will be added.
        others_done: it is complete, and all but the ledger have it.
        finished: so has the ledger, if there is one.
        end, synced: up to where it was read, and up to where the disk has been told to keep it.
    """

    path: Path
    audit: int | None
    told: int | None
    ledger: int | None = None
    complete: bool = False
    others_done: bool = False
    finished: bool = False
    end: int = 0
    synced: int = 0


class _Round:
    """What is read at once; who is behind does not hold up the others."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.audited: list[tuple[_Source, News]] = []
        self.told: list[Record] = []
        self.budgets = dict.fromkeys(("audit", "told", "ledger"), BUDGET)


class Intake:
    """Reads for the ledger and for others, each at its own pace.

    Args:
        report: told of journals that cannot be used.

    Attributes:
        sources: journals by name.
        unreadable: records that were skipped, since another version has written them.
    """

    def __init__(self, readers: Readers, report: Callable[[str], None]) -> None:
        self._readers, self._troubles = readers, Troubles(report)
        self._turn = 0
        self.sources: dict[str, _Source] = {}
        self.unreadable = 0

    def look(self, folder: Path, own: bool) -> bool:
        """Finds journals that are new; returns whether there is any in the folder.

        Args:
            own: False: another gateway's, whose request log and traces have had what they get.

        Raises:
            OSError: it cannot be read.
        """
        there = segments(folder)
        for path in there:
            if path.name not in self.sources:
                self.sources[path.name] = _Source(path, UNKNOWN if self._readers.audits else None, 0 if own else None)
        return bool(there)

    def unknown(self) -> list[str]:
        """Journals of which it is not known how far the ledger has them."""
        return [name for name, source in self.sources.items() if source.ledger is None]

    def place(self, journal: str, position: int | None) -> None:
        """Where the ledger is, as the store has it; None: it must be asked. A finished journal's file is deleted."""
        self.sources[journal].ledger = position
        if position == FINISHED:
            self._remove(journal)

    def collect(self, ledger: bool) -> tuple[list[Batch], bool]:
        """Reads what is new, and gives it to all but the ledger.

        Args:
            ledger: whether it can take something now.

        Returns:
            What the ledger is to take, and whether there is more to read at once.
        """
        round_ = _Round()
        auditing = self._readers.audits and self._readers.ready and self._place_audit()
        for source in self._in_turn():
            booked = source.ledger if ledger else None
            idle = booked is None and source.others_done
            if source.ledger == FINISHED or idle:
                continue
            if max(round_.budgets.values()) <= 0:
                break
            with self._troubles.apart(source.path):
                try:
                    with JournalFile(source.path) as file:
                        self._read(file, source, round_, auditing, booked)
                except FileNotFoundError:  # somebody has deleted it
                    del self.sources[source.path.name]
        return round_.batches, self._give(round_)

    def _place_audit(self) -> bool:
        """Finds out where the audit log is in new journals; returns whether that is known of all."""
        new = [source for source in self.sources.values() if source.audit == UNKNOWN]
        if new:
            positions = self._readers.audited()
            if positions is None:
                return False
            for source in new:
                source.audit = positions.get(source.path.name, 0)
        return True

    def _read(self, file: JournalFile, source: _Source, round_: _Round, auditing: bool, booked: int | None) -> None:
        source.complete = source.complete or file.complete  # before it is read: else there could be more
        at = {"audit": source.audit if auditing else None, "told": source.told, "ledger": booked}
        waiting = set()  # of whom there is something for
        if source.audit is not None and not auditing:
            waiting.add("audit")  # for all that is known
        for position in sorted({position for position in at.values() if position is not None}):
            readers = [name for name, its in at.items() if its == position]
            most = max(round_.budgets[name] for name in readers)
            if most <= 0:
                waiting.update(readers)
                continue
            lines, ends = file.read(position, max(most, 4096))
            if not lines:
                continue
            waiting.update(readers)
            source.end = max(source.end, ends[-1])
            news = self._unpack(source.path.name, lines, ends)
            for name in readers:
                round_.budgets[name] -= ends[-1] - position
            if "audit" in readers:
                round_.audited.append((source, news))
            if "told" in readers:
                source.told = news.end
                round_.told += news.records
            if booked is not None and "ledger" in readers:
                round_.batches.append(Batch(news.journal, position, news.end, news.records))
        source.others_done = source.complete and not waiting - {"ledger"}
        source.finished = source.complete and not waiting
        if source.finished and booked is not None:
            round_.batches.append(Batch(source.path.name, booked, FINISHED, ()))

    def _give(self, round_: _Round) -> bool:
        """Returns whether one of those who have been given all that they may have at once has taken it."""
        took = {"ledger": True, "told": True, "audit": False}
        if round_.audited and self._readers.audit([news for _, news in round_.audited]):
            took["audit"] = True
            for source, news in round_.audited:
                source.audit = news.end
        if round_.told:
            self._readers.tell(round_.told)
        return any(took[name] and budget <= 0 for name, budget in round_.budgets.items())

    def remove_finished(self, ledger: bool) -> None:
        """Deletes what all have, if that could not be done before or there is no ledger."""
        done = [name for name, s in self.sources.items() if s.ledger == FINISHED or (s.finished and not ledger)]
        for name in done:
            self._remove(name)

    @property
    def is_empty(self) -> bool:
        """All have everything."""
        return all(source.ledger == FINISHED for source in self.sources.values())

    def sync(self) -> None:
        """Has the disk keep what the ledger or the audit log has not got yet."""
        for source in self.sources.values():
            behind = min(position for position in (source.ledger or 0, source.audit) if position is not None)
            if source.end > source.synced and behind < source.end and source.ledger != FINISHED:
                with self._troubles.apart(source.path):
                    with JournalFile(source.path) as file:
                        file.sync()
                    source.synced = source.end

    def lag(self) -> int:
        """Bytes that others have been given and the ledger has not."""
        waiting = [source for source in self.sources.values() if source.ledger != FINISHED]
        return sum(max(0, source.end - (source.ledger or 0)) for source in waiting)

    def _remove(self, journal: str) -> None:
        path = self.sources[journal].path
        with self._troubles.apart(path):
            with contextlib.suppress(FileNotFoundError):  # the folder has gone, too
                remove(path)
            del self.sources[journal]
            self._readers.forget(journal)

    def _in_turn(self) -> list[_Source]:
        """All, and another one first each time, so that none waits for ever."""
        sources = list(self.sources.values())
        self._turn += 1
        start = self._turn % len(sources) if sources else 0
        return sources[start:] + sources[:start]

    def _unpack(self, journal: str, lines: Sequence[bytes], ends: Sequence[int]) -> News:
        records, kept = [], []
        for line, end in zip(lines, ends, strict=True):
            try:
                records.append(Record.unpack(line))
                kept.append(end)
            except ValueError:
                self.unreadable += 1
        return News(journal, records, kept, ends[-1])
