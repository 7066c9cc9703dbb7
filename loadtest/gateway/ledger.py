"""Whether the ledger has what clients have had: through kills of the gateway, and outages of its databases.

    python -m loadtest.gateway.ledger --kills 20 --report docs/benchmarks/gateway-ledger.md

The gateway stands in front of a double of an engine whose answers cost a known number of tokens. Clients send plain
requests and streams, each with an id, and remember of each whether its answer came whole. A request whose answer came
whole must be in the ledger with its tokens; one that was cut off by a kill may be; nothing may be there twice.

Kills: SIGKILL at random moments of all processes of the gateway or, one time in four, of a worker alone. After the
last, the ledger's sums are compared with the sums over clients, and the audit log's ids with their ids.

Outages: PostgreSQL and Redis of the measurement's own are killed under load and started again, and later stopped
(SIGSTOP) and let go on. Every request must be answered meanwhile, and the ledger must have exactly what clients had.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import uvloop
import yaml

from loadtest.benchmark import environment
from loadtest.engine_report import aligned
from loadtest.gateway.databases import Postgres, RedisServer
from loadtest.gateway.everything import medassist
from loadtest.gateway.load import CHAT, DONE
from loadtest.gateway.processes import Program, free_port, status, upstream
from loadtest.gateway.telling import checked, command_line, how, tell
from loadtest.gateway.upstream import PROMPT

MODEL = "mock"
LONGEST = 24  # tokens of an answer
SETTLE = 30.0  # seconds for the ledger to have all
START = 60.0  # seconds that a gateway may take to start


@dataclass
class Truth:
    """What clients know.

    Attributes:
        answered: tokens of each request whose answer came whole, by its id; 0 for errors.
        open: tokens, at most, of requests that were sent and had no whole answer.
        statuses: of all that came whole.
    """

    answered: dict[str, int] = field(default_factory=dict)
    open: dict[str, int] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)


@dataclass(frozen=True)
class Written:
    """What the gateway has written down: the ledger's sums, and how often each id is in the audit log."""

    requests: int
    tokens: int
    estimated: int
    audited: Counter[str]


def disagreements(truth: Truth, written: Written) -> list[str]:
    """What the ledger and the audit log have that clients contradict, a line each."""
    least, most = len(truth.answered), len(truth.answered) + len(truth.open)
    tokens = sum(truth.answered.values())
    lines = []
    if not least <= written.requests <= most:
        lines.append(f"the ledger has {written.requests} requests, which must be {least} to {most}")
    if not tokens <= written.tokens <= tokens + sum(truth.open.values()):
        lines.append(f"the ledger has {written.tokens} tokens, which must be {tokens} and those in flight")
    if missing := truth.answered.keys() - written.audited.keys():
        lines.append(f"{len(missing)} answered requests are not in the audit log, such as {min(missing)}")
    if unknown := written.audited.keys() - truth.answered.keys() - truth.open.keys():
        lines.append(f"{len(unknown)} requests of the audit log were never sent, such as {min(unknown)}")
    if twice := [name for name, count in written.audited.items() if count > 1]:
        lines.append(f"{len(twice)} requests are in the audit log twice, such as {twice[0]}")
    if written.audited.total() != written.requests:
        lines.append(f"the ledger has {written.requests} requests, the audit log {written.audited.total()}")
    return lines


class Clients:
    """So many that send one request after the other, until told to stop.

    Args:
        url: of the gateway, which may be away at times.
        secret: of the key.
    """

    def __init__(self, url: str, secret: str, truth: Truth, concurrency: int, seed: int) -> None:
        self._url, self._secret, self._truth = url, secret, truth
        self._concurrency, self._seed = concurrency, seed
        self._stopping = False

    async def __aenter__(self) -> "Clients":
        timeout = aiohttp.ClientTimeout(total=60)
        self._session = aiohttp.ClientSession(
            timeout=timeout,
            connector=aiohttp.TCPConnector(limit=0),
            headers={"Authorization": f"Bearer {self._secret}"},
        )
        self._tasks = [asyncio.ensure_future(self._send_all(number)) for number in range(self._concurrency)]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._stopping = True
        await asyncio.gather(*self._tasks)
        await self._session.close()

    async def _send_all(self, number: int) -> None:
        chance, count = random.Random(f"{self._seed} {number}"), 0
        while not self._stopping:
            count += 1
            await self._send(
                f"seed{self._seed}-client{number}-{count}", chance.randint(1, LONGEST), chance.random() < 0.5
            )

    async def _send(self, name: str, tokens: int, stream: bool) -> None:
        body: dict[str, Any] = {
            "model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": tokens, "stream": stream
        }  # fmt: skip
        self._truth.open[name] = PROMPT + tokens
        try:
            async with self._session.post(self._url + CHAT, json=body, headers={"X-Request-Id": name}) as response:
                data = await response.read()
        except aiohttp.ClientConnectorError:  # it was not sent
            del self._truth.open[name]
            await asyncio.sleep(0.05)
            return
        except (aiohttp.ClientError, OSError, TimeoutError):
            return
        if stream and response.status == 200 and DONE not in data:
            return  # cut off
        del self._truth.open[name]
        self._truth.answered[name] = PROMPT + tokens if response.status == 200 else 0
        self._truth.statuses[response.status] += 1
        if response.status != 200:
            await asyncio.sleep(0.05)


