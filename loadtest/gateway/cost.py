"""What a gateway costs: CPU milliseconds per plain request and per stream, ours beside others in the same run.

    python -m loadtest.gateway.cost --litellm VENV --report docs/benchmarks/gateway-cost.md
    python -m loadtest.gateway.cost --memory 100000 --report ...       with the memory over 100,000 requests
    python -m loadtest.gateway.cost --store URL --redis URL ...         with PostgreSQL and Redis

All stand in front of the same double of an engine (:mod:`loadtest.gateway.upstream`), whose answers are 32 tokens, 2 ms
apart. In each round every contender has its turn in every cell, in an order that rotates. A turn's figure is the CPU
time of the contender's processes from before to after it, over its requests; what a gateway does besides (probing its
engines once a second, say) is in it. CPU time, unlike latency, holds on a machine that has other work.

Machines differ in speed, and rented ones from day to day, by a factor of two and more. The limits are of one on which
LiteLLM takes 10 ms of CPU for a plain request and 30 for a stream; where it is measured in the same run, ours is
compared with them at that machine's speed.

"medassist" is the gateway without a store. "medassist, all of it" has every feature on: a key with every limit, fair
queueing, the ledger, the audit log, a line of JSON and a trace for each request, cache salts. Its processes are the
supervisor, whose keeper thread writes all this down, and the workers; the database, Redis and the collector are not
counted.
"""

import argparse
import asyncio
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import uvloop
import yaml

from loadtest.benchmark import environment
from loadtest.engine_report import aligned
from loadtest.gateway import memory
from loadtest.gateway.everything import NAME, Everything, Services, everything
from loadtest.gateway.load import CHAT, chat, closed_loop, session
from loadtest.gateway.processes import MIB, Program, free_port, gateway, program, upstream
from loadtest.gateway.telling import checked, command_line, how, tell

MODEL = "mock"
OURS, BARE = "medassist", "upstream"
KEY = "sk-loadtest-0c2f9d61a7e84b53"  # LiteLLM refuses to start with a short one
CHUNKS, DELAY = 32, 0.002
# CPU milliseconds and bytes, of ours.
LIMITS = {
    OURS: ({"plain, 8 at once": 0.8, "stream, 8 at once": 1.6}, 100e6),
    NAME: ({"plain, 8 at once": 1.0, "stream, 8 at once": 2.0}, memory.MOST_MEMORY),
}
LITELLM = "LiteLLM"
# Its CPU milliseconds on the machine that these limits are of.
YARDSTICK = {"plain, 8 at once": 10.0, "stream, 8 at once": 30.0}


@dataclass(frozen=True)
class Cell:
    """Requests of one kind, ``concurrency`` at once."""

    stream: bool
    concurrency: int

    def __str__(self) -> str:
        return f"{'stream' if self.stream else 'plain'}, {self.concurrency} at once"


CELLS = tuple(Cell(stream, concurrency) for stream in (False, True) for concurrency in (1, 8))


@dataclass
class Figures:
    """Of one contender: CPU milliseconds a request, by cell and round; idle CPU milliseconds a second; RSS in bytes at
    start and end, and PSS at the end; how many requests it got."""

    cpu: dict[Cell, list[float]] = field(default_factory=lambda: {cell: [] for cell in CELLS})
    idle: float = 0.0
    start: int = 0
    end: int = 0
    pss: int = 0
    sent: int = 0


async def turn(target: Program, cell: Cell, requests: int) -> float:
    """CPU milliseconds per request of one turn.

    Raises:
        RuntimeError: a request failed; a figure that counts failures as answers would flatter.
    """
    body = chat(MODEL, stream=cell.stream, max_tokens=CHUNKS)

    async def send(_: int) -> None:
        async with client.post(CHAT, data=body) as response:
            async for _data in response.content.iter_any():
                pass
            if response.status != 200:
                raise RuntimeError(f"{target.name} answered {response.status}")

    async with session(target.url, key=target.key or KEY) as client:
        await closed_loop(range(cell.concurrency), cell.concurrency, send)  # connections
        before = target.cpu_seconds()
        await closed_loop(range(requests), cell.concurrency, send)
        return (target.cpu_seconds() - before) / requests * 1e3


