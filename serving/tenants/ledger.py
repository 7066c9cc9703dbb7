"""The keeper's part of the store: the ledger, and the keys as they are.

It speaks to the drivers, ``sqlite3`` or ``psycopg``, in SQL that :mod:`serving.tenants.statements` has compiled before,
so that SQLAlchemy takes no memory while the gateway runs.
"""

import contextlib
import os
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from serving.tenants.record import MOST_TOKENS, Record
from serving.tenants.store_url import passwords

# Seconds of one statement, and of its waiting for others: the keeper looks at the keys only in between, and a revoked
# one must be gone in 5 seconds.
STATEMENT_LIMIT, LOCK_LIMIT = 5.0, 2.0
TRANSACTION_LIMIT = 10.0  # seconds after which a server that says nothing is given up
FINISHED = -1
"""Position of a journal that is in the ledger to its end: whatever becomes of its file, it does not count again."""
_SAVEPOINTS = {
    "savepoint": "SAVEPOINT part",
    "roll_back_to": "ROLLBACK TO SAVEPOINT part",
    "release": "RELEASE SAVEPOINT part",
}

Row = dict[str, Any]
Execute = Callable[..., Any]


class StoreAway(Exception):
    """The store cannot be used now. The text holds no password."""


class _Unfit(Exception):
    """The store works, and does not take what it was given."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Records of a journal between two positions."""

    journal: str
    old: int
    new: int
    records: Sequence[Record]


class Ledger:
    """One connection to the store, opened when it is needed, and given up at any error.

    Args:
        store: ``driver`` and ``arguments`` of :func:`serving.tenants.statements.connect_arguments`, and ``statements``.

    Attributes:
        refused: records that the store does not take, whose usage is therefore missing.
    """

    def __init__(self, store: Mapping[str, Any]) -> None:
        self._driver, self._arguments = store["driver"], store["arguments"]
        self._sql = store["statements"] | _SAVEPOINTS
        self.refused = 0
        self._passwords = passwords(self._arguments.get("conninfo", "sqlite:"))
        self._connection: Any = None
        self._file: tuple[int, int] | None = None  # which one it has open, of SQLite

    def facts(self, *names: str) -> dict[str, str | None]:
        """Values by name.

        Raises:
            StoreAway: it cannot be reached, or has no such table.
        """
        with self._transaction() as execute:
            return {name: _value(execute("fact", name=name)) for name in names}

    def revision(self) -> str | None:
        """The schema's. Raises StoreAway: it cannot be reached, or has none."""
        with self._transaction() as execute:
            found: str | None = _value(execute("revision"))
            return found

    def version(self) -> str:
        """Another one after every change of keys or captures. Raises StoreAway."""
        with self._transaction() as execute:
            return str(_value(execute("version")))

    def keys(self) -> tuple[str, list[Row], list[Row]]:
        """The version, rows of all keys, and those of active captures. Raises StoreAway."""
        with self._transaction() as execute:
            version = str(_value(execute("version")))  # first: what changes meanwhile has a later one
            return version, _rows(execute("keys")), _rows(execute("captures", now=int(time.time())))

    def spent(self, month: str) -> dict[str, int]:
        """Tokens since the first day of a month ("2026-11"), of keys that have a monthly budget. Raises StoreAway."""
        with self._transaction() as execute:
            return {key: int(tokens or 0) for key, tokens in execute("spent", month=f"{month}-01").fetchall()}

    def positions(self, journals: Sequence[str]) -> dict[str, int]:
        """Up to where each is in the ledger; one that it does not know is begun. Raises StoreAway."""
        found = {}
        with self._transaction() as execute:
            for journal in sorted(journals):
                execute("begin_journal", id=journal, now=int(time.time()))
                found[journal] = int(_value(execute("position", id=journal)))
        return found

    def apply(self, batches: Sequence[Batch]) -> set[str]:
        """Adds records to the ledger and moves their journals' positions, all at once or not at all.

        A record that the store does not take is left out, and counted in ``refused``: it would stop all others.

        Returns:
            The journals that were at ``old``, as they had to be. The others are where :meth:`positions` says.

        Raises:
            StoreAway: it cannot be told whether this was done; :meth:`positions` says so later.
        """
        try:
            return self._apply(batches, _add)
        except _Unfit:
            pass
        refused: list[Record] = []

        def add(execute: Execute, records: Sequence[Record]) -> None:
            refused.extend(_add_fit(execute, records))

        moved = self._apply(batches, add)
        self.refused += len(refused)
        return moved

    def _apply(self, batches: Sequence[Batch], add: Callable[[Execute, Sequence[Record]], None]) -> set[str]:
        moved = set()
        with self._transaction() as execute:
            now = int(time.time())
            for batch in sorted(batches, key=lambda batch: batch.journal):
                if execute("advance", id=batch.journal, old=batch.old, new=batch.new, now=now).rowcount == 1:
                    moved.add(batch.journal)
            add(execute, [record for batch in batches if batch.journal in moved for record in batch.records])
        return moved

    def head(self, log: str) -> tuple[int, str] | None:
        """Number and hash of an audit log's last line, as far as the store knows. Raises StoreAway."""
        with self._transaction() as execute:
            row = execute("stored_head", log=log).fetchone()
            return None if row is None else (int(row[0]), str(row[1]))

    def put_head(self, log: str, sequence: int, digest: str) -> None:
        """Remembers the last line of an audit log. Raises StoreAway."""
        with self._transaction() as execute:
            execute("head", log=log, sequence=sequence, hash=digest, now=int(time.time()))

    def forget_journals(self, before: float) -> None:
        """Those that were finished before a time, in seconds since the epoch. Raises StoreAway."""
        with self._transaction() as execute:
            execute("forget_journals", before=int(before))

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Execute]:
        """A transaction, in which what it gives executes a statement by its name."""
        watch: _Watch | None = None
        try:
            if self._connection is not None and self._file != self._file_now():
                self.close()  # another was put into its place: a backup, say
            if self._connection is None:
                self._connection = self._connect()
            if self._driver == "psycopg":
                watch = _Watch(self._connection.fileno())
            cursor = self._connection.cursor()

            def execute(statement: str, **parameters: Any) -> Any:
                return cursor.execute(self._sql[statement], parameters or ())

            if self._driver == "psycopg":
                cursor.execute(
                    f"BEGIN; SET LOCAL statement_timeout = {1000 * STATEMENT_LIMIT:.0f}; "
                    f"SET LOCAL lock_timeout = {1000 * LOCK_LIMIT:.0f}"
                )
            else:
                execute("begin")
            yield execute
            execute("commit")
        except StoreAway:
            self.close()
            raise
        except Exception as e:
            self.close()
            if _is_unfit(e):
                raise _Unfit from None
            if not _is_from_driver(e):
                raise
            raise StoreAway(self._explain(e)) from None
        except BaseException:
            self.close()
            raise
        finally:
            if watch is not None:
                watch.end()

    def _connect(self) -> Any:
        if self._driver == "psycopg":
            try:
                import psycopg
            except ImportError:
                raise StoreAway("PostgreSQL needs psycopg: pip install 'medassist[postgresql]'") from None
            return psycopg.connect(**self._arguments)
        import sqlite3

        path, self._file = self._arguments["database"], self._file_now()
        if self._file is None:  # connecting would make an empty one
            raise StoreAway(f"there is no {path}")
        connection = sqlite3.connect(**self._arguments)
        connection.execute("PRAGMA synchronous = FULL")
        return connection

    def _file_now(self) -> tuple[int, int] | None:
        if self._driver != "sqlite":
            return None
        try:
            about = os.stat(self._arguments["database"])
        except OSError:
            return None
        return about.st_dev, about.st_ino

    def _explain(self, error: Exception) -> str:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        text = lines[0]
        for password in self._passwords:
            text = text.replace(password, "***")
        return text[:300]


