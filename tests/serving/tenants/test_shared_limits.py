"""Limits that several gateways share, with a Redis that is killed, emptied and stopped."""

import asyncio
import logging
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from serving.gateway.errors import ApiError
from serving.gateway.metrics import Metrics
from serving.gateway.settings import Settings
from serving.tenants.key import Key, KeyLimits
from serving.tenants.limits import Grant, Limits
from serving.tenants.recent_use import RecentUse
from serving.tenants.shared_script import ALIVE, DECIDE, PER_REQUEST
from tests.serving.tenants.redis_server import Server
from tests.waiting import eventually

PATIENCE = 20.0  # seconds


@pytest.fixture
def server(short_path: Path) -> Iterator[Server]:
    server = Server(short_path)
    yield server
    server.kill()


def key(name: str = "key_a", **limits: int) -> Key:
    return Key(name, "clinic", limits=KeyLimits(**limits))


@asynccontextmanager
async def gateways(
    server: Server, number: int = 1, patience: float = 0.5, others: int = 0
) -> AsyncIterator[list[Limits]]:
    """Limits of so many gateways that have heard of each other."""
    shared_by = {"url": server.url, "prefix": "test", "timeout": patience}
    found = [
        Limits(Settings.from_engines(["demo=http://127.0.0.1:1"], redis=shared_by), Metrics()) for _ in range(number)
    ]
    for limits in found:
        await limits.start()
    assert await eventually(
        lambda: all(shared(limits).up and shared(limits).members == number + others for limits in found)
    )
    try:
        yield found
    finally:
        for limits in found:
            await limits.stop()


def shared(limits: Limits) -> Any:
    """What it has with others."""
    return limits.shared


async def granted(limits: Limits, limited: Key, most: int = 1000) -> list[Grant]:
    """As many as are let through one after the other."""
    grants: list[Grant] = []
    while len(grants) < most:
        try:
            grant = await limits.admit(limited, 1, 1)
        except ApiError:
            break
        assert grant is not None
        grants.append(grant)
    return grants


def up(found: list[Limits], value: bool = True) -> Callable[[], bool]:
    return lambda: all(shared(limits).up is value for limits in found)


steps = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "ask", "settle", "settle"]), st.integers(0, 15_000), st.integers(0, 60)),
    max_size=40,
)
limits_of_a_key = st.tuples(
    st.none() | st.integers(1, 12), st.none() | st.integers(1, 150), st.none() | st.integers(1, 5)
)