async def measure(targets: Sequence[Program], rounds: int, requests: int) -> dict[str, Figures]:
    """All rounds of all cells; a round of one request at once has a quarter of ``requests``."""
    figures = {target.name: Figures() for target in targets}
    for target in targets:
        for cell in CELLS:
            await turn(target, cell, 50)
            figures[target.name].sent += cell.concurrency + 50
        figures[target.name].start = target.rss()
    before = [target.cpu_seconds() for target in targets]
    await asyncio.sleep(10)
    for target, then in zip(targets, before, strict=True):
        figures[target.name].idle = (target.cpu_seconds() - then) * 100
    for number in range(rounds):
        order = [targets[(i + number) % len(targets)] for i in range(len(targets))]
        for cell in CELLS:
            for target in order:
                count = requests if cell.concurrency > 1 else max(requests // 4, 1)
                try:
                    figures[target.name].cpu[cell].append(await turn(target, cell, count))
                    figures[target.name].sent += cell.concurrency + count
                except aiohttp.ClientError as e:
                    raise RuntimeError(f"{target.name}: {e}") from e
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    for target in targets:
        figures[target.name].end, figures[target.name].pss = target.rss(), target.pss()
    return figures


@contextmanager
def contenders(given: argparse.Namespace, engine: Program, folder: Path) -> Iterator[tuple[list[Program], Everything]]:
    """Starts ours and those that the command line names, one after the other."""
    with ExitStack() as stack:
        start = stack.enter_context
        found = [start(gateway(folder, "--engine", f"{MODEL}={engine.url}", "--workers", str(given.workers)))]
        full = start(everything(folder / "full", MODEL, engine, given.workers, Services(given.store, given.redis)))
        found += [full.target, engine]
        ours = len(found)
        if given.litellm:
            found.append(start(litellm(given.litellm, engine, folder)))
        for name, path, first in (
            ("vllm-router", given.vllm_router, []),
            ("smg", given.smg, ["launch"]),
        ):
            if path:
                port, metrics = free_port(), free_port()
                command = [str(path), *first, "--host", "127.0.0.1", "--port", str(port), "--worker-urls", engine.url]
                command += ["--policy", "round_robin", "--prometheus-port", str(metrics)]
                url = f"http://127.0.0.1:{port}"
                found.append(start(program(name, command, url, folder)))
        for target in found[ours:]:
            answers(target)
        yield found, full


def litellm(venv: Path, engine: Program, folder: Path) -> AbstractContextManager[Program]:
    """LiteLLM's proxy, one worker, without a database, as its documentation says for production."""
    config = {
        "model_list": [
            {
                "model_name": MODEL,
                "litellm_params": {"model": f"hosted_vllm/{MODEL}", "api_base": f"{engine.url}/v1", "api_key": "none"},
            }
        ],
        "litellm_settings": {"callbacks": [], "num_retries": 0, "request_timeout": 60, "telemetry": False},
        "general_settings": {"master_key": KEY},
    }
    path = folder / "litellm.yaml"
    path.write_text(yaml.safe_dump(config))
    port = free_port()
    command = [str(venv / "bin/litellm"), "--config", str(path), "--host", "127.0.0.1", "--port", str(port)]
    env = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_MODE": "PRODUCTION",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "PATH": f"{venv / 'bin'}:{os.environ['PATH']}",
    }
    url = f"http://127.0.0.1:{port}"
    return program(LITELLM, [*command, "--num_workers", "1"], url, folder, "/health/liveliness", env)


def answers(target: Program, timeout: float = 60) -> None:
    """Waits until it relays requests: some are healthy before they know their engines.

    Raises:
        RuntimeError: it does not.
    """

    async def wait() -> None:
        deadline = time.monotonic() + timeout
        async with session(target.url, key=KEY) as client:
            while True:
                async with client.post(CHAT, data=chat(MODEL, max_tokens=1)) as response:
                    if response.status == 200:
                        return
                    said = (await response.text())[:300]
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{target.name} relays nothing after {timeout:g} s: {said}")
                await asyncio.sleep(0.5)

    asyncio.run(wait())