def _add(execute: Execute, records: Sequence[Record]) -> None:
    for usage in add_up(records):
        execute("add_usage", **usage)


def _add_fit(execute: Execute, records: Sequence[Record]) -> list[Record]:
    """Adds all that the store takes, and returns the others: of ever smaller parts, those of one record."""
    execute("savepoint")
    try:
        _add(execute, records)
    except Exception as e:
        if not _is_unfit(e):
            raise
        execute("roll_back_to")
    else:
        execute("release")
        return []
    execute("release")
    if len(records) == 1:
        return list(records)
    half = len(records) // 2
    return _add_fit(execute, records[:half]) + _add_fit(execute, records[half:])


def add_up(records: Iterable[Record]) -> list[Row]:
    """Parameters of "add_usage", in the order in which every gateway writes them, so that none waits for the other."""
    sums: dict[tuple[str, str, str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0, 0])
    days: dict[int, str] = {}
    for record in records:
        number = int(record.time // 86_400)
        day = days.get(number)
        if day is None:
            try:
                day = days[number] = time.strftime("%Y-%m-%d", time.gmtime(number * 86_400))
            except OSError:  # as if the store were away
                raise ValueError("there is no such day") from None
        counts = sums[day, record.key, record.model, record.tenant]
        counts[0] += 1
        counts[1] += record.status >= 400
        counts[2] += min(record.prompt_tokens, MOST_TOKENS)
        counts[3] += min(record.completion_tokens, MOST_TOKENS)
        counts[4] += record.estimated
    names = ("requests", "failed", "prompt_tokens", "completion_tokens", "estimated")
    return [
        {"day": day, "key": key, "tenant": tenant, "model": model, **dict(zip(names, counts, strict=True))}
        for (day, key, model, tenant), counts in sorted(sums.items())
    ]


def _value(cursor: Any) -> Any:
    row = cursor.fetchone()
    return None if row is None else row[0]


def _rows(cursor: Any) -> list[Row]:
    names = [column[0] for column in cursor.description]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def _is_from_driver(error: Exception) -> bool:
    return isinstance(error, OSError) or type(error).__module__.partition(".")[0] in ("sqlite3", "psycopg")


def _is_unfit(error: Exception) -> bool:
    """Whether it is about the values that a statement was given, and not about the store."""
    if isinstance(error, (TypeError, ValueError, OverflowError)):
        return True
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return _is_from_driver(error) and bool(kinds & {"DataError", "IntegrityError"})


class _Watch:
    """Cuts a connection that gets no answer for too long: a server that was stopped does not end its own statements.

    Args:
        fd: the connection's, of which it has a duplicate: the number may be another's when the time is up.
    """

    def __init__(self, fd: int) -> None:
        self._socket: socket.socket | None = socket.socket(fileno=os.dup(fd))
        self._lock = threading.Lock()
        self._timer = threading.Timer(TRANSACTION_LIMIT, self._cut)
        self._timer.daemon = True
        self._timer.start()

    def end(self) -> None:
        self._timer.cancel()
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _cut(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)