class Place:
    """A home folder, its settings and its key; gateways run there one after the other.

    Args:
        folder: to be made.
        engine: where the double is.
        services: further settings, such as ``store``.
    """

    def __init__(self, folder: Path, engine: str, workers: int, limits: Sequence[str] = (), **services: Any) -> None:
        folder.mkdir()
        self.folder, self.port = folder, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._settings = folder / "settings.yaml"
        content = {
            "models": {MODEL: {"engines": [{"url": engine}], "max_queue": 4096}},
            "home": str(folder / "home"),
            "port": self.port,
            "workers": workers,
            **services,
        }
        self._settings.write_text(yaml.safe_dump(content))
        self._medassist("store", "upgrade")
        self.secret = self._medassist("keys", "create", "--tenant", "loadtest", *limits).strip()

    @contextlib.contextmanager
    def gateway(self) -> Iterator["subprocess.Popen[bytes]"]:
        """A running one, which is terminated at the end unless it has ended."""
        process = self.start()
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait(60)

    def start(self) -> "subprocess.Popen[bytes]":
        """Raises RuntimeError: it does not start."""
        command = [sys.executable, "-m", "clients.cli", "gateway", "--config", str(self._settings)]
        with (self.folder / "gateway.log").open("ab") as log:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + START
        while status(f"{self.url}/ready") != 200:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                raise RuntimeError(f"the gateway does not start: {self.log()[-2000:]}")
            time.sleep(0.05)
        return process

    def log(self) -> str:
        return (self.folder / "gateway.log").read_text(errors="replace")

    def written(self) -> Written:
        usage = json.loads(self._medassist("usage", "--json"))
        rows: list[dict[str, Any]] = usage if isinstance(usage, list) else usage["rows"]
        audited: Counter[str] = Counter()
        for path in (self.folder / "home" / "audit").glob("*.jsonl"):
            for line in path.open("rb"):
                event = json.loads(line)
                if event["event"] == "request":
                    audited[event["request_id"]] += 1
        return Written(
            sum(row["requests"] for row in rows),
            sum(row["prompt_tokens"] + row["completion_tokens"] for row in rows),
            sum(row["estimated"] for row in rows),
            audited,
        )

    def settled(self, truth: Truth) -> Written:
        """When the ledger has all that it must have, or has not got it in time."""
        deadline = time.monotonic() + SETTLE
        while True:
            written = self.written()
            unread = list((self.folder / "home" / "journal").rglob("*.journal"))
            if (not disagreements(truth, written) and not unread) or time.monotonic() > deadline:
                return written
            time.sleep(0.3)

    def _medassist(self, *arguments: str) -> str:
        return medassist(*arguments, "--config", str(self._settings))


def kill_all(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL for the gateway's processes, at once."""
    pids = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()


async def kills(
    place: Place, count: int, concurrency: int, seed: int, longest: float = 2.5
) -> tuple[Truth, Counter[str]]:
    """Kills the gateway ``count`` times under load; returns what clients know, and what was killed how often."""
    chance, truth, killed = random.Random(seed), Truth(), Counter[str]()
    process = await asyncio.to_thread(place.start)
    try:
        async with Clients(place.url, place.secret, truth, concurrency, seed):
            for number in range(count):
                await asyncio.sleep(chance.uniform(0.1, longest))
                if number % 4 == 3:
                    workers = [
                        child
                        for child in psutil.Process(process.pid).children()
                        if "serving.gateway.worker" in child.cmdline()
                    ]
                    chance.choice(workers).kill()
                    killed["a worker"] += 1
                else:
                    kill_all(process)
                    process = await asyncio.to_thread(place.start)
                    killed["all processes"] += 1
            await asyncio.sleep(1.0)
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 60)
    return truth, killed