def probe(script: Path, targets: Sequence[Program], requests: int) -> str:
    """What another script says of the same processes: ``SCRIPT URL PID KEY REQUESTS``."""
    said = []
    for target in targets:
        command = [sys.executable, str(script), target.url, str(target.pid), target.key or KEY, str(requests)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        said.append(f"{target.name}:\n{done.stdout or done.stderr[-500:]}")
    return "\n".join(said)


def table(figures: dict[str, Figures]) -> str:
    rows = [["", *(str(cell) for cell in CELLS), "idle, ms/s", "RSS at start, MiB", "RSS at end, MiB",
             "PSS at end, MiB"]]  # fmt: skip
    for name, of in figures.items():
        cells = [
            f"{statistics.median(x):.2f} ({min(x):.2f}-{max(x):.2f})" if (x := of.cpu[cell]) else "-" for cell in CELLS
        ]
        rows.append([name, *cells, f"{of.idle:.1f}", *(f"{size / MIB:.0f}" for size in (of.start, of.end, of.pss))])
    return aligned(rows)


def verdict(figures: dict[str, Figures]) -> list[tuple[str, bool]]:
    """What was promised of our gateway, with the figure, and whether it holds.

    Where LiteLLM was measured, too, CPU is judged at the speed of the machine that the limits are of.
    """
    found = []
    for name, (limits, most_memory) in LIMITS.items():
        of = figures[name]
        for cell in CELLS:
            if limit := limits.get(str(cell)):
                middle = statistics.median(of.cpu[cell])
                what = f"{name}: {cell}: {middle:.2f} CPU ms"
                if LITELLM in figures:
                    theirs, there = statistics.median(figures[LITELLM].cpu[cell]), YARDSTICK[str(cell)]
                    middle *= there / theirs
                    what += f"; {middle:.2f} where {LITELLM} takes {there:g} in place of {theirs:.1f}"
                found.append((f"{what}, at most {limit}", middle <= limit))
        most = max(of.start, of.end)
        what = f"{name}: memory: {most / 1e6:.0f} MB RSS of all processes, at most {most_memory / 1e6:g}"
        found.append((what, most <= most_memory))
    return found


def reading(figures: dict[str, Figures]) -> str:
    """Ratios to ours, of the medians at 8 at once."""
    lines = []
    for name, of in figures.items():
        if name in (OURS, NAME, BARE):
            continue
        for ours in (OURS, NAME):
            plain, stream = (
                statistics.median(of.cpu[c]) / statistics.median(figures[ours].cpu[c])
                for c in CELLS
                if c.concurrency == 8
            )
            lines.append(f"- {name} takes {plain:.1f} times the CPU of {ours} for a plain request, {stream:.1f} for a "
                         "stream.")  # fmt: skip
    return "\n".join(lines)


def options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--litellm", type=Path, metavar="VENV", help="virtual environment with litellm[proxy]")
    add("--vllm-router", type=Path, metavar="FILE", help="the vllm-router program")
    add("--smg", type=Path, metavar="FILE", help="the smg program")
    add("--rounds", type=int, default=5)
    add("--requests", type=int, default=400, help="of a turn with 8 at once (default: %(default)s)")
    add("--store", metavar="URL", help="of an empty database, for the gateway with every feature on; else SQLite")
    add("--redis", metavar="URL", help="where that gateway counts limits; else by itself")
    add("--workers", type=int, default=1, help="worker processes of our gateway")
    add("--probe", type=Path, metavar="SCRIPT", help="run SCRIPT URL PID KEY 200 against each as well, and quote it")
    add(
        "--memory",
        type=int,
        default=0,
        metavar="REQUESTS",
        help="then send so many of all kinds, watching memory, without and with every feature",
    )
    add("--only-memory", action="store_true", help="--memory alone")
    add("--report", type=Path, metavar="FILE", help="write a Markdown report there")
    given = parser.parse_args(arguments)
    if given.only_memory and not given.memory:
        parser.error("--only-memory needs --memory REQUESTS")
    return given


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    given = options(arguments)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    facts = environment(command_line("loadtest.gateway.cost", arguments))
    text = ["# What the gateway costs", aligned([["", ""], *([name, value] for name, value in facts.items())])]
    good = True
    try:
        with tempfile.TemporaryDirectory(prefix="medassist-benchmark-") as name:
            folder = Path(name)
            if not given.only_memory:
                with (
                    upstream(folder, "--chunks", str(CHUNKS), "--delay", str(DELAY)) as engine,
                    contenders(given, engine, folder) as (targets, full),
                ):
                    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                        figures = runner.run(measure(targets, given.rounds, given.requests))
                    checks = [*verdict(figures), full.written(figures[NAME].sent)]
                    good = all(ok for _, ok in checks)
                    text += [
                        "CPU milliseconds a request, median of the rounds (least-most). "
                        f'Of "{NAME}": {Services(given.store, given.redis)}.',
                        table(figures),
                        checked(checks),
                        reading(figures),
                    ]
                    if given.probe:
                        said = probe(given.probe, targets, 200)
                        text += [f"The same processes by `{given.probe.name}`:", f"```text\n{said.rstrip()}\n```"]
            if given.memory:
                services = Services(given.store, given.redis)
                for section, kept in (
                    memory.run(folder, given.memory, given.workers),
                    memory.run_everything(folder, given.memory, given.workers, services),
                ):
                    good = good and kept
                    text.append(section)
    except (RuntimeError, ValueError) as e:
        print(f"cost: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    text.append(f"## How\n\n{how(__doc__)}")
    tell(text, given.report)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
