"""Notices that the settings file has changed.

It is looked at, not subscribed to: notifications get lost on network file systems, and with editors and Kubernetes,
which put another file in its place. Looking costs microseconds.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

logger = logging.getLogger("medassist.gateway")

Stamp = tuple[int, ...]


def stamp(path: Path) -> Stamp | None:
    """What tells a file's versions apart, of the file that links lead to; None while there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


async def watch(
    path: Path, changed: Callable[[], Awaitable[None]], interval: float = 1.0, *, known: Stamp | None = None
) -> None:
    """Calls ``changed`` after every change, until cancelled.

    A file that is still being written is left alone: it must have been the same for one interval. A file that is
    missing is waited for. What ``changed`` raises is logged, and it is called again after the next change.

    Args:
        interval: seconds between looks.
        known: the stamp of what has been loaded already, taken before it was read; None: what is there now.
    """
    known = known or stamp(path)
    before = known
    while True:
        await asyncio.sleep(interval)
        now = stamp(path)
        settled, before = now == before, now
        if now is None or now == known or not settled:
            continue
        known = now
        try:
            await changed()
        except Exception:
            logger.exception("%s has changed, and could not be applied", path)
