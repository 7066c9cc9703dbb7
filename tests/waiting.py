"""Waiting for what happens in threads, tasks and processes, where no event tells of it."""

import asyncio
import time
from collections.abc import Callable

PATIENCE = 60.0  # seconds; a busy machine is no failure


def until(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Whether the condition has come true within so many seconds."""
    deadline, pause = time.monotonic() + seconds, 0.005
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)
    return True


async def eventually(condition: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """The same, while the tasks of this event loop run on."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.005)
    return True
