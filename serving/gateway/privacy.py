"""Keeps what clients send and get out of what a process leaves behind: core files, tracebacks, logs, warnings.

Tracebacks show an exception's message, and messages show values: a parser's what it could not parse, asyncio's the
arguments of a callback. Here types and places are shown, and nothing else, at every level, whatever libraries log.

Standard library only: supervisors import this.
"""

import asyncio
import contextlib
import logging
import os
import resource
import sys
import threading
import traceback
import warnings
from types import TracebackType
from typing import Any, TextIO

_OWN = ("medassist", "serving")  # loggers whose messages are ours, and hold nothing of a request
_DEEPEST = 12  # places of a traceback that are shown


def forbid_core_dumps() -> None:
    """No core file of this process, nor of those that it starts, engines included.

    The limit is one byte, not none: a kernel that hands cores to a program (``core_pattern`` with a pipe) ignores the
    limit, but for this value, for which it hands over nothing. No core file is that short, so it forbids these too.
    What is made all the same, as for a socket in ``core_pattern``, is told to leave out the memory.
    """
    with contextlib.suppress(ValueError, OSError):
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        limit = 0 if hard == 0 else 1  # a hard limit of 0 cannot be raised
        resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
    with contextlib.suppress(OSError), open("/proc/self/coredump_filter", "w") as file:
        file.write("0")


def seal() -> None:
    """For a process that handles bodies; to be called before it has any."""
    forbid_core_dumps()
    sys.excepthook = _tell_uncaught
    sys.unraisablehook = _tell_unraisable
    threading.excepthook = _tell_thread
    warnings.showwarning = _tell_warning
    handler = logging.StreamHandler()
    handler.setFormatter(PlacesOnly())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)


def quiet(loop: asyncio.AbstractEventLoop) -> None:
    """What the loop's callbacks and tasks raise, and nobody catches, is told like all else."""
    loop.set_exception_handler(_tell_loop)


def describe(error: BaseException) -> str:
    """Type and places of an exception and of those that led to it, innermost last: ``ValueError at relay.py:12``."""
    told: list[str] = []
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        told.append(_one(current))
        if isinstance(current, BaseExceptionGroup):
            told.extend(_one(inner) for inner in current.exceptions[:_DEEPEST])
        current = current.__cause__ or (None if current.__suppress_context__ else current.__context__)
    return ", from ".join(told)


def _one(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-_DEEPEST:]
    where = " > ".join(f"{os.path.basename(frame.filename)}:{frame.lineno}" for frame in frames)
    return type(error).__qualname__ + (f" at {where}" if where else "")


class PlacesOnly(logging.Formatter):
    """Messages of our own loggers; of others, which line of which file has logged."""

    def format(self, record: logging.LogRecord) -> str:
        own = record.name.partition(".")[0] in _OWN
        said = record.getMessage() if own else f"{record.filename}:{record.lineno}"
        if record.exc_info and record.exc_info[1] is not None:
            said += f" ({describe(record.exc_info[1])})"
        return f"{record.levelname} {record.name}: {said}"


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a terminal that has gone
        print(text, file=sys.stderr, flush=True)


def _tell_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    _say(f"uncaught {describe(error)}")


def _tell_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    error = unraisable.exc_value
    _say(f"unraisable {describe(error) if error is not None else unraisable.exc_type.__qualname__}")


def _tell_thread(args: "threading.ExceptHookArgs") -> None:
    if args.exc_type is not SystemExit:
        error = args.exc_value
        _say(f"uncaught in a thread: {describe(error) if error is not None else args.exc_type.__qualname__}")


def _tell_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    _say(f"{category.__qualname__} at {os.path.basename(filename)}:{lineno}")


def _tell_loop(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    error = context.get("exception")
    # The context's message and the repr of its future or handle can hold arguments.
    said = describe(error) if isinstance(error, BaseException) else "no exception"
    _say(f"uncaught in the event loop: {said}")
