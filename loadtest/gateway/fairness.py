"""A greedy key beside a polite one at an engine: what the polite one has left.

    python -m loadtest.gateway.fairness --seconds 60 --report docs/benchmarks/gateway-fairness.md

One engine and one gateway, as in :mod:`loadtest.gateway.overload`, which also says what capacity and goodput are; here
the gateway has a store and two keys with equal shares and no limits. The polite key asks for `--polite` of the
capacity, first alone, then beside a greedy key that asks for `--greedy` times as much at the same time, and last beside
one with the same key, as it would be without fair shares. All are open loops with Poisson arrivals.
"""

import argparse
import asyncio
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from loadtest.benchmark import environment
from loadtest.engine_report import aligned
from loadtest.gateway.everything import medassist
from loadtest.gateway.load import session
from loadtest.gateway.open_loop import Summary, Target, arrivals, play, summarize, wait_until_idle
from loadtest.gateway.overload import MODEL, Bench, find_capacity, parser, progress, servers, stand_apart
from loadtest.gateway.processes import Program, allow_many_connections
from loadtest.gateway.telling import checked, command_line, how, tell

POLITE, GREEDY = "polite", "greedy"


@dataclass(frozen=True)
class Run:
    """What one key saw; ``name`` says of whom, and beside whom."""

    name: str
    summary: Summary


async def side_by_side(
    bench: Bench, target: Program, seconds: float, loads: Sequence[tuple[str, str, float]]
) -> list[Run]:
    """Plays loads at the same time: for each a name, the secret of a key and a rate."""
    await wait_until_idle("/metrics", bench.engine)

    async def one(name: str, key: str, rate: float, seed: int) -> Run:
        async with session(target.url, timeout=None, key=key) as client:
            sent = await play(client, MODEL, arrivals(rate, seconds, seed), bench.tokens, bench.patience, seed)
        found = summarize(sent, seconds, bench.target)
        progress(f"{name} at {rate:.1f}/s: {found.goodput:.1f}/s good, {found.rejected:.1f}/s rejected")
        return Run(name, found)

    return list(await asyncio.gather(*(one(*load, seed=7 + i) for i, load in enumerate(loads))))


async def measure(
    given: argparse.Namespace, unix: str, target: Program, keys: dict[str, str]
) -> tuple[float, list[Run]]:
    """Finds capacity, unless it is given, and plays the runs."""
    async with session("http://localhost", unix, timeout=None) as at_engine:
        goal = Target(given.first_token, given.total)
        bench = Bench(at_engine, goal, given.tokens, given.patience or 5 * given.total)
        capacity = given.capacity
        if not capacity:
            capacity, *_ = await find_capacity(bench, given.search_seconds, given.search_steps, given.seconds / 4)
        rate = given.polite * capacity
        alone = (f"{POLITE}, alone", keys[POLITE], rate)
        beside = (f"{POLITE}, beside {GREEDY}", keys[POLITE], rate)
        greedy = (f"{GREEDY}, beside {POLITE}", keys[GREEDY], given.greedy * rate)
        shared = (f"{POLITE}, with the same key", keys[POLITE], rate)
        others = (f"{GREEDY}, with the same key", keys[POLITE], given.greedy * rate)
        # The first run lets the gateway find the engine's limit, and is not counted.
        await side_by_side(bench, target, given.seconds / 4, [("to warm up", keys[GREEDY], capacity)])
        runs = [
            run
            for loads in ([alone], [beside, greedy], [shared, others])
            for run in await side_by_side(bench, target, given.seconds, loads)
        ]
    return capacity, runs


def table(runs: Sequence[Run]) -> str:
    rows = [["", "offered/s", "goodput/s", "answered/s", "rejected/s", "failed", "first p50 s", "total p50 s",
             "total p99 s", "reject p50 ms", "p99", "client late p99 ms"]]  # fmt: skip
    for run in runs:
        s = run.summary
        rejections = [f"{1e3 * seconds:.1f}" if s.rejected else "-" for seconds in (s.reject_p50, s.reject_p99)]
        rows.append(
            [run.name, *(f"{v:.1f}" for v in (s.offered, s.goodput, s.answered, s.rejected)), str(s.failed + s.broken),
             *(f"{v:.2f}" for v in (s.first_p50, s.total_p50, s.total_p99)), *rejections, f"{1e3 * s.late_p99:.1f}"]
        )  # fmt: skip
    return aligned(rows)


def verdict(runs: Sequence[Run], capacity: float) -> list[tuple[str, bool]]:
    """What is promised of the polite key."""
    alone, beside, greedy = (run.summary for run in runs[:3])
    together = beside.goodput + greedy.goodput
    return [
        (f"the polite key's goodput beside the greedy one is {beside.goodput:.1f}/s, "
         f"{100 * beside.goodput / alone.goodput:.0f} % of what it is alone, at least 90",
         beside.goodput >= 0.9 * alone.goodput),
        (f"{100 * beside.rejected / beside.offered:.1f} % of its requests were rejected, at most 5",
         beside.rejected <= 0.05 * beside.offered),
        (f"both together have {together:.1f}/s, {100 * together / capacity:.0f} % of the capacity, at least 90",
         together >= 0.9 * capacity),
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser(__doc__)
    options.add_argument("--polite", type=float, default=0.3, help="share of the capacity (default: %(default)g)")
    options.add_argument("--greedy", type=float, default=10, help="times as much (default: %(default)g)")
    options.add_argument("--capacity", type=float, default=0, help="requests a second, instead of looking for it")
    given = options.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    facts = environment(command_line("loadtest.gateway.fairness", arguments))
    allow_many_connections()
    keys: dict[str, str] = {}

    def prepare(settings: Path) -> None:
        for name in (POLITE, GREEDY):
            keys[name] = medassist("keys", "create", "--tenant", name, "--config", str(settings)).strip()

    try:
        with (
            tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as folder,
            servers(given, Path(folder), prepare, home=str(Path(folder) / "home")) as (unix, target),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            stand_apart()
            time.sleep(1)  # until the workers know the keys
            capacity, runs = runner.run(measure(given, unix, target, keys))
    except (RuntimeError, ValueError) as e:
        print(f"fairness: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    checks = verdict(runs, capacity)
    tell(
        [
            "# A greedy key beside a polite one",
            aligned([["", ""], *([name, value] for name, value in facts.items())]),
            f"Latency target: first token within {given.first_token:g} s and the end within {given.total:g} s, streams "
            f"of {given.tokens} tokens. Capacity of the bare engine: {capacity:.1f} requests a second.",
            checked(checks),
            table(runs),
            f"## How\n\n{how(__doc__)}",
        ],
        given.report,
    )
    return 0 if all(kept for _, kept in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
