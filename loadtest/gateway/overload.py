"""The gateway at twice its engine's capacity, in an open loop, and the bare engine under the same load.

    python -m loadtest.gateway.overload --seconds 120 --report docs/benchmarks/gateway-overload.md

One engine (vLLM, the demo checkpoint by default) serves all runs, over its Unix socket. Capacity is the highest rate of
Poisson arrivals at which at least 95 % of the requests to the bare engine meet the latency target: a closed loop gives
the first estimate, a bisection a rate, and a run of a quarter of `--seconds` confirms it, at 5 % less each time that it
does not. Then the gateway, which is told the target and nothing else of the engine, gets a run at 0.8 of that rate and
one at twice the rate for `--seconds`; the bare engine gets the same arrivals.

Goodput is requests a second that were answered whole and within the target, counted from the moment each was due
(:mod:`loadtest.gateway.open_loop`). Clients leave after `--patience` seconds, upon which engine and gateway stop work
for them; without that the bare engine would fare worse still. Of those rejected, one in fifty comes back once after the
Retry-After it was told; these are extra load and count in no other figure.

The engine has all cores but the last, which the gateway and this client share, unless `--no-pin` is given. The client
runs at a higher priority where it may.
"""

import argparse
import asyncio
import gc
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
import yaml

from loadtest.benchmark import CHECKPOINT, environment
from loadtest.engine_report import aligned
from loadtest.gateway.engines import engine
from loadtest.gateway.load import CHAT, chat, closed_loop, session
from loadtest.gateway.open_loop import (
    REJECTED,
    Sent,
    Summary,
    Target,
    arrivals,
    one,
    play,
    quarters,
    scrape,
    summarize,
    wait_until_idle,
)
from loadtest.gateway.processes import MIB, Program, allow_many_connections, gateway
from loadtest.gateway.telling import checked, command_line, how, tell

MODEL = "demo"
SHARE = 0.95  # of the requests that must meet the target at capacity


@dataclass
class Watch:
    """Once a second during a run: requests waiting in the gateway and at the engine, its concurrency limit, bytes."""

    queue: list[float] = field(default_factory=list)
    waiting: list[float] = field(default_factory=list)
    running: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)


@dataclass
class Bench:
    """Where to send to, and how."""

    engine: aiohttp.ClientSession
    target: Target
    tokens: int
    patience: float

    async def trial(self, rate: float, seconds: float, seed: int) -> Summary:
        """A run on the bare engine."""
        await wait_until_idle("/metrics", self.engine)
        sent = await play(self.engine, MODEL, arrivals(rate, seconds, seed), self.tokens, self.patience, seed)
        found = summarize(sent, seconds, self.target)
        progress(f"bare engine at {rate:.1f}/s: {100 * found.good_share:.1f} % within the target")
        return found


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


async def closed_estimate(bench: Bench, seconds: float = 6) -> float:
    """Requests a second of the fastest closed loop that keeps the target, of 8, 16, 32, ... at once.

    Raises:
        RuntimeError: not even 8 at once do.
    """
    best, concurrency = 0.0, 8
    while concurrency <= 512:
        latencies: list[float] = []
        end = time.perf_counter() + seconds

        async def one(number: int, end: float = end, latencies: list[float] = latencies) -> None:
            start = time.perf_counter()
            if start > end:
                return
            body = chat(MODEL, number, stream=True, max_tokens=bench.tokens, ignore_eos=True, temperature=0)
            async with bench.engine.post(CHAT, data=body) as response:
                await response.read()
            latencies.append(time.perf_counter() - start)

        await closed_loop(range(100_000), concurrency, one)
        rate = len(latencies) / seconds
        kept = sum(latency <= bench.target.total for latency in latencies) / max(len(latencies), 1)
        progress(f"closed loop of {concurrency}: {rate:.1f}/s, {100 * kept:.0f} % within the target")
        if kept < SHARE:
            break
        best, concurrency = max(best, rate), concurrency * 2
    if not best:
        raise RuntimeError(f"the engine does not keep {bench.target.total:g} s with 8 requests at once: raise --total")
    return best


