"""An open loop: requests are sent when their time has come, whether or not earlier ones have been answered.

A request's latency counts from the time it was meant to be sent at. A client that falls behind therefore makes the
server look slower, never faster, and a server that stalls is charged for all that should have been sent meanwhile.
"""

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import aiohttp

from loadtest.gateway.load import CHAT, DONE, chat
from loadtest.report import percentile

REJECTED = (429, 503)
COMES_BACK = 50


@dataclass(frozen=True)
class Target:
    """What an answer must keep to be worth something: seconds to its first byte, and to its end."""

    first: float
    total: float


@dataclass(slots=True)
class Sent:
    """One request; times in seconds from the start of the run, 0 for what did not happen.

    Attributes:
        due: when it was meant to be sent.
        began: when it was sent.
        first, end: when the first byte of an answer came, and the last.
        status: HTTP status; 0: the connection failed; -1: given up after the client's patience.
        fault: why the connection failed.
        whole: a complete stream without an error event.
        retry_after: of a rejection, seconds; None: the header was missing.
    """

    due: float
    began: float = 0.0
    first: float = 0.0
    end: float = 0.0
    status: int = 0
    fault: str = ""
    whole: bool = False
    retry_after: int | None = None

    def good(self, target: Target) -> bool:
        return self.whole and self.first - self.due <= target.first and self.end - self.due <= target.total


@dataclass(frozen=True)
class Summary:
    """Of the requests due within ``seconds``. Rates per second; latencies in seconds from when they were due, but those
    of rejections (``reject_*``) from when they were sent; ``faults`` are those of ``failed``."""

    seconds: float
    offered: float
    goodput: float
    answered: float
    rejected: float
    given_up: float
    failed: int
    faults: dict[str, int]
    broken: int
    total_p50: float
    total_p99: float
    first_p50: float
    reject_p50: float
    reject_p90: float
    reject_p99: float
    without_retry_after: int
    retry_after: tuple[int, int, int]
    late_p99: float

    @property
    def good_share(self) -> float:
        return self.goodput / self.offered


def arrivals(rate: float, seconds: float, seed: int) -> list[float]:
    """Poisson arrivals at ``rate`` a second, in seconds from the start."""
    chosen = random.Random(seed)
    times: list[float] = []
    now = chosen.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += chosen.expovariate(rate)
    return times


async def play(
    session: aiohttp.ClientSession,
    model: str,
    times: Sequence[float],
    tokens: int,
    patience: float,
    seed: int = 1,
    returned: list[Sent] | None = None,
) -> list[Sent]:
    """Sends a stream of ``tokens`` tokens at each of ``times``; clients leave after ``patience`` seconds.

    Args:
        returned: one rejected request in ``COMES_BACK`` is sent once more when it was told to, and is added to these.
    """
    questions = random.Random(seed)
    bodies = [
        chat(model, i, stream=True, max_tokens=tokens, ignore_eos=True, temperature=0, seed=questions.randint(0, 2**31))
        for i in range(64)
    ]
    sent = [Sent(due) for due in times]
    start = time.perf_counter()
    tasks: set[asyncio.Task[None]] = set()
    rejected = 0

    async def follow(body: bytes, request: Sent) -> None:
        nonlocal rejected
        await one(session, body, request, start, patience)
        if request.retry_after and returned is not None:
            rejected += 1
            if rejected % COMES_BACK == 1:
                await asyncio.sleep(request.retry_after)
                again = Sent(time.perf_counter() - start)
                returned.append(again)
                await one(session, body, again, start, patience)

    for i, request in enumerate(sent):
        wait = request.due - (time.perf_counter() - start)
        if wait > 0:
            await asyncio.sleep(wait)
        task = asyncio.ensure_future(follow(bodies[i % len(bodies)], request))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return sent


async def one(session: aiohttp.ClientSession, body: bytes, request: Sent, start: float, patience: float) -> None:
    """Sends one request and writes down what became of it."""
    request.began = time.perf_counter() - start
    end = b""
    error = False
    try:
        async with asyncio.timeout(request.due + patience - request.began):
            async with session.post(CHAT, data=body) as response:
                async for data in response.content.iter_any():
                    request.first = request.first or time.perf_counter() - start
                    error = error or b'data: {"error"' in data
                    end = (end + data)[-32:]
                request.status = response.status
                if request.status in REJECTED:
                    with contextlib.suppress(KeyError, ValueError):
                        request.retry_after = int(response.headers["Retry-After"])
        request.whole = request.status == 200 and not error and DONE in end
    except TimeoutError:
        request.status = -1
    except (aiohttp.ClientError, OSError) as e:
        request.status, request.fault = 0, type(e).__name__
    request.end = time.perf_counter() - start


def summarize(sent: Iterable[Sent], seconds: float, target: Target) -> Summary:
    """Sums up a run in which requests were due over ``seconds``."""
    sent = list(sent)
    whole = [s for s in sent if s.whole]
    rejected = [s for s in sent if s.status in REJECTED]
    waits = [s.retry_after for s in rejected if s.retry_after is not None]

    def of(values: Iterable[float], percent: int) -> float:
        values = list(values)
        return percentile(values, percent) if values else 0.0

    return Summary(
        seconds=seconds,
        offered=len(sent) / seconds,
        goodput=sum(s.good(target) for s in sent) / seconds,
        answered=len(whole) / seconds,
        rejected=len(rejected) / seconds,
        given_up=sum(s.status == -1 for s in sent) / seconds,
        failed=sum(s.status not in (200, -1, *REJECTED) for s in sent),
        faults=dict(Counter(s.fault or f"HTTP {s.status}" for s in sent if s.status not in (200, -1, *REJECTED))),
        broken=sum(s.status == 200 and not s.whole for s in sent),
        total_p50=of((s.end - s.due for s in whole), 50),
        total_p99=of((s.end - s.due for s in whole), 99),
        first_p50=of((s.first - s.due for s in whole), 50),
        reject_p50=of((s.end - s.began for s in rejected), 50),
        reject_p90=of((s.end - s.began for s in rejected), 90),
        reject_p99=of((s.end - s.began for s in rejected), 99),
        without_retry_after=len(rejected) - len(waits),
        retry_after=(min(waits), sorted(waits)[len(waits) // 2], max(waits)) if waits else (0, 0, 0),
        late_p99=of((s.began - s.due for s in sent), 99),
    )


def quarters(values: Sequence[float]) -> list[float]:
    """Means of the four quarters of a run, for what must not grow."""
    size = max(len(values) // 4, 1)
    return [mean(values[i * size : (i + 1) * size] or [0.0]) for i in range(4)]


async def wait_until_idle(url: str, session: aiohttp.ClientSession, seconds: float = 60) -> dict[str, Any]:
    """Waits until an engine has no request; returns its last metrics.

    Raises:
        RuntimeError: it has some after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        found = await scrape(url, session)
        if not found.get("vllm:num_requests_running", 0) and not found.get("vllm:num_requests_waiting", 0):
            return found
        if time.monotonic() > deadline:
            raise RuntimeError(f"the engine is still busy {seconds:g} s after the load has ended: {found}")
        await asyncio.sleep(0.5)


async def scrape(url: str, session: aiohttp.ClientSession) -> dict[str, float]:
    """Metrics at ``url``, the sums over the labels of each name."""
    found: dict[str, float] = {}
    async with session.get(url) as response:
        for line in (await response.text()).splitlines():
            if line and line[0] != "#":
                name = line.partition("{")[0].partition(" ")[0]
                found[name] = found.get(name, 0.0) + float(line.rpartition(" ")[2])
    return found
