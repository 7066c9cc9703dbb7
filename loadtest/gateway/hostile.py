"""What the gateway does under attack: thousands of malformed or hostile requests, drawn from a seed.

    python -m loadtest.gateway.hostile --requests 10000 --report docs/benchmarks/gateway-hostile.md

The gateway stands in front of a double of an engine, which writes down every request that reaches it and judges it by
rules of its own (:mod:`loadtest.gateway.judge`). Each case has a connection of its own. Quick cases go `--concurrency`
at a time; at the same time several hundred slow clients hold connections with trickled headers, trickled bodies,
silence or answers that they never read. A case fails when it is answered with a status of 500 or more or with bytes
that are no HTTP, when its connection is still open at its deadline, or, where the engine must not get it, when it is
answered with success or its text reaches the engine. After every hundredth case an honest request must be answered.

The gateway's receive limits are made short (`Limits`), so that slow clients meet them many times in one run.
"""

import argparse
import asyncio
import random
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import uvloop
import yaml

from loadtest.benchmark import environment
from loadtest.engine_report import aligned
from loadtest.gateway.hostile_advisories import advisory
from loadtest.gateway.hostile_cases import KINDS, MODEL, Case, slow
from loadtest.gateway.load import CHAT, chat, session
from loadtest.gateway.processes import MIB, Program, allow_many_connections, gateway, upstream
from loadtest.gateway.telling import checked, command_line, how, tell
from loadtest.gateway.wire import statuses

ADVISORIES = 25  # their share, beside the weights of KINDS
SLOW_SHARE = 0.06
QUICK_DEADLINE = 10.0  # seconds over the gateway's own limits
MOST_GROWTH = 24 * MIB  # of memory, after the first tenth


@dataclass(frozen=True)
class Limits:
    """The gateway's receive limits in this run, in seconds; its own defaults are longer."""

    header: float = 3.0
    body: float = 5.0
    send: float = 5.0
    keep_alive: float = 5.0

    def settings(self, engine: str) -> dict[str, Any]:
        http = {f"{name}_timeout": getattr(self, name) for name in ("header", "body", "send")}
        return {"models": {MODEL: {"engines": [{"url": engine}]}}, "http": http | {"keep_alive": self.keep_alive}}

    @property
    def longest(self) -> float:
        return max(self.header + self.body, self.send, self.keep_alive)