async def outages(
    place: Place, servers: Sequence[Postgres | RedisServer], concurrency: int, seed: int, seconds: float = 4.0
) -> tuple[Truth, list[str]]:
    """Kills each server for so many seconds under load, then both at once; then stops both and lets them go on."""
    truth, told = Truth(), []
    with place.gateway():
        async with Clients(place.url, place.secret, truth, concurrency, seed):
            await asyncio.sleep(2.0)
            for group in (*((server,) for server in servers), tuple(servers)):
                names = " and ".join(type(server).__name__ for server in group)
                before = len(truth.answered)
                for server in group:
                    server.kill()
                await asyncio.sleep(seconds)
                meanwhile = len(truth.answered) - before
                for server in group:
                    await asyncio.to_thread(server.start)
                told.append(f"{names} killed for {seconds:g} s: {meanwhile:,} requests were answered meanwhile")
                await asyncio.sleep(3.0)
            before = len(truth.answered)
            for server in servers:
                server.pause()
            await asyncio.sleep(3 * seconds)
            meanwhile = len(truth.answered) - before
            for server in servers:
                server.go_on()
            told.append(f"all stopped (SIGSTOP) for {3 * seconds:g} s: {meanwhile:,} requests were answered meanwhile")
            await asyncio.sleep(4.0)
        await asyncio.to_thread(place.settled, truth)
    return truth, told


def check_kills(truth: Truth, written: Written, killed: Counter[str]) -> list[tuple[str, bool]]:
    what = " and ".join(f"{count} x {name}" for name, count in killed.items())
    faults = disagreements(truth, written)
    extra = written.requests - len(truth.answered)
    text = (
        f"killed {what} under load: of {len(truth.answered):,} answered requests the ledger has all, and of "
        f"{len(truth.open):,} that were cut off it has {extra:,}; {written.tokens:,} tokens; none counted twice"
    )
    return [("; ".join(faults) if faults else text, not faults)]


def check_outages(truth: Truth, written: Written) -> list[tuple[str, bool]]:
    tokens = sum(truth.answered.values())
    statuses = ", ".join(f"{count:,} x HTTP {code}" for code, count in sorted(truth.statuses.items()))
    faults = disagreements(truth, written)
    exact = (written.requests, written.tokens) == (len(truth.answered), tokens)
    return [
        (f"every request was answered: {statuses}, {len(truth.open)} without an answer",
         set(truth.statuses) == {200} and not truth.open),
        (f"the ledger has {written.requests:,} requests and {written.tokens:,} tokens, clients had "
         f"{len(truth.answered):,} and {tokens:,}" + "".join(f"; {fault}" for fault in faults), exact and not faults),
    ]  # fmt: skip


def measure(folder: Path, engine: Program, given: argparse.Namespace) -> tuple[list[tuple[str, bool]], list[str]]:
    """Both parts; returns what was promised and whether it was kept, and what happened."""
    checks: list[tuple[str, bool]] = []
    told: list[str] = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        if given.kills:
            place = Place(folder / "kills", engine.url, given.workers)
            truth, killed = runner.run(kills(place, given.kills, given.concurrency, given.seed))
            with place.gateway():  # takes over what the last has left, if it has
                written = place.settled(truth)
            checks += check_kills(truth, written, killed)
        if not given.no_outages:
            with Postgres(folder / "postgres") as postgres, RedisServer(folder / "redis") as redis:
                assert isinstance(postgres, Postgres)
                assert isinstance(redis, RedisServer)
                limits = ("--rpm", "100000000", "--tpm", "100000000000", "--concurrency", "4096")
                services = {"store": {"url": postgres.url}, "redis": {"url": redis.url}}
                place = Place(folder / "outages", engine.url, given.workers, limits, **services)
                truth, told = runner.run(outages(place, (postgres, redis), given.concurrency, given.seed))
                checks += check_outages(truth, place.written())
    return checks, told


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--no-outages", action="store_true")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="worker processes of the gateway")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, metavar="FILE", help="write a Markdown report there")
    arguments = sys.argv[1:] if arguments is None else arguments
    given = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    facts = environment(command_line("loadtest.gateway.ledger", arguments))
    try:
        with tempfile.TemporaryDirectory(prefix="ma-") as name:
            folder = Path(name)
            folder.chmod(0o711)  # PostgreSQL may run as another user
            with upstream(folder, "--delay", "0.005") as engine:
                checks, told = measure(folder, engine, given)
    except RuntimeError as e:
        print(f"ledger: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    tell(
        [
            "# The ledger through kills and outages",
            aligned([["", ""], *([name, value] for name, value in facts.items())]),
            checked(checks),
            "\n".join(f"- {line}" for line in told),
            f"## How\n\n{how(__doc__)}",
        ],
        given.report,
    )
    return 0 if all(kept for _, kept in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
