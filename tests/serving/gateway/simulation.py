"""Language-model engines under open-loop load, in virtual time: a scheduler and its limiters run against them."""

import asyncio
import heapq
import math
import random
import selectors
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from serving.gateway.errors import ApiError
from serving.gateway.limiter import Limiter
from serving.gateway.metrics import Metrics
from serving.gateway.scheduler import Job, Scheduler
from serving.gateway.settings import EngineAt, LatencyTarget, Model

T = TypeVar("T")


class _VirtualSelector(selectors.SelectSelector):
    """Does not wait: moves the clock to where the loop would have waited until."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "everything waits, and for nothing"
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop in which seconds cost nothing."""

    def __init__(self) -> None:
        self._virtual = _VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


@dataclass(eq=False)
class FakeReplica:
    """A replica without an engine: what the scheduler reads of one."""

    name: str = "0"
    weight: float = 1.0
    state: str = "ready"
    retry_after: int = 3
    running: int = 0
    waiting: int = 0
    cache_usage: float = 0.0
    foreign: int = 0
    outstanding: int = 0

    @property
    def settings(self) -> EngineAt:
        return EngineAt(url=f"http://replica-{self.name}", weight=self.weight)

    @property
    def available(self) -> bool:
        return self.state == "ready"


@dataclass(frozen=True)
class Speed:
    """Seconds of a step: ``fixed``, plus so much per running request, plus so much per prompt token in it.

    ``noise`` is the standard deviation of the logarithm of how much slower or faster it is for 100 steps.
    """

    fixed: float
    per_request: float
    per_prompt_token: float = 0.0
    noise: float = 0.0


SMALL_CPU = Speed(0.005, 0.002, 0.00005)
LARGE_GPU = Speed(0.020, 0.0002, 0.00005)


class Engine(FakeReplica):
    """Continuous batching: each step gives every running request a token, prompts are taken in by chunks."""

    CHUNK = 2048

    def __init__(self, name: str, speed: Speed, sequences: int = 256) -> None:
        super().__init__(name)
        self.speed, self.sequences = speed, sequences
        self._queue: list[tuple[int, int, asyncio.Future[None], asyncio.Future[None]]] = []
        self._ends: list[tuple[int, int, asyncio.Future[None]]] = []  # by the step in which they end
        self._step = self._count = 0
        self._work = asyncio.Event()
        self.task = asyncio.ensure_future(self._run())

    def submit(self, prompt: int, tokens: int) -> tuple[asyncio.Future[None], asyncio.Future[None]]:
        """Futures of the first token and of the last."""
        loop = asyncio.get_running_loop()
        first, last = loop.create_future(), loop.create_future()
        self._queue.append((prompt, tokens, first, last))
        self._work.set()
        return first, last

    async def _run(self) -> None:
        noise, slower = random.Random(3), 1.0
        while True:
            while not self._queue and not self._ends:
                self._work.clear()
                await self._work.wait()
            chunk = self.CHUNK
            begun: list[tuple[int, int, asyncio.Future[None], asyncio.Future[None]]] = []
            while self._queue and chunk > 0 and len(self._ends) + len(begun) < self.sequences:
                prompt, tokens, first, last = self._queue[0]
                if prompt > chunk:
                    self._queue[0] = (prompt - chunk, tokens, first, last)
                    chunk = 0
                else:
                    chunk -= prompt
                    begun.append(self._queue.pop(0))
            batch = len(self._ends) + len(begun)
            speed = self.speed
            if speed.noise and not self._step % 100:
                slower = math.exp(noise.gauss(0, speed.noise))
            per_request = speed.per_request * slower
            await asyncio.sleep(speed.fixed + per_request * batch + speed.per_prompt_token * (self.CHUNK - chunk))
            self._step += 1
            for _, tokens, first, last in begun:
                if self.state != "ready":
                    first.set_exception(ConnectionResetError())
                    continue
                first.set_result(None)
                self._count += 1
                heapq.heappush(self._ends, (self._step + tokens - 1, self._count, last))
            while self._ends and self._ends[0][0] <= self._step:
                heapq.heappop(self._ends)[2].set_result(None)

    def crash(self) -> None:
        """Loses all requests; back when its state is set to ready."""
        self.state = "down"
        for future in [f for *_, first, last in self._queue for f in (first, last)] + [last for *_, last in self._ends]:
            future.set_exception(ConnectionResetError())
        self._queue.clear()
        self._ends.clear()

    def scrape(self) -> None:
        self.running, self.waiting = len(self._ends), len(self._queue)


@dataclass
class Load:
    """Poisson arrivals of one key; ``rate`` per second is by the time since the start. Lengths are log-normal."""

    rate: Callable[[float], float]
    seconds: float = 120.0
    prompt: float = 100.0  # median
    tokens: float = 64.0  # median
    spread: float = 0.7  # of the logarithm
    stream: bool = False
    seed: int = 0
    key: str = ""
    share: float = 1.0


