"""Three gateways that share Redis and PostgreSQL: limits, revocations, and shares under overload.

    python -m loadtest.gateway.limits --report docs/benchmarks/gateway-limits.md

Everything is a process of its own: PostgreSQL, Redis, the double of an engine (:mod:`loadtest.gateway.upstream`), and
three `medassist gateway`, each with a home folder of its own. Keys are made in the store.

**Limits.** Three keys are used at the same time, each of them through all three gateways in turn: one with requests per
minute, one with tokens per minute, both in an open loop of Poisson arrivals at `--over` times the limit; one with a
number of requests at once, by three times as many clients in a closed loop, which come again 0.1 s after they were
refused. Requests and tokens (the engine's `usage`) count at the moment when the client sent the request. "Most in any
60 s" is over all windows that begin with an answered request; "mean" is over the whole run, which lasts a multiple of
61 s: the windows consist of whole seconds, so that at most a limit's worth goes through in any 61. Requests at once are
as the clients see them, averaged over the run without its first second: from sending to reading the last byte, by when
the gateway may have let others through already, so that there can be more than the limit for moments.

**Revocation.** A key is used 50 times a second at each gateway while it is revoked in the store; the delay is from
before the transaction until the first 401, and none may be answered after it.

**Shares.** Each gateway may have four requests at the engine, which takes 0.4 s for each. A greedy key has twelve
times as many clients as a polite one that nonetheless wants more than its half; then the polite one wants a tenth of
what there is.
"""

import argparse
import asyncio
import random
import sys
import tempfile
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import aiohttp
import orjson
import uvloop
import yaml

from loadtest.benchmark import environment
from loadtest.engine_report import aligned
from loadtest.gateway.databases import Postgres, RedisServer
from loadtest.gateway.load import CHAT, chat, session
from loadtest.gateway.open_loop import arrivals
from loadtest.gateway.processes import Program, gateway, upstream
from loadtest.gateway.telling import checked, command_line, how, tell
from loadtest.report import percentile
from serving.tenants.key import KeyLimits
from serving.tenants.store import Store

MODEL = "mock"
GATEWAYS = 3
PERIOD = 61  # seconds, see above
WITHIN = 0.05  # of a limit
REQUESTS, TOKENS, AT_ONCE = 300, 12_000, 6
TOKENS_EACH = 32
SLOTS = 4  # requests that a gateway may have at the engine
PACE = 0.002  # seconds a token
SETTLED = 3.0  # seconds, of those with two keys, that do not count
REVOKED_WITHIN = 5.0  # seconds


@dataclass
class Answered:
    """What one key got: when each answered request was sent, and its tokens; when it ended; and what was refused."""

    sent: list[tuple[float, int]] = field(default_factory=list)
    intervals: list[tuple[float, float]] = field(default_factory=list)
    refused: Counter[str] = field(default_factory=Counter)

    @property
    def offered(self) -> int:
        return len(self.sent) + self.refused.total()

    def most(self, tokens: bool) -> int:
        """Requests or tokens in any 60 seconds."""
        found = sorted(self.sent)
        times = [t for t, _ in found]
        sums = [0, *accumulate(n if tokens else 1 for _, n in found)]
        return max((sums[bisect_right(times, t + 60)] - sums[i] for i, t in enumerate(times)), default=0)

    def at_once(self, first: float, last: float) -> tuple[float, int]:
        """Mean and maximum of the requests that ran between two moments."""
        busy = sum(max(0.0, min(end, last) - max(began, first)) for began, end in self.intervals)
        events = sorted([(b, 1) for b, _ in self.intervals] + [(e, -1) for _, e in self.intervals])
        return busy / (last - first), max(accumulate(step for _, step in events), default=0)


