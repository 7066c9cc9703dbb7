"""When an engine is asked for its metrics, and how long what it told is believed."""

import asyncio
import contextlib

import aiohttp
import yarl

from serving.gateway.probes import Load, get, parse_load

IDLE = 5  # intervals between the metrics of an engine that has nothing to do
STALE = 5  # intervals after which metrics tell nothing any more
NO_METRICS = 60.0  # seconds until an engine without metrics is asked again
NOTHING = Load(0, 0, 0.0)


class Scraper:
    """See the module. Times are the loop's, in seconds.

    Attributes:
        used: whether requests were sent there since it was last asked.
    """

    def __init__(self) -> None:
        self.used = True
        self._next_at = self._told_at = 0.0

    def restarted(self) -> None:
        """It may be another process, which has metrics."""
        self._next_at = 0.0

    def due(self, now: float, interval: float, busy: bool) -> bool:
        """Whether to ask now: failing requests make for more looks than one an interval, but metrics are costly."""
        age = now - self._told_at
        if now < self._next_at or age < interval / 2:
            return False
        return self.used or busy or age >= (IDLE - 0.5) * interval

    async def ask(self, session: aiohttp.ClientSession, url: yarl.URL, seconds: float, interval: float) -> Load | None:
        """What it tells; ``NOTHING`` where it tells none, or has not for long; None: what it told is still believed."""
        self.used = False
        load, status = None, 0
        with contextlib.suppress(aiohttp.ClientError, OSError):
            status, page = await get(session, url, seconds)
            load = parse_load(page) if status == 200 else None
        now = asyncio.get_running_loop().time()
        if load is not None:
            self._told_at = now
            return load
        if 0 < status < 500:
            self._next_at = now + NO_METRICS
            return NOTHING
        return NOTHING if now - self._told_at > STALE * interval else None