@dataclass
class Result:
    """Of one run; lists are in order of arrival: (moment of arrival, what it was)."""

    answered: list[tuple[float, float, float]] = field(default_factory=list)  # arrival, to first token, to the end
    refused: list[tuple[float, str, float]] = field(default_factory=list)  # arrival, code, seconds until refused
    limits: list[tuple[float, int]] = field(default_factory=list)  # of all replicas together, every second
    longest_queue: int = 0
    target: LatencyTarget = field(default_factory=LatencyTarget)

    def waits(self, start: float = 0.0) -> list[float]:
        """Seconds to the first token, of requests that came from then on and were answered, least first."""
        return sorted(first for at, first, _ in self.answered if at >= start)

    def goodput(self, start: float = 0.0, end: float = math.inf) -> float:
        """Answers within the target per second, of requests that came in this time."""
        last = max([at for at, *_ in self.answered] + [at for at, *_ in self.refused])
        first_token, total = self.target.first_token or math.inf, self.target.total or math.inf
        good = sum(start <= at < end and first <= first_token and whole <= total for at, first, whole in self.answered)
        return good / (min(end, last) - start)

    @property
    def late(self) -> float:
        """Share of the answers that missed the target."""
        first_token, total = self.target.first_token or math.inf, self.target.total or math.inf
        return sum(first > first_token or whole > total for _, first, whole in self.answered) / len(self.answered)


async def simulate(
    speeds: list[Speed],
    load: Load,
    target: LatencyTarget,
    limit: int | None = None,
    away: tuple[float, float] | None = None,
    sequences: int = 256,
    engine: type[Engine] = Engine,
) -> Result:
    """Runs a load against a scheduler; for the arguments see :func:`simulate_keys`."""
    [result] = await simulate_keys(speeds, [load], target, limit, away, sequences, engine)
    return result


async def simulate_keys(
    speeds: list[Speed],
    loads: list[Load],
    target: LatencyTarget,
    limit: int | None = None,
    away: tuple[float, float] | None = None,
    sequences: int = 256,
    engine: type[Engine] = Engine,
    **settings: Any,
) -> list[Result]:
    """Runs loads at the same time against a scheduler. Returns a result for each.

    Args:
        limit: a fixed one for every replica; None: found by the limiters.
        away: when the engines crash, and when they are back.
        sequences: that an engine runs at once; further ones wait within it.
        engine: class of the engines.
        settings: further ones of the model.
    """
    loop = asyncio.get_running_loop()
    engines = [engine(str(i), speed, sequences) for i, speed in enumerate(speeds)]
    model = Model(engines=(engines[0].settings,), latency_target=target, **settings)
    scheduler = Scheduler("m", model, engines, Metrics())
    if limit is not None:
        for slot in scheduler._slots:
            slot.limiter = Limiter(limit, LatencyTarget())
    start = loop.time()

    async def request(load: Load, result: Result, prompt: int, tokens: int) -> None:
        arrived = loop.time()
        job = Job(arrived, None, prompt, 256, stream=load.stream, key=load.key, share=load.share)
        try:
            lease = await scheduler.admit(job)
        except ApiError as e:
            result.refused.append((arrived - start, str(e.code), loop.time() - arrived))
            return
        first, last = lease.replica.submit(prompt, tokens)
        try:
            await first
            to_first = loop.time() - arrived
            if load.stream:
                lease.first_byte()
            await last
        except ConnectionResetError:
            lease.done(False)
            return
        lease.done(True, tokens)
        result.answered.append((arrived - start, to_first, loop.time() - arrived))

    async def play(load: Load) -> Result:
        rng, result = random.Random(load.seed), Result(target=target)
        results.append(result)
        tasks = set()
        while (now := loop.time() - start) < load.seconds:
            prompt = int(rng.lognormvariate(math.log(load.prompt), load.spread)) + 1
            tokens = int(rng.lognormvariate(math.log(load.tokens), load.spread)) + 1
            tasks.add(asyncio.ensure_future(request(load, result, prompt, tokens)))
            await asyncio.sleep(rng.expovariate(load.rate(now)))
            result.longest_queue = max(result.longest_queue, len(scheduler.waiting))
        await asyncio.gather(*tasks)
        return result

    async def scrape() -> None:
        while True:
            await asyncio.sleep(1.0)
            for each in engines:
                each.scrape()
            scheduler.wake()
            for result in results:
                result.limits.append((loop.time() - start, sum(slot.limiter.limit for slot in scheduler._slots)))

    def switch(state: str) -> None:
        for each in engines:
            if state == "down":
                each.crash()
            each.state = state
        scheduler.wake()

    if away is not None:
        loop.call_later(away[0], switch, "down")
        loop.call_later(away[1], switch, "ready")
    results: list[Result] = []
    scraping = asyncio.ensure_future(scrape())
    played = await asyncio.gather(*map(play, loads))
    assert not scheduler.waiting
    assert not scheduler.waiting.flows
    assert not any(each.outstanding for each in engines)
    for task in (scraping, *(each.task for each in engines)):
        task.cancel()
    return list(played)