async def ask(client: aiohttp.ClientSession, body: bytes, into: Answered, start: float) -> bool:
    """Sends a request; returns whether it was answered."""
    began = time.perf_counter() - start
    try:
        async with client.post(CHAT, data=body) as response:
            content = orjson.loads(await response.read())
            if response.status == 200:
                into.sent.append((began, content["usage"]["total_tokens"]))
                into.intervals.append((began, time.perf_counter() - start))
                return True
            into.refused[f"{response.status} {content['error']['code']}"] += 1
    except (aiohttp.ClientError, OSError, orjson.JSONDecodeError) as e:
        into.refused[type(e).__name__] += 1
    return False


class Bench:
    """Clients of all gateways, by key."""

    def __init__(self, targets: Sequence[Program], store: Store) -> None:
        self.targets, self.store = targets, store

    @contextmanager
    def key(self, **limits: int) -> Iterator[tuple[str, str]]:
        """A new key's id and secret. It is revoked at the end."""
        key, secret = self.store.create_key(tenant="loadtest", limits=KeyLimits(**limits))
        yield key.id, secret
        self.store.revoke(key.id)

    async def known(self, secret: str) -> list[aiohttp.ClientSession]:
        """Clients of each gateway, which know the key now."""
        clients = [session(target.url, key=secret) for target in self.targets]
        for client in clients:
            async with asyncio.timeout(30):
                while True:
                    async with client.get("/v1/models") as response:
                        if response.status == 200:
                            break
                    await asyncio.sleep(0.1)
        return clients

    async def open_loop(self, secret: str, rate: float, seconds: float, start: float, tokens: int) -> Answered:
        """Poisson arrivals, at the gateways in turn."""
        clients, into = await self.known(secret), Answered()
        body = chat(MODEL, max_tokens=tokens)
        tasks = []
        for i, due in enumerate(arrivals(rate, seconds, 7)):
            await asyncio.sleep(max(0.0, start + due - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(clients[i % GATEWAYS], body, into, start)))
        await asyncio.gather(*tasks)
        await _close(clients)
        return into

    async def closed_loop(self, secret: str, number: int, seconds: float, start: float, tokens: int) -> Answered:
        """So many clients, spread over the gateways."""
        clients, into = await self.known(secret), Answered()
        body = chat(MODEL, max_tokens=tokens)

        async def one(client: aiohttp.ClientSession) -> None:
            while time.perf_counter() < start + seconds:
                if not await ask(client, body, into, start):
                    await asyncio.sleep(random.uniform(0.05, 0.15))

        await asyncio.sleep(max(0.0, start - time.perf_counter()))
        await asyncio.gather(*[one(clients[i % GATEWAYS]) for i in range(number)])
        await _close(clients)
        return into

    async def reconnects(self) -> int:
        """Times that a gateway has lost Redis and found it again."""
        key, secret = self.store.create_key(tenant="loadtest", metrics=True)
        clients = await self.known(secret)
        found = 0.0
        for client in clients:
            async with client.get("/metrics") as response:
                lines = (await response.text()).splitlines()
            name = "medassist_shared_limits_reconnects_total{"
            found += sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))
        await _close(clients)
        self.store.revoke(key.id)
        return int(found)

    async def revocation(self) -> list[float]:
        """Seconds until each gateway refuses a key that is revoked. RuntimeError: one answered again afterwards."""
        with self.key() as (key_id, secret):
            clients = await self.known(secret)
            refused = [0.0] * GATEWAYS
            began = 0.0

            async def watch(i: int) -> None:
                while not (refused[i] and time.perf_counter() > refused[i] + 1):
                    async with clients[i].get("/v1/models") as response:
                        if response.status == 401:
                            refused[i] = refused[i] or time.perf_counter()
                        elif refused[i]:
                            raise RuntimeError("a revoked key was taken again")
                    if began and time.perf_counter() > began + 60:
                        raise RuntimeError("a revoked key is taken after 60 s")
                    await asyncio.sleep(0.02)

            watching = [asyncio.create_task(watch(i)) for i in range(GATEWAYS)]
            await asyncio.sleep(random.uniform(0.2, 1.2))
            began = time.perf_counter()
            await asyncio.to_thread(self.store.revoke, key_id)
            await asyncio.gather(*watching)
            await _close(clients)
            return [moment - began for moment in refused]