@dataclass
class Outcomes:
    """``counts`` by kind and status ("closed" without an answer); ``failures`` by kind and what was wrong."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], int] = field(default_factory=dict)
    honest: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def failed(self, kind: str, why: str, number: int) -> None:
        self.failures[kind, why] += 1
        self.examples.setdefault((kind, why), number)


def generate(count: int, seed: int) -> Iterator[Case]:
    """``count`` quick cases, the same for the same seed."""
    chosen = random.Random(seed)
    makers = [*KINDS, advisory]
    weights = [*KINDS.values(), ADVISORIES]
    for number in range(count):
        yield chosen.choices(makers, weights)[0](chosen, f"case-{number}-")


def generate_slow(first: int, count: int, seed: int, limits: Limits) -> Iterator[Case]:
    """``count`` slow cases, numbered from ``first``."""
    chosen = random.Random(seed)
    for number in range(first, first + count):
        yield slow(chosen, f"case-{number}-", limits.header / 5)


def judge(case: Case, answer: bytes | None) -> tuple[list[str], str]:
    """Words for the table, and what was wrong with an answer ("" if nothing was). None: it hung."""
    if answer is None:
        return ["hung"], "hung"
    if not answer:
        return ["closed"], ""
    if case.then == "stare":
        return ["cut off"], ""
    found = statuses(answer)
    words = [str(status) if status else "not HTTP" for status in found]
    if 0 in found:
        return words, "not HTTP"
    if worst := [status for status in found if status >= 500]:
        return words, f"answered {worst[0]}"
    if case.refused and any(200 <= status < 300 for status in found):
        return words, "accepted"
    return words, ""


async def send(port: int, case: Case, deadline: float) -> bytes | None:
    """What came back until the connection closed; None if it had not within ``deadline`` seconds."""
    loop = asyncio.get_running_loop()
    with socket.socket() as raw:
        raw.setblocking(False)
        if case.then == "stare":
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        answer = bytearray()
        try:
            async with asyncio.timeout(deadline):
                await loop.sock_connect(raw, ("127.0.0.1", port))
                if case.then == "leave":
                    with suppress(OSError):
                        for piece in case.pieces:
                            await loop.sock_sendall(raw, piece)
                        await asyncio.sleep(0.02)
                        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
                        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)  # a reset, not an orderly end
                    return b""
                writing = asyncio.ensure_future(_write(loop, raw, case))
                try:
                    if case.then == "stare":
                        await writing
                        await _cut_off(raw)
                        return b"-"
                    while data := await loop.sock_recv(raw, 65536):
                        answer += data
                finally:
                    writing.cancel()
                    await asyncio.gather(writing, return_exceptions=True)
        except TimeoutError:
            return None
        except OSError:  # reset: the gateway did not wait for the rest of what we sent
            pass
        return bytes(answer)


async def _write(loop: asyncio.AbstractEventLoop, raw: socket.socket, case: Case) -> None:
    with suppress(OSError):
        for piece in case.pieces:
            await loop.sock_sendall(raw, piece)
            if case.pause:
                await asyncio.sleep(case.pause)
        if case.then == "finish":
            raw.shutdown(socket.SHUT_WR)


async def _cut_off(raw: socket.socket) -> None:
    """Returns when the gateway has closed a connection on which nothing is read."""
    while raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) in _OPEN:  # noqa: ASYNC110 - the kernel knows, and tells no event
        await asyncio.sleep(0.1)


_OPEN = (b"\x01",)  # TCP_ESTABLISHED


async def attack(
    target: Program, count: int, seed: int, concurrency: int, limits: Limits, slow_at_once: int
) -> Outcomes:
    """Sends ``count`` cases in all, and honest requests among them."""
    port = int(target.url.rpartition(":")[2])
    outcomes = Outcomes()
    slow_count = min(round(SLOW_SHARE * count), count)
    quick = enumerate(generate(count - slow_count, seed))
    trickling = enumerate(generate_slow(count - slow_count, slow_count, seed, limits), count - slow_count)
    deadline = limits.longest + QUICK_DEADLINE
    finished = 0
    await honest(target, outcomes)
    outcomes.memory.append(target.rss())

    async def worker(cases: Iterator[tuple[int, Case]]) -> None:
        nonlocal finished
        for number, case in cases:
            answer = await send(port, case, deadline)
            words, fault = judge(case, answer)
            outcomes.counts.update((case.kind, word) for word in words or ["closed"])
            if fault:
                outcomes.failed(case.kind, fault, number)
            finished += 1
            if finished % 100 == 0:
                await honest(target, outcomes)
            if finished % max(count // 50, 1) == 0:
                outcomes.memory.append(target.rss())

    await asyncio.gather(
        *[worker(quick) for _ in range(concurrency)], *[worker(trickling) for _ in range(slow_at_once)]
    )
    await honest(target, outcomes)
    outcomes.memory.append(target.rss())
    return outcomes


async def honest(target: Program, outcomes: Outcomes) -> None:
    """An ordinary request, which must be answered."""
    start = time.perf_counter()
    try:
        async with session(target.url, timeout=20) as client, client.post(CHAT, data=chat(MODEL, max_tokens=2)) as got:
            await got.read()
            if got.status != 200:
                outcomes.failed("honest", f"answered {got.status}", -1)
    except Exception as e:
        outcomes.failed("honest", type(e).__name__, -1)
    outcomes.honest.append(time.perf_counter() - start)


def read_engine(state: dict[str, Any], refused: Sequence[bool], outcomes: Outcomes, kinds: Sequence[str]) -> None:
    """Adds what the engine's double found: cases that must not have arrived, and requests that are not valid."""
    for number in state["cases"]:
        if number < len(refused) and refused[number]:
            outcomes.failed(kinds[number], "reached the engine", number)
    for violation in state["violations"]:
        number = next(iter(violation["cases"]), -1)
        kind = kinds[number] if 0 <= number < len(kinds) else "?"
        outcomes.failed(kind, f"the engine got {violation['fault']}", number)