async def find_capacity(
    bench: Bench, seconds: float, steps: int, confirm: float
) -> tuple[float, Summary, list[tuple[float, float]]]:
    """The highest rate that keeps the target, the run of ``confirm`` seconds that shows it, and every rate tried with
    its share within the target. Short runs flatter: a queue that grows slowly has not grown long when they end.

    Raises:
        RuntimeError: none of the rates does.
    """
    estimate = await closed_estimate(bench)
    low, high = 0.0, 1.3 * estimate
    tried: list[tuple[float, float]] = []
    rate = 0.9 * estimate
    for step in range(steps):
        share = (await bench.trial(rate, seconds, step)).good_share
        tried.append((rate, share))
        low, high = (rate, high) if share >= SHARE else (low, rate)
        rate = (low + high) / 2 if low else high * 0.8
    rate = low or rate
    for step in range(10):
        found = await bench.trial(rate, confirm, steps + step)
        tried.append((rate, found.good_share))
        if found.good_share >= SHARE:
            return rate, found, tried
        rate *= 0.95
    raise RuntimeError(f"no rate tried kept the target: {tried}")


async def watched(target: Program | None, unix: str, watch: Watch) -> None:
    """Samples until cancelled; an overloaded engine may leave gaps."""
    processes = target.processes() if target else []  # looking for them takes the client's time
    async with session("http://localhost", unix, timeout=5) as at_engine, aiohttp.ClientSession() as at_gateway:
        while True:
            begun = time.monotonic()
            try:
                found = await scrape("/metrics", at_engine)
                watch.running.append(found.get("vllm:num_requests_running", 0.0))
                watch.waiting.append(found.get("vllm:num_requests_waiting", 0.0))
                if target:
                    found = await scrape(target.url + "/metrics", at_gateway)
                    watch.queue.append(found.get("medassist_queue_length", 0.0))
                    watch.limit.append(found.get("medassist_concurrency_limit", 0.0))
                    watch.memory.append(sum(process.memory_info().rss for process in processes) / MIB)
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
            await asyncio.sleep(max(1 - (time.monotonic() - begun), 0.2))


@dataclass(frozen=True)
class Run:
    """One run and what was seen meanwhile; ``recovery`` is seconds from its end to the first answer in time;
    ``cpu_ms`` the gateway's CPU milliseconds a request; ``client_cores`` what the client took of a core."""

    name: str
    summary: Summary
    watch: Watch
    returned: list[Sent]
    recovery: float
    cpu_ms: float
    client_cores: float


async def load(bench: Bench, name: str, target: Program | None, unix: str, rate: float, seconds: float) -> Run:
    """One run through ``target``, or on the bare engine if None."""
    await wait_until_idle("/metrics", bench.engine)
    watch = Watch()
    returned: list[Sent] = []
    url = target.url if target else "http://localhost"
    async with session(url, "" if target else unix, timeout=None) as client:
        watching = asyncio.ensure_future(watched(target, unix, watch))
        before, own = target.cpu_seconds() if target else 0.0, time.process_time()
        times = arrivals(rate, seconds, seed=7)
        sent = await play(client, MODEL, times, bench.tokens, bench.patience, 7, returned)
        cpu = (target.cpu_seconds() - before if target else 0.0) / len(sent) * 1e3
        own = (time.process_time() - own) / sent[-1].due
        recovery = await recovered(client, bench)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    found = summarize(sent, seconds, bench.target)
    progress(f"{name} at {rate:.1f}/s: {found.goodput:.1f}/s good, {found.rejected:.1f}/s rejected")
    return Run(name, found, watch, returned, recovery, cpu, own)


async def recovered(client: aiohttp.ClientSession, bench: Bench) -> float:
    """Seconds until a request is answered in time again; a try every quarter of a second."""
    start = time.perf_counter()
    body = chat(MODEL, 0, stream=True, max_tokens=8, ignore_eos=True, temperature=0)
    while (waited := time.perf_counter() - start) < 120:
        request = Sent(0.0)
        await one(client, body, request, time.perf_counter(), bench.patience)
        if request.good(bench.target):
            return waited
        await asyncio.sleep(0.25)
    return waited