async def _close(clients: Sequence[aiohttp.ClientSession]) -> None:
    for client in clients:
        await client.close()


Result = tuple[list[str], list[tuple[str, bool]]]


async def limits(bench: Bench, seconds: float, over: float) -> Result:
    """Rows of the table, and what was promised."""
    with (
        bench.key(requests_per_minute=REQUESTS) as (_, requests_key),
        bench.key(tokens_per_minute=TOKENS) as (_, tokens_key),
        bench.key(concurrency=AT_ONCE) as (_, at_once_key),
    ):
        start = time.perf_counter() + 3  # when all know the keys
        each = TOKENS_EACH + 8  # the prompt of the double
        by_requests, by_tokens, by_number = await asyncio.gather(
            bench.open_loop(requests_key, over * REQUESTS / 60, seconds, start, 1),
            bench.open_loop(tokens_key, over * TOKENS / each / 60, seconds, start, TOKENS_EACH),
            bench.closed_loop(at_once_key, 3 * AT_ONCE, seconds, start, 500),
        )
    rows, promises = [], []
    periods = seconds / PERIOD
    for name, limit, found, in_tokens in (
        ("requests per minute", REQUESTS, by_requests, False),
        ("tokens per minute", TOKENS, by_tokens, True),
    ):
        most = found.most(in_tokens)
        total = sum(n for _, n in found.sent) if in_tokens else len(found.sent)
        mean = total / periods
        rows.append([name, f"{limit:,}", f"{found.offered:,}", f"{len(found.sent):,}", f"{most:,}", f"{mean:,.0f}"])
        promises.append(_within(f"{name}: {most:,} in any 60 s", most, limit, False))
        promises.append(_within(f"{name}: {mean:,.0f} in 61 s on average", mean, limit))
    mean, highest = by_number.at_once(1, seconds)
    sent, offered = len(by_number.sent), by_number.offered
    rows.append(["requests at once", str(AT_ONCE), f"{offered:,}", f"{sent:,}", str(highest), f"{mean:.2f}"])
    promises.append(_within(f"requests at once: {mean:.2f} on average", mean, AT_ONCE))
    refused = by_requests.refused + by_tokens.refused + by_number.refused
    others = [f"{count} x {what}" for what, count in refused.items() if what != "429 rate_limit_exceeded"]
    promises.append((f"refused for other reasons: {', '.join(others) or 'none'}", not others))
    lost = await bench.reconnects()
    promises.append((f"gateways lost Redis {lost} times", not lost))
    head = ["limit", "of", "offered requests", "answered", "most in any 60 s (at once)", "mean"]
    return [aligned([head, *rows])], promises


def _within(what: str, value: float, limit: float, both: bool = True) -> tuple[str, bool]:
    off = value / limit - 1
    kept = off <= WITHIN and (not both or off >= -WITHIN)
    return f"{what}, of {limit:,} ({off:+.1%}, at most {'±' if both else '+'}{WITHIN:.0%})", kept


async def revocations(bench: Bench, number: int) -> Result:
    delays = [delay for _ in range(number) for delay in await bench.revocation()]
    worst = max(delays)
    shown = f"median {percentile(delays, 50):.2f} s, longest {worst:.2f} s"
    text = f"Revocation: {number} keys, {len(delays)} delays (three gateways each): {shown}."
    return [text], [(f"a revoked key stops on all gateways within {worst:.2f} s, at most 5", worst <= REVOKED_WITHIN)]