def test_redis_decides_as_a_worker_does(server: Server) -> None:
    """The script and the local window say the same of the same requests, to the millisecond."""
    script = server.client.register_script(DECIDE.replace("redis.call('TIME')", "redis.call('LRANGE', 'clock', 0, 1)"))

    @hypothesis_settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(steps, limits_of_a_key)
    def compare(steps: list[tuple[str, int, int]], limits: tuple[int | None, int | None, int | None]) -> None:
        requests, tokens, most = limits
        use = RecentUse("key_a")
        use.limits = KeyLimits(requests, tokens, most)
        server.client.flushall()
        server.client.set("epoch", "e")
        milliseconds = 1_700_000_000_000
        running: list[tuple[int, int]] = []

        def tell(asked: list[int]) -> list[int]:
            untold, use.untold = use.untold, {}
            changes = [n for second, (r, t) in untold.items() for n in (second, r, t)]
            numbers = [len(running), *(-1 if n is None else n for n in (most, requests, tokens)), len(untold), *changes]
            server.client.delete("clock")
            server.client.rpush("clock", milliseconds // 1000, milliseconds % 1000 * 1000)
            names = ["epoch", "workers", "minute", "running"]
            answer: list[int] = script(names, ["e", "me", 0, *numbers, len(asked), *asked])
            return answer[2:]

        for what, pause, number in steps:
            milliseconds += pause
            now = milliseconds / 1000
            if what == "settle" and running:
                second, reserved = running.pop(number % len(running))
                use.settle(second, reserved, number, int(now))
            elif what == "ask":
                if tokens is not None:
                    number = min(number, tokens)  # a larger request is refused before
                values = tell([number])
                assert len(values) == PER_REQUEST
                verdict = use.decide(number, now, 1)
                assert [verdict.granted, verdict.requests, verdict.tokens] == [values[0] == 1, *values[2:4]]
                assert round(verdict.requests_wait * 1000) == values[4]
                assert round(verdict.tokens_wait * 1000) == values[5]
                assert values[6] == use.in_flight
                if verdict.requests or verdict.tokens:
                    assert round(verdict.reset * 1000) == values[7]
                if verdict.granted:
                    running.append((verdict.second, number))

    compare()


def test_a_clock_of_redis_that_is_set_back_locks_nobody_out(server: Server) -> None:
    """What was let through counts for another minute, and not until the clock is there again."""
    script = server.client.register_script(DECIDE.replace("redis.call('TIME')", "redis.call('LRANGE', 'clock', 0, 1)"))
    server.client.set("epoch", "e")

    def ask(second: int, worker: str = "me", running: int = 0, asked: int = 1) -> list[int]:
        server.client.delete("clock")
        server.client.rpush("clock", second, 0)
        numbers = [running, 3, 2, 100, 0, asked, *[10] * asked]
        answer: list[int] = script(["epoch", "workers", "minute", "running"], ["e", worker, 1, *numbers])
        return answer

    start = 1_700_000_000
    assert ask(start)[2] == 1
    assert ask(start)[2] == 1
    assert ask(start, "other", running=2, asked=0)[1] == 2
    back = start - 3600
    workers, granted, _, requests, tokens, wait, _, running, _ = ask(back)[1:]
    assert (workers, granted, requests, tokens, running) == (1, 0, 2, 20, 0)
    assert 0 < wait <= 62_000
    assert ask(back + 30)[2] == 0
    assert ask(back + 62)[2] == 1


def test_who_is_refused_does_not_make_the_counters_last(server: Server) -> None:
    async def run() -> None:
        async with gateways(server) as found:
            limited = key(requests_per_minute=1)
            assert await found[0].admit(limited, 1, 1)
            name = next(iter(server.client.scan_iter("*minute")))
            server.client.expire(name, 30)
            assert not await granted(found[0], limited)
            assert server.client.ttl(name) <= 30

    asyncio.run(run())


def test_a_clock_of_redis_that_is_set_is_taken_at_once(server: Server) -> None:
    async def run() -> None:
        async with gateways(server) as found:
            one = found[0]
            one.set_clock(one.now() - 3600)  # as if Redis' had gone forward since
            shared(one)._ahead -= 3600
            assert await one.admit(key(requests_per_minute=5), 1, 1)
            assert abs(one.now() - server.client.time()[0]) < 60

    asyncio.run(run())


def test_what_nobody_expected_does_not_end_sharing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        async with gateways(server) as found:
            one = shared(found[0])
            original, limited = one._answer, key(requests_per_minute=5)

            def fail(*arguments: Any) -> None:
                raise KeyError("secret")

            one._answer = fail
            assert await found[0].admit(limited, 1, 1)  # by itself
            one._answer = original
            assert await eventually(lambda: one.up)
            assert len(await granted(found[0], limited)) <= 4

    asyncio.run(run())
    assert "limits are not shared (KeyError)" in caplog.text
    assert "secret" not in caplog.text


def test_three_gateways_hold_a_key_to_its_limits_in_few_calls(server: Server) -> None:
    async def run() -> None:
        async with gateways(server, 3) as found:
            before = server.calls()
            limited = key(requests_per_minute=100, tokens_per_minute=10_000, concurrency=80)
            asked = [limits.admit(limited, 1, 1) for _ in range(60) for limits in found]
            answers = await asyncio.gather(*asked, return_exceptions=True)
            grants = [a for a in answers if not isinstance(a, BaseException)]
            assert len(grants) == 80
            # Each asked once for all 60, and may have told that it lives.
            assert server.calls() - before <= 3 * 4
            assert min(int(dict(g.headers)[b"x-ratelimit-remaining-requests"]) for g in grants if g) == 20
            for grant in grants:
                assert grant is not None
                grant.done(2)
            assert await eventually(lambda: not any(shared(limits)._dirty for limits in found))
            assert [len(await granted(limits, limited)) for limits in found] == [20, 0, 0]

    asyncio.run(run())


def test_what_was_not_used_is_free_for_others(server: Server) -> None:
    async def run() -> None:
        async with gateways(server, 2) as (one, other):
            limited = key(tokens_per_minute=1000)
            grant = await one.admit(limited, 400, 600)
            assert grant
            with pytest.raises(ApiError) as caught:
                await other.admit(limited, 1, 0)
            assert 55 < (caught.value.retry_after or 0) <= 61
            grant.done(400)
            assert await eventually(lambda: not shared(one)._dirty)
            await asyncio.sleep(0.05)
            assert await other.admit(limited, 400, 200)

    asyncio.run(run())


def test_what_is_kept_in_redis_expires(server: Server) -> None:
    async def run() -> None:
        async with gateways(server, 2) as (one, other):
            limited = key(requests_per_minute=10, tokens_per_minute=1000, concurrency=4)
            await one.admit(limited, 1, 1)
            await other.admit(limited, 1, 1)
            names: list[bytes] = server.client.keys("*")  # type: ignore[assignment]
            assert len(names) == 4
            assert all(name.startswith(b"test:") for name in names)
            assert sum(b"{key_a}" in name for name in names) == 2
            assert all(0 < server.client.ttl(name) <= 3600 for name in names)  # type: ignore[operator]

    asyncio.run(run())


def test_a_key_without_such_limits_does_not_ask(server: Server) -> None:
    async def run() -> None:
        async with gateways(server) as (one,):

            async def ask(*arguments: object) -> None:
                raise AssertionError("it asks")

            shared(one).ask = ask
            assert await one.admit(key(), 1, 1) is None
            grant = await one.admit(key(tokens_per_month=1000), 1, 1)
            assert grant
            grant.done(2)
            assert not shared(one)._dirty

    asyncio.run(run())


@pytest.mark.parametrize("answered", [False, True])
def test_who_leaves_while_it_is_decided_leaves_nothing(server: Server, answered: bool) -> None:
    """Both where Redis has not answered yet, and where the answer is on its way to the one who asks."""

    async def run() -> None:
        async with gateways(server, patience=5) as (one,):
            limited = key(requests_per_minute=10, tokens_per_minute=1000, concurrency=1)
            if answered:
                original = shared(one)._answer

                def answer(item: Any, values: list[int]) -> None:
                    original(item, values)
                    task.cancel()

                shared(one)._answer = answer
            else:
                server.pause()
            task = asyncio.create_task(one.admit(limited, 100, 100))
            if not answered:
                await asyncio.sleep(0.1)
                task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            server.go_on()
            if answered:
                shared(one)._answer = original
            use = one._uses["key_a"]
            assert await eventually(lambda: not (use.in_flight or use.untold or shared(one)._dirty))
            await asyncio.sleep(0.1)
            grant = await one.admit(limited, 100, 100)
            assert grant
            headers = dict(grant.headers)
            assert headers[b"x-ratelimit-remaining-requests"] == b"9"
            assert headers[b"x-ratelimit-remaining-tokens"] == b"800"

    asyncio.run(run())


@pytest.mark.parametrize("emptied", ["killed", "flushed"])
def test_the_limit_holds_across_a_loss_of_redis(server: Server, emptied: str, caplog: pytest.LogCaptureFixture) -> None:
    limited = key(requests_per_minute=60)

    async def run() -> None:
        async with gateways(server, 2) as found:
            one, other = found
            assert len(await granted(one, limited, 16)) == 16
            assert len(await granted(other, limited, 4)) == 4
            if emptied == "killed":
                server.kill()
                # The key goes on, with half of what is left at each: all at one, and some at the other.
                assert len(await granted(one, limited)) == 14  # of its half, 30, it had 16
                assert len(await granted(other, limited, 5)) == 5
                assert [shared(limits).up for limits in found] == [False, False]
                server.start()
                left = 60 - 20 - 19
            else:
                server.client.flushall()
                left = 60 - 20
            before = [shared(limits)._epoch for limits in found]
            assert await eventually(
                lambda: all(shared(limits)._epoch != e for limits, e in zip(found, before, strict=True))
            )
            assert await eventually(up(found))
            assert len(await granted(one, limited, left // 2)) == left // 2
            assert len(await granted(other, limited)) == left - left // 2
            assert not await granted(one, limited)

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    told = [r.getMessage() for r in caplog.records if r.name == "medassist.limits"]
    assert [m.split(" (")[0].split(":")[0] for m in told] == (
        ["Redis is away"] * 2 + ["Redis is back"] * 2 if emptied == "killed" else []
    )


def test_a_connection_that_breaks_costs_nothing_twice(server: Server) -> None:
    async def run() -> None:
        limited = key(requests_per_minute=40)
        async with gateways(server, 2) as found:
            one, other = found
            assert len(await granted(one, limited, 10)) == 10
            broken = [shared(limits)._connection for limits in found]
            server.client.client_kill_filter(_type="normal", skipme=True)
            during = len(await granted(one, limited, 5))
            assert await eventually(
                lambda: all(shared(limits)._connection is not b for limits, b in zip(found, broken, strict=True))
            )
            assert await eventually(lambda: shared(one).up and shared(other).up and not shared(one)._dirty)
            await asyncio.sleep(0.1)
            assert during == 5
            assert len(await granted(other, limited)) == 25

    asyncio.run(run())


def test_many_keys_are_told_in_several_calls(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.tenants.shared_limits.MOST_KEYS", 7)

    async def run() -> None:
        async with gateways(server, 2) as found:
            keys = [key(f"key_{i}", requests_per_minute=2, concurrency=2) for i in range(50)]
            for limited in keys:
                assert await found[0].admit(limited, 1, 1)
            server.client.flushall()
            epoch = shared(found[0])._epoch
            assert await eventually(lambda: shared(found[0])._epoch != epoch)
            assert await eventually(up(found))
            assert [len(await granted(found[1], limited)) for limited in keys] == [1] * 50

    asyncio.run(run())


def test_nobody_waits_for_a_redis_that_hangs(server: Server) -> None:
    async def run() -> None:
        limited = key(requests_per_minute=1000, concurrency=100)
        async with gateways(server, 2) as found:
            assert len(await granted(found[0], limited, 3)) == 3
            server.pause()
            began = time.monotonic()
            together = await asyncio.gather(*[found[0].admit(limited, 1, 1) for _ in range(20)])
            waited = time.monotonic() - began
            assert all(together)
            assert 0.3 < waited < 5  # redis.timeout, once for all of them
            began = time.monotonic()
            assert len(await granted(found[0], limited, 20)) == 20
            assert time.monotonic() - began < 5  # 10 if each waited
            assert len(await granted(found[0], limited)) == 7  # half of the requests that may run
            server.go_on()
            assert await eventually(up(found))
            assert len(await granted(found[1], limited)) == 50

    asyncio.run(run())


def test_without_redis_the_gateway_starts(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_OF_TEST", "redis://user:hunter2@127.0.0.1:1/0")

    async def run() -> None:
        shared_by = {"url_env": "REDIS_OF_TEST", "timeout": 0.2}
        limits = Limits(Settings.from_engines(["demo=http://127.0.0.1:1"], redis=shared_by), Metrics(), 2)
        await limits.start()
        assert len(await granted(limits, key(requests_per_minute=10))) == 5  # one of two workers
        await asyncio.sleep(0.5)
        await limits.stop()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(run())
    assert len([r for r in caplog.records if r.name == "medassist.limits"]) == 1
    assert "hunter2" not in caplog.text


@pytest.mark.parametrize("url", ["http://user:hunter2@127.0.0.1:1", "redis://user:hunter2@127.0.0.1:1?nonsense=1"])
def test_a_url_that_is_none_is_not_repeated(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_OF_TEST", url)
    shared_by = {"url_env": "REDIS_OF_TEST"}
    with pytest.raises(ValueError, match=r"redis\.url.* must be") as caught:
        Limits(Settings.from_engines(["demo=http://127.0.0.1:1"], redis=shared_by), Metrics())
    assert "hunter2" not in repr(caught.value)
    assert caught.value.__suppress_context__


HOLDER = """
import asyncio, sys
from serving.gateway.metrics import Metrics
from serving.gateway.settings import Settings
from serving.tenants.key import Key, KeyLimits
from serving.tenants.limits import Limits
async def main():
    shared_by = {"url": sys.argv[1], "prefix": "test"}
    limits = Limits(Settings.from_engines(["demo=http://127.0.0.1:1"], redis=shared_by), Metrics())
    await limits.start()
    while not limits.shared.up:
        await asyncio.sleep(0.02)
    for number in range(3):
        assert await limits.admit(Key("key_a", "clinic", limits=KeyLimits(concurrency=3)), 1, 1)
    print("holds 3", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def test_requests_of_a_killed_gateway_stop_counting(server: Server) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, server.url], stdout=subprocess.PIPE)
    assert holder.stdout is not None

    async def run() -> None:
        limited = key(concurrency=3)
        async with gateways(server, others=1) as (one,):
            assert not await granted(one, limited)
            await asyncio.sleep(ALIVE / 2)
            assert not await granted(one, limited)  # it lives, and says so
            holder.kill()
            holder.wait()
            began = time.monotonic()
            while not (grants := await granted(one, limited)):
                assert time.monotonic() - began < PATIENCE
                await asyncio.sleep(0.1)
            assert len(grants) == 3
            assert await eventually(lambda: shared(one).members == 1)

    try:
        assert holder.stdout.readline() == b"holds 3\n"
        asyncio.run(run())
    finally:
        holder.kill()
        holder.wait()
