"""The gateway's memory over many requests of all kinds: plain, streams, errors, and clients that leave."""

import asyncio
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import linear_regression

import aiohttp
import uvloop

from loadtest.engine_report import aligned
from loadtest.gateway.everything import Services, everything
from loadtest.gateway.load import CHAT, DONE, chat, closed_loop, session
from loadtest.gateway.processes import MIB, Program, gateway, upstream
from loadtest.gateway.telling import checked

MODEL = "mock"
MOST_MEMORY = 120e6  # bytes after all requests, with every feature on
CONCURRENCY = 16
# Bytes a request in the second half; of 100,000 requests that half then adds 2 MB at most. The allocator's pools fill
# up over some 75,000 requests, and what grows after that is a leak.
MOST_GROWTH = 40.0
KINDS = {"plain": 45, "stream": 25, "bad JSON": 5, "refused field": 5, "unknown model": 5, "no route": 5,
         "leaves a plain request": 5, "leaves a stream": 5}  # fmt: skip
EXPECTED = {"bad JSON": 400, "refused field": 400, "unknown model": 404, "no route": 404}


@dataclass(frozen=True)
class Sample:
    """``rss`` and ``pss`` in bytes of all processes, after so many ``requests``, ``seconds`` from the start."""

    requests: int
    seconds: float
    rss: int
    pss: int


def slope(samples: Sequence[Sample]) -> float:
    """Bytes a request by which memory grew, least squares over the samples of the second half.

    Raises:
        ValueError: there are fewer than two.
    """
    steady = [s for s in samples if s.requests >= samples[-1].requests / 2]
    if len(steady) < 2:
        raise ValueError(f"a slope needs two samples in the second half, got {len(steady)}: send more requests")
    return linear_regression([s.requests for s in steady], [s.rss for s in steady]).slope


def kinds(count: int, seed: int = 1) -> Iterator[str]:
    chosen = random.Random(seed)
    return iter(chosen.choices(list(KINDS), list(KINDS.values()), k=count))


async def send(client: aiohttp.ClientSession, kind: str, number: int) -> str:
    """Sends one request, and returns "ok" or what was wrong."""
    path, body = CHAT, chat(MODEL, number, max_tokens=32, stream="stream" in kind, user=f"user-{number}")
    if kind == "bad JSON":
        body = body[:-7]
    elif kind == "refused field":
        body = chat(MODEL, number, chat_template=f"template {number}")
    elif kind == "unknown model":
        body = chat(f"model-{number}", number)
    elif kind == "no route":
        path = f"/v1/nothing/{number}"
    elif kind.startswith("leaves"):
        # A pace of zero makes even long answers short; a million tokens are still there when the client has left.
        body = chat(MODEL, number, max_tokens=1_000_000, stream="stream" in kind)
    try:
        async with client.post(path, data=body) as response:
            if kind == "leaves a stream":
                await response.content.readany()
                response.close()
                return "ok" if response.status == 200 else f"{kind}: HTTP {response.status}"
            whole = await response.read()
            if response.status != EXPECTED.get(kind, 200):
                return f"{kind}: HTTP {response.status}"
            return f"{kind}: no end" if kind == "stream" and DONE not in whole else "ok"
    except (aiohttp.ClientError, OSError) as e:
        return f"{kind}: {type(e).__name__}"


async def leave(client: aiohttp.ClientSession, number: int) -> str:
    """A plain request whose client leaves before the answer."""
    try:
        await asyncio.wait_for(send(client, "leaves a plain request", number), 0.05)
    except TimeoutError:
        return "ok"
    return "leaves a plain request: it was answered"


async def play(target: Program, count: int) -> tuple[list[Sample], Counter[str]]:
    outcomes: Counter[str] = Counter()
    start = time.monotonic()
    samples: list[Sample] = []
    every = max(count // 20, 1)

    def sample(requests: int) -> None:
        samples.append(Sample(requests, time.monotonic() - start, target.rss(), target.pss()))
        print(f"{requests} requests: {samples[-1].rss / MIB:.1f} MiB", file=sys.stderr, flush=True)

    async with session(target.url, key=target.key) as client:
        sample(0)
        done = 0

        async def one(item: tuple[int, str]) -> None:
            nonlocal done
            number, kind = item
            outcome = await (leave(client, number) if kind.startswith("leaves a plain") else send(client, kind, number))
            outcomes[outcome] += 1
            done += 1
            if done % every == 0:
                sample(done)

        await closed_loop(enumerate(kinds(count)), CONCURRENCY, one)
        if done % every:
            sample(done)
    return samples, outcomes


def section(samples: Sequence[Sample], outcomes: Counter[str], full: str = "") -> tuple[str, bool]:
    """The report's part, and whether memory is flat and every request ended as it should.

    Args:
        full: what was written down, where every feature is on.
    """
    growth = slope(samples)
    rows = [["requests", "seconds", "RSS, MiB", "PSS, MiB"]]
    rows += [[f"{s.requests:,}", f"{s.seconds:.0f}", f"{s.rss / MIB:.1f}", f"{s.pss / MIB:.1f}"] for s in samples]
    flat, bad = growth <= MOST_GROWTH, outcomes.total() - outcomes["ok"]
    wrong = "".join(f"; {n} x {what}" for what, n in outcomes.most_common(6) if what != "ok")
    shares = ", ".join(f"{share} % {kind}" for kind, share in KINDS.items())
    checks = [
        (f"{growth:.1f} bytes a request in the second half, at most {MOST_GROWTH:g}", flat),
        (f"{bad} requests did not end as they should{wrong}", not bad),
    ]
    if full:
        last = samples[-1].rss
        checks.append((f"{last / 1e6:.0f} MB RSS of all processes at the end, at most {MOST_MEMORY / 1e6:g}",
                       last <= MOST_MEMORY))  # fmt: skip
    lines = [
        f"## Memory over {samples[-1].requests:,} requests{', with every feature on' if full else ''}",
        f"{CONCURRENCY} at once, of supervisor and workers together: {shares}.",
        aligned(rows),
        checked(checks),
        *([full] if full else []),
    ]
    return "\n\n".join(lines), all(kept for _, kept in checks)


def run_everything(folder: Path, count: int, workers: int, services: Services) -> tuple[str, bool]:
    """As :func:`run`, with every feature on."""
    with (
        upstream(folder, "--delay", "0.00005") as engine,
        everything(folder / "memory", MODEL, engine, workers, services) as full,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        samples, outcomes = runner.run(play(full.target, count))
        what = ", ".join(f"{number:,} {name}" for name, number in full.counts().items())
        return section(samples, outcomes, f"{services}. Written down so far: {what}.")


def run(folder: Path, count: int, workers: int) -> tuple[str, bool]:
    """Sends ``count`` requests to a gateway of its own, whose engine answers without pause."""
    with (
        upstream(folder, "--delay", "0.00005") as engine,
        gateway(folder, "--engine", f"{MODEL}={engine.url}", "--workers", str(workers)) as target,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return section(*runner.run(play(target, count)))