async def shares(bench: Bench, seconds: float) -> Result:
    capacity = GATEWAYS * SLOTS / (200 * PACE)
    rows = [["polite key", "greedy: answered", "polite: answered", "polite's share", "polite: p50 s", "refused, greedy",
             "refused, polite"]]  # fmt: skip
    promises = []
    for name, polite_clients, rate in (("wants more than half", 9, 0.0), ("wants a tenth", 0, capacity / 10)):
        with bench.key() as (_, greedy_key), bench.key() as (_, polite_key):
            start = time.perf_counter() + 3
            greedy, polite = await asyncio.gather(
                bench.closed_loop(greedy_key, 108, seconds, start, 200),
                bench.closed_loop(polite_key, polite_clients, seconds, start, 200)
                if polite_clients
                else bench.open_loop(polite_key, rate, seconds, start, 200),
            )
        settled = [sum(SETTLED < end <= seconds for _, end in x.intervals) for x in (greedy, polite)]
        share = settled[1] / max(sum(settled), 1)
        times = [end - began for began, end in polite.intervals] or [0.0]
        rows.append([name, str(settled[0]), str(settled[1]), f"{share:.1%}", f"{percentile(times, 50):.2f}",
                     str(greedy.refused.total()), str(polite.refused.total())])  # fmt: skip
        if polite_clients:
            promises.append((f"the greedy key has {1 - share:.1%} of the answers, at most 55 %", share >= 0.45))
        else:
            part = len(polite.sent) / max(polite.offered, 1)
            promises.append((f"a polite key that wants a tenth gets {part:.1%} of it, at least 95", part >= 0.95))
    return [aligned(rows)], promises


@contextmanager
def three_gateways(folder: Path, **settings: object) -> Iterator[tuple[list[Program], Store]]:
    """Each with a home of its own, and the services that they share."""
    with ExitStack() as stack:
        database = stack.enter_context(Postgres(folder / "pg"))
        redis = stack.enter_context(RedisServer(folder / "redis"))
        assert isinstance(database, Postgres)
        assert isinstance(redis, RedisServer)
        store = Store(database.url)
        store.upgrade()
        store.create_key(tenant="loadtest")  # so that a key is required
        engine = stack.enter_context(upstream(folder, "--chunks", "32", "--delay", str(PACE)))
        targets = []
        for i in range(GATEWAYS):
            path = folder / f"gateway-{i}.yaml"
            model = {"engines": [{"url": engine.url}], **settings}
            content = {"models": {MODEL: model}, "home": str(folder / f"home-{i}"), "store": {"url": database.url},
                       "redis": {"url": redis.url}}  # fmt: skip
            path.write_text(yaml.safe_dump(content))
            targets.append(stack.enter_context(gateway(folder, "--config", str(path), name=f"gateway-{i}")))
        yield targets, store


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.gateway.limits", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--periods", type=int, default=3, help="of 61 seconds, with the limits; default 3")
    parser.add_argument("--over", type=float, default=2.5, help="times the limit that is offered; default 2.5")
    parser.add_argument("--revocations", type=int, default=5, help="default 5")
    parser.add_argument("--share-seconds", type=float, default=30, help="of each run with two keys; default 30")
    parser.add_argument("--report", type=Path, help="file for the report")
    given = parser.parse_args(arguments)
    facts = environment(command_line("loadtest.gateway.limits", arguments))

    async def run(part: str, targets: Sequence[Program], store: Store) -> Result:
        bench = Bench(targets, store)
        if part == "shares":
            return await shares(bench, given.share_seconds)
        sections, promises = await limits(bench, given.periods * PERIOD, given.over)
        more, others = await revocations(bench, given.revocations)
        return sections + more, promises + others

    sections: list[str] = []
    promises: list[tuple[str, bool]] = []
    for part, settings in (("limits", {}), ("shares", {"max_concurrency": SLOTS, "max_queue": 1000})):
        with tempfile.TemporaryDirectory(prefix="ma-") as name:
            folder = Path(name)
            folder.chmod(0o755)  # PostgreSQL may run as somebody else
            with three_gateways(folder, **settings) as (targets, store):
                found, kept = uvloop.run(run(part, targets, store))
                sections, promises = sections + found, promises + kept
    table = aligned([["", ""], *[[name, value] for name, value in facts.items()]])
    title = "# Three gateways, one Redis, one PostgreSQL"
    tell([title, table, checked(promises), *sections, "## How", how(__doc__)], given.report)
    return 0 if all(kept for _, kept in promises) else 1


if __name__ == "__main__":
    sys.exit(main())
