"""What clients see when an engine dies under many streams, and when all do.

    python -m loadtest.gateway.crash --streams 64

serves the demo checkpoint with two engines (``medassist serve --replicas 2``) and kills each in turn under that many
streams, then both at once. A quarter of the streams is sent just before the kill, so that some have no byte yet.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import uvloop

from loadtest.benchmark import CHECKPOINT
from loadtest.gateway.load import CHAT, DONE, chat
from loadtest.gateway.open_loop import scrape
from loadtest.gateway.processes import Program, free_port, program

ERROR = b'data: {"error"'
MODEL = "demo"
LIMIT = 180.0  # seconds that an engine may take to come back


@dataclass
class Stream:
    """One stream; ``first`` is when its first byte came, seconds of ``time.perf_counter``, 0 if none came."""

    first: float = 0.0
    status: int = 0
    errors: int = 0
    whole: bool = False
    fault: str = ""

    def outcome(self, killed: float) -> str:
        """What the client saw of an engine that was killed at ``killed``."""
        began = "had bytes" if self.first and self.first < killed else "had none"
        if self.fault:
            return f"{began}, {self.fault}"
        if self.status != 200:
            return f"{began}, HTTP {self.status}"
        if self.whole and not self.errors:
            return f"{began}, answered"
        return f"{began}, error event" if self.errors == 1 and not self.whole else f"{began}, broken"


# What may become of a stream. One that had no byte yet must not notice anything.
ALLOWED = {"had bytes, answered", "had bytes, error event", "had none, answered"}


async def stream(client: aiohttp.ClientSession, model: str, number: int, tokens: int, seen: Stream) -> None:
    body = chat(model, number, stream=True, max_tokens=tokens, ignore_eos=True, temperature=0)
    received = b""
    try:
        async with client.post(CHAT, data=body, headers={"Content-Type": "application/json"}) as response:
            seen.status = response.status
            async for data in response.content.iter_any():
                seen.first = seen.first or time.perf_counter()
                received += data
    except (aiohttp.ClientError, OSError) as e:
        seen.fault = type(e).__name__
    seen.errors = received.count(ERROR)
    seen.whole = DONE in received


async def kill_under_streams(url: str, model: str, streams: int, tokens: int, kill: Callable[[], None]) -> Counter[str]:
    """Outcomes of ``streams`` streams of ``tokens`` tokens, under which ``kill`` is called."""
    async with aiohttp.ClientSession(
        url, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120)
    ) as client:
        seen = [Stream() for _ in range(streams)]
        early = streams - streams // 4
        tasks = [asyncio.ensure_future(stream(client, model, i, tokens, s)) for i, s in enumerate(seen[:early])]
        deadline = time.monotonic() + 60
        while not all(s.first or s.fault for s in seen[:early]) and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        tasks += [asyncio.ensure_future(stream(client, model, i, tokens, s)) for i, s in enumerate(seen[early:], early)]
        await asyncio.sleep(0.03)  # until these are at the engines, without an answer yet
        killed = time.perf_counter()
        kill()
        await asyncio.gather(*tasks)
    return Counter(s.outcome(killed) for s in seen)


async def replicas_up(url: str) -> int:
    """How many replicas of all models get requests, by the gateway's metrics."""
    async with aiohttp.ClientSession() as client:
        return int((await scrape(url + "/metrics", client))["medassist_replica_up"])