async def measure(
    given: argparse.Namespace, unix: str, target: Program
) -> tuple[float, Summary, list[tuple[float, float]], list[Run]]:
    """Finds capacity and plays the runs."""
    goal = Target(given.first_token, given.total)
    async with session("http://localhost", unix, timeout=None) as at_engine:
        bench = Bench(at_engine, goal, given.tokens, given.patience or 5 * given.total)
        quarter = given.seconds / 4
        capacity, shown, tried = await find_capacity(bench, given.search_seconds, given.search_steps, quarter)
        runs = [
            await load(bench, "gateway, 0.8 of it", target, unix, 0.8 * capacity, quarter),
            await load(bench, "gateway, twice it", target, unix, 2 * capacity, given.seconds),
            await load(bench, "bare engine, twice it", None, unix, 2 * capacity, given.seconds),
        ]
    return capacity, shown, tried, runs


def table(shown: Summary, runs: Sequence[Run]) -> str:
    """A line for the run that showed the capacity, and for each run."""
    rows = [["", "offered/s", "goodput/s", "answered/s", "rejected/s", "given up/s", "failed", "broken", "total p50 s",
             "total p99 s", "first p50 s", "reject p50 ms", "p90", "p99", "recovery s", "client late p99 ms",
             "client, cores", "gateway CPU ms"]]  # fmt: skip
    lines = [("bare engine, capacity", shown, ["-", "-", "-"])]
    for run in runs:
        cpu = f"{run.cpu_ms:.2f}" if run.cpu_ms else "-"
        lines.append((run.name, run.summary, [f"{run.recovery:.1f}", f"{run.client_cores:.2f}", cpu]))
    for name, s, (recovery, client, cpu) in lines:
        times = (s.reject_p50, s.reject_p90, s.reject_p99)
        rejections = [f"{1e3 * seconds:.1f}" if s.rejected else "-" for seconds in times]
        rows.append(
            [name, *(f"{v:.1f}" for v in (s.offered, s.goodput, s.answered, s.rejected, s.given_up)),
             str(s.failed), str(s.broken), *(f"{v:.2f}" for v in (s.total_p50, s.total_p99, s.first_p50)), *rejections,
             recovery, f"{1e3 * s.late_p99:.1f}", client, cpu]
        )  # fmt: skip
    return aligned(rows)


def faults(runs: Sequence[Run]) -> str:
    """Why requests failed, and whether the client itself was too slow for its figures to be believed."""
    lines = [
        f"- {run.name}, failed: {', '.join(f'{n} x {what}' for what, n in run.summary.faults.items())}"
        for run in runs
        if run.summary.failed
    ]
    for run in runs:
        if run.summary.late_p99 > 0.05:
            lines.append(
                f"- {run.name}: the client sent late by {1e3 * run.summary.late_p99:.0f} ms (p99), which counts "
                "against the server; a machine with more or quieter cores would give better figures."
            )
    return "\n".join(lines)


def over_time(runs: Sequence[Run]) -> str:
    """Means of the four quarters of each run."""
    rows = [["", "what", "1st quarter", "2nd", "3rd", "4th", "most"]]
    for run in runs:
        for what, values in (
            ("waiting in the gateway", run.watch.queue),
            ("concurrency limit", run.watch.limit),
            ("running at the engine", run.watch.running),
            ("waiting at the engine", run.watch.waiting),
            ("gateway's memory, MiB", run.watch.memory),
        ):
            if values:
                rows.append([run.name, what, *(f"{v:.1f}" for v in quarters(values)), f"{max(values):.1f}"])
    return aligned(rows)


def verdict(shown: Summary, overload: Run) -> list[tuple[str, bool]]:
    """What was promised of twice the capacity."""
    s, of = overload.summary, shown.goodput
    memory, queue = quarters(overload.watch.memory), quarters(overload.watch.queue)
    grown = memory[3] - memory[1]
    low, middle, high = s.retry_after
    return [
        (f"goodput {s.goodput:.1f}/s is {100 * s.goodput / of:.0f} % of capacity's {of:.1f}/s, at least 90",
         s.goodput >= 0.9 * of),
        (f"rejected within {1e3 * s.reject_p99:.0f} ms (p99), at most 250", s.reject_p99 <= 0.25),
        (f"{s.without_retry_after} rejections without Retry-After (least, median, most: {low}, {middle}, {high} s)",
         not s.without_retry_after),
        (f"{s.failed} failed and {s.broken} broken answers", not s.failed + s.broken),
        (f"memory {grown:+.1f} MiB from the second quarter to the last, at most 2", grown <= 2),
        (f"queue {queue[1]:.0f} requests in the second quarter, {queue[3]:.0f} in the last, at most 1.25 times as many",
         queue[3] <= 1.25 * queue[1] + 5),
    ]  # fmt: skip


