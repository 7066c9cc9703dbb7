"""A replica under test."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from serving.gateway.canary import CanaryBaseline
from serving.gateway.metrics import Metrics
from serving.gateway.replica import Replica
from serving.gateway.settings import EngineAt, Model, Probes

QUICK = Probes(interval=0.03, timeout=5, canary_interval=60)


class Watched:
    """A replica under test, what it reported, and how often it told of a change."""

    def __init__(
        self,
        at: EngineAt,
        probes: Probes = QUICK,
        baseline: CanaryBaseline | None = None,
        name: str = "0",
        **settings: Any,
    ) -> None:
        self.reports: list[str] = []
        self.changes = 0
        self.metrics = Metrics()
        self.model = Model(engines=(at,), **settings)
        self.replica = Replica(
            name, "demo", at, self.model, probes, self.metrics, baseline or CanaryBaseline(), self.reports.append,
            self._changed,
        )  # fmt: skip

    def _changed(self) -> None:
        self.changes += 1

    def metric(self, name: str, **labels: str) -> float | None:
        labels = {"model": "demo", "replica": self.replica.name} | labels
        return self.metrics.registry.get_sample_value(f"medassist_{name}", labels)


@contextlib.asynccontextmanager
async def watching(*watched: Watched) -> AsyncIterator[None]:
    try:
        for each in watched:
            await each.replica.start()
        yield
    finally:
        for each in watched:
            await each.replica.stop()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))