@dataclass
class Comeback:
    """Short requests from a crash until ``replicas`` are up again; seconds count from the crash.

    Attributes:
        statuses: of the requests; 0 where the connection failed.
        told: of each 503, when it came and its Retry-After (0: it had none).
        answered: when the first 200 came.
        seconds: when all were up; None: not within the limit.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    told: list[tuple[float, int]] = field(default_factory=list)
    answered: float | None = None
    seconds: float | None = None

    @property
    def honest(self) -> bool:
        """Whether every 503 had a Retry-After."""
        return all(after >= 1 for _, after in self.told)

    def __str__(self) -> str:
        end = "not" if self.seconds is None else f"after {self.seconds:.1f} s"
        first = "nothing" if self.answered is None else f"the first after {self.answered:.1f} s"
        counts = ", ".join(f"{n} x HTTP {status}" for status, n in self.statuses.items())
        quarters = self.told[:: max(len(self.told) // 4, 1)]
        told = "; ".join(f"after {when:.1f} s: {after} s" for when, after in quarters)
        return f"all up again {end}, answered {first} ({counts})" + (f"; Retry-After {told}" if told else "")


async def until_back(url: str, model: str, replicas: int, limit: float) -> Comeback:
    """Asks five times a second until ``replicas`` are up again, at most ``limit`` seconds."""
    back, start = Comeback(), time.monotonic()
    body = chat(model, max_tokens=1)
    async with aiohttp.ClientSession(url, timeout=aiohttp.ClientTimeout(total=30)) as client:
        while (passed := time.monotonic() - start) < limit:
            try:
                async with client.post(CHAT, data=body, headers={"Content-Type": "application/json"}) as response:
                    await response.read()
                    back.statuses[response.status] += 1
                    if response.status == 503:
                        back.told.append((passed, int(response.headers.get("Retry-After", "0"))))
                    elif response.status == 200 and back.answered is None:
                        back.answered = passed
            except (aiohttp.ClientError, OSError, TimeoutError):
                back.statuses[0] += 1
            if back.answered is not None and await replicas_up(url) >= replicas:
                back.seconds = time.monotonic() - start
                break
            await asyncio.sleep(0.2)
    return back


def engine_pids(log_dir: Path) -> list[int]:
    """Process ids of the engines of ``medassist serve --log-dir``."""
    state: dict[str, Any] = json.loads((log_dir / "engines.json").read_text())
    return [engine["pid"] for engine in state["engines"]]


async def play(target: Program, log_dir: Path, model: str, streams: int) -> AsyncIterator[tuple[str, bool]]:
    """Kills each engine in turn and then both; yields what was seen, and whether it may be so."""
    await until_back(target.url, model, 2, LIMIT)  # ready is the gateway with one of them
    for number in range(2):
        pid = engine_pids(log_dir)[number]
        outcomes = await kill_under_streams(target.url, model, streams, 300, partial(os.kill, pid, signal.SIGKILL))
        told = ", ".join(f"{n} x {what}" for what, n in outcomes.most_common())
        yield f"engine {number} killed under {streams} streams: {told}", set(outcomes) <= ALLOWED
        back = await until_back(target.url, model, 2, LIMIT)
        what = f"meanwhile the other answered {back.statuses[200]} of {back.statuses.total()} requests"
        yield f"{what}; {back}", set(back.statuses) == {200} and back.seconds is not None
    for pid in engine_pids(log_dir):
        os.kill(pid, signal.SIGKILL)
    back = await until_back(target.url, model, 2, LIMIT)
    yield f"both killed; {back}", set(back.statuses) <= {200, 503} and back.honest and back.seconds is not None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--streams", type=int, default=64)
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as name:
        folder, port = Path(name), free_port()
        command = [sys.executable, "-m", "clients.cli", "serve", f"{MODEL}={given.checkpoint}", "--replicas", "2"]
        command += ["--port", str(port), "--log-dir", str(folder)]
        try:
            with (
                program("medassist", command, f"http://127.0.0.1:{port}", folder, "/ready", timeout=300) as target,
                asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
            ):
                return runner.run(report(target, folder, given.streams))
        except RuntimeError as e:
            print(f"crash: {e}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130


async def report(target: Program, log_dir: Path, streams: int) -> int:
    """Prints what is seen as it is seen. Returns the exit code."""
    good = True
    async for what, kept in play(target, log_dir, MODEL, streams):
        print(f"{'ok' if kept else 'NOT MET'}: {what}", flush=True)
        good = good and kept
    if not good:
        print((log_dir / "medassist.log").read_text()[-3000:], file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