def honesty(overload: Run, target: Target) -> str:
    """What became of those that came back when they were told to."""
    returned = overload.returned
    if not returned:
        return ""
    good = sum(r.good(target) for r in returned)
    again = sum(r.status in REJECTED for r in returned)
    return (
        f"Of the rejected, {len(returned)} came back after their Retry-After, into the same overload: {good} were "
        f"answered in time, {again} rejected again. At twice the capacity half would be a fair share. When the load "
        f"had ended, a request was answered in time after {overload.recovery:.1f} s."
    )


@contextmanager
def servers(
    given: argparse.Namespace, folder: Path, prepare: Callable[[Path], None] | None = None, **more: Any
) -> Iterator[tuple[str, Program]]:
    """The engine and a gateway in front of it. Yields the engine's socket and the gateway.

    Args:
        prepare: is called with the settings' file before the gateway starts.
        more: further settings.
    """
    cores = sorted(os.sched_getaffinity(0))
    split = len(cores) > 1 and not given.no_pin
    engine_cores, ours = (cores[:-1], cores[-1:]) if split else (cores, [])
    if split:
        os.sched_setaffinity(0, ours)
    with engine(folder, given.checkpoint, MODEL, engine_cores) as unix:
        settings = folder / "settings.yaml"
        model = {
            "engines": [{"url": f"unix:{unix}"}],
            "latency_target": {"first_token": given.first_token, "total": given.total},
        }
        settings.write_text(yaml.safe_dump({"models": {MODEL: model}, **more}))
        if prepare is not None:
            prepare(settings)
        with gateway(folder, "--config", str(settings), cores=ours) as target:
            yield unix, target


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Options of programs that put an engine under load."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", type=Path, default=CHECKPOINT, help="what the engine serves (default: %(default)s)")
    add("--total", type=float, default=2.0, help="latency target, seconds to the end (default: %(default)g)")
    add("--first-token", type=float, default=1.0, help="latency target, seconds to the first token (default: 1)")
    add("--tokens", type=int, default=64, help="of every answer (default: %(default)s)")
    add("--seconds", type=float, default=120, help="of a run at twice the capacity (default: %(default)g)")
    add("--patience", type=float, default=0, help="seconds after which clients leave (default: 5 x --total)")
    add("--search-seconds", type=float, default=20, help="of a run of the search for capacity (default: %(default)g)")
    add("--search-steps", type=int, default=6, help="runs of that search (default: %(default)s)")
    add("--no-pin", action="store_true", help="let all programs run on all cores")
    add("--report", type=Path, metavar="FILE", help="write a Markdown report there")
    return parser


def stand_apart() -> None:
    """As if this client were on another machine: what it measures must not wait for what it measures."""
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, -10)
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser(__doc__).parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    facts = environment(command_line("loadtest.gateway.overload", arguments))
    allow_many_connections()
    try:
        with (
            tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as folder,
            servers(given, Path(folder)) as (unix, target),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            stand_apart()
            capacity, shown, tried, runs = runner.run(measure(given, unix, target))
    except (RuntimeError, ValueError) as e:
        print(f"overload: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    goal = Target(given.first_token, given.total)
    checks = verdict(shown, runs[1])
    tries = ", ".join(f"{rate:.1f}/s: {100 * share:.1f} %" for rate, share in tried)
    tell(
        [
            "# The gateway at twice its engine's capacity",
            aligned([["", ""], *([name, value] for name, value in facts.items())]),
            f"Latency target: first token within {goal.first:g} s and the end within {goal.total:g} s, streams of "
            f"{given.tokens} tokens. Capacity of the bare engine: {capacity:.1f} requests a second (tried: {tries} "
            "within the target).",
            checked(checks),
            table(shown, runs),
            faults(runs),
            honesty(runs[1], goal),
            over_time(runs),
            f"## How\n\n{how(__doc__)}",
        ],
        given.report,
    )
    return 0 if all(kept for _, kept in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
