"""The request log: a line of JSON for each request, of numbers and names."""

import errno
import os
import select
import stat
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import orjson

from serving.tenants.key import Key
from serving.tenants.record import Record

_PATIENCE = 1.0  # seconds that a pipe that nobody reads may hold up the keeper, once
_PIPE = 4096  # bytes that a pipe takes whole if it takes any, see pipe(7)
_STDOUT = 1


class RequestLog:
    """Appends lines to a file, which may be moved away meanwhile, or to standard output.

    A log that cannot be written stops nothing: its lines are dropped and counted, and a person is told when this begins
    and when it is over.

    Attributes:
        dropped: lines.
    """

    def __init__(self, config: dict[str, Any], report: Callable[[str], None]) -> None:
        """
        Args:
            config: the settings' section ``log``.
            report: told what a person should know.
        """
        self.dropped = 0
        self._file = Path(config["file"]) if config.get("file") else None
        self._report = report
        self._descriptor: int | None = None
        self._identity: tuple[int, int] | None = None
        self._failing = self._torn = False
        self._told = 0

    def write(self, records: Sequence[Record]) -> None:
        """Appends a line for each. Never raises; takes a second at most."""
        lines = [format_line(record) for record in records]
        try:
            written = self._append(lines, 0.0 if self._failing else _PATIENCE)
            problem = "" if written == len(lines) else "nobody reads it"
        except _Stopped as e:
            written, problem = e.written, e.reason
        self.dropped += len(lines) - written
        if problem and not self._failing:
            self._failing = True
            self._report(f"the request log cannot be written ({problem}): its lines are dropped until it can")
        elif not problem and self._failing and lines:
            self._failing = False
            self._report(f"the request log is written again; {self.dropped - self._told} lines were dropped")
            self._told = self.dropped

    def close(self) -> None:
        if self._file is not None and self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor = None

    def _append(self, lines: list[bytes], patience: float) -> int:
        """Returns how many have been written.

        Raises:
            _Stopped: a fault.
        """
        written = 0
        try:
            descriptor = self._open()
            if stat.S_ISREG(os.fstat(descriptor).st_mode):
                batch = b"".join(lines)
                if self._torn:
                    batch = b"\n" + batch
                self._torn = not self._write(descriptor, batch)
                if self._torn:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return len(lines)
            poll = select.poll()
            poll.register(descriptor, select.POLLOUT)
            until = time.monotonic() + patience
            for line in lines:
                # A descriptor that others use too cannot be made non-blocking, but a pipe has room for a short line
                # whenever it is writable.
                if len(line) > _PIPE or not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                    break
                os.write(descriptor, line)
                written += 1
        except OSError as e:
            self.close()
            raise _Stopped(written, e.strerror or type(e).__name__) from None
        return written

    @staticmethod
    def _write(descriptor: int, data: bytes) -> bool:
        """Whether all of it was written; on a full disk a part of it may be."""
        left = memoryview(data)
        while left:
            try:
                count = os.write(descriptor, left)
            except OSError:
                if len(left) == len(data):
                    raise
                return False
            left = left[count:]
        return True

    def _open(self) -> int:
        if self._file is None:
            return _STDOUT
        if self._descriptor is not None:
            try:
                found = os.stat(self._file)
            except FileNotFoundError:
                found = None
            if found is None or (found.st_dev, found.st_ino) != self._identity:
                self.close()
        if self._descriptor is None:
            # Opening a pipe that nobody reads fails instead of waiting.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_CLOEXEC
            self._descriptor = os.open(self._file, flags, 0o640)
            found = os.fstat(self._descriptor)
            if (found.st_dev, found.st_ino) != self._identity:
                self._identity, self._torn = (found.st_dev, found.st_ino), False
        return self._descriptor


class _Stopped(Exception):
    def __init__(self, written: int, reason: str) -> None:
        super().__init__(reason)
        self.written, self.reason = written, reason


def format_line(record: Record) -> bytes:
    """A line of the log, with its end. Its fields are those of docs/operations.md; null: there is none."""
    moment = datetime.fromtimestamp(record.time, UTC).isoformat(timespec="milliseconds")
    line = {
        "time": moment.replace("+00:00", "Z"),
        "request_id": record.request_id,
        "key": hash_id(record.key) or None,
        "tenant": record.tenant or None,
        "route": record.route,
        "model": record.model or None,
        "status": record.status,
        "code": record.code or None,
        "phase": record.phase,
        "stream": record.stream,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "estimated": record.estimated,
        "seconds": _round(record.seconds),
        "queue_seconds": _round(record.queued),
        "upstream_seconds": _round(record.upstream),
        "first_token_seconds": _round(record.first_token),
        "replica": record.replica or None,
        "attempts": record.attempts,
        "trace_id": record.trace_id or None,
        "span_id": record.span_id or None,
        "captured": record.captured,
    }
    return orjson.dumps(line) + b"\n"


@lru_cache(1024)
def hash_id(key: str) -> str:
    """What is written of a key's id; empty for nobody's."""
    return Key(key, "").hashed_id


def _round(seconds: float) -> float | None:
    return round(seconds, 6) if seconds >= 0 else None