def run(
    count: int, seed: int, folder: Path, concurrency: int = 32, slow_at_once: int = 300, workers: int = 1
) -> tuple[Outcomes, float]:
    """Attacks a gateway of its own. Returns what happened, and the seconds it took.

    Raises:
        RuntimeError: the gateway did not start, or the engine's double did not get a single honest request.
    """
    allow_many_connections()
    limits = Limits()
    with upstream(folder, "--judge", "--delay", "0") as engine:
        settings = folder / "settings.yaml"
        settings.write_text(yaml.safe_dump(limits.settings(engine.url)))
        with (
            gateway(folder, "--config", str(settings), "--workers", str(workers)) as target,
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            start = time.monotonic()
            outcomes = runner.run(attack(target, count, seed, concurrency, limits, slow_at_once))
            seconds = time.monotonic() - start

            async def ask() -> dict[str, Any]:
                async with session(engine.url) as client, client.get("/state") as response:
                    found: dict[str, Any] = orjson.loads(await response.read())
                    return found

            state = runner.run(ask())
    if not state["answered"]:
        raise RuntimeError("no request reached the engine's double, so that this has shown nothing")
    slow_count = min(round(SLOW_SHARE * count), count)
    cases = [*generate(count - slow_count, seed), *generate_slow(count - slow_count, slow_count, seed, limits)]
    read_engine(state, [case.refused for case in cases], outcomes, [case.kind for case in cases])
    return outcomes, seconds


def growth(memory: Sequence[int]) -> int:
    """Bytes between the first samples after a tenth of the run and the last; medians of three."""
    steady = memory[len(memory) // 10 :]
    return sorted(steady[-3:])[len(steady[-3:]) // 2] - sorted(steady[:3])[len(steady[:3]) // 2]


def table(counts: Counter[tuple[str, str]]) -> str:
    columns = sorted({word for _, word in counts})
    kinds = sorted({kind for kind, _ in counts})
    rows = [["", *columns, "cases"]]
    rows += [
        [kind, *(str(counts[kind, c] or "-") for c in columns), str(sum(counts[kind, c] for c in columns))]
        for kind in kinds
    ]
    return aligned(rows)


def verdict(outcomes: Outcomes) -> list[tuple[str, bool]]:
    def of(*starts: str) -> int:
        return sum(n for (_, why), n in outcomes.failures.items() if why.startswith(starts))

    honest_failed = sum(n for (kind, _), n in outcomes.failures.items() if kind == "honest")
    grown = growth(outcomes.memory)
    checks = [
        ("answered with 500 or more", of("answered 5", "not HTTP")),
        ("open at their deadline", of("hung")),
        ("answered with success, or seen by the engine, that must not be", of("accepted", "reached")),
        ("seen by the engine and not valid", of("the engine got")),
        (f"of {len(outcomes.honest)} honest requests failed", honest_failed),
    ]
    slowest = max(outcomes.honest) * 1e3
    return [
        *((f"{n} {what}", not n) for what, n in checks),
        (
            f"memory: {grown / MIB:+.1f} MiB after the first tenth, at most {MOST_GROWTH / MIB:.0f}",
            grown <= MOST_GROWTH,
        ),
        (f"the slowest honest request took {slowest:.0f} ms, at most 5,000", slowest <= 5000),
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--concurrency", type=int, default=32, help="quick cases at once")
    parser.add_argument("--slow", type=int, default=300, help="slow clients at once")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the gateway")
    parser.add_argument("--show", type=int, metavar="CASE", help="print what a case sends, and stop")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a Markdown report there")
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(arguments)
    if given.show is not None:
        case = list(generate(given.show + 1, given.seed))[-1]
        print(case.kind, case.then, *case.pieces, sep="\n")
        return 0
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    facts = environment(command_line("loadtest.gateway.hostile", arguments))
    try:
        with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as folder:
            outcomes, seconds = run(
                given.requests, given.seed, Path(folder), given.concurrency, given.slow, given.workers
            )
    except (RuntimeError, ValueError) as e:
        print(f"hostile: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    checks = verdict(outcomes)
    failures = [
        f"- {kind}: {n} x {why} (the first is case {outcomes.examples[kind, why]})"
        for (kind, why), n in outcomes.failures.most_common(40)
    ]
    first, most, last = (m / MIB for m in (outcomes.memory[0], max(outcomes.memory), outcomes.memory[-1]))
    tell(
        [
            "# The gateway under attack",
            aligned([["", ""], *([name, value] for name, value in facts.items())]),
            f"{given.requests:,} requests in {seconds:.0f} s, seed {given.seed}. "
            f"Memory (RSS of all processes): {first:.0f} MiB before, {most:.0f} at most, {last:.0f} at the end.",
            checked(checks),
            "\n".join(["## Failures\n", *failures]) if failures else "",
            "Answers by class and status; \"closed\" is a connection closed without an answer (for clients that left "
            'or finished sending, their own doing), "cut off" one whose client did not read.',
            table(outcomes.counts),
            f"## How\n\n{how(__doc__)}",
        ],
        given.report,
    )  # fmt: skip
    return 0 if all(kept for _, kept in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
