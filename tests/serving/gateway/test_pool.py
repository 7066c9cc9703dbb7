"""What becomes of models and replicas when the settings are read again."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from serving.gateway.metrics import Metrics
from serving.gateway.pool import Pool
from serving.gateway.scheduler import Job
from serving.gateway.settings import Model, Settings
from tests.serving.gateway.faulty_engine import FaultyEngine, running
from tests.waiting import eventually


def settings(canaries: float = 0.0, **models: Any) -> Settings:
    probes = {"interval": 0.05, "canary_interval": canaries}
    return Settings.model_validate({"models": models, "probes": probes})


def on(*engines: FaultyEngine, **content: Any) -> dict[str, Any]:
    return {"engines": [{"url": engine.url} for engine in engines], **content}


@contextlib.asynccontextmanager
async def serving(content: Settings) -> AsyncIterator[Pool]:
    pool = Pool(content, Metrics())
    await pool.start()
    try:
        yield pool
    finally:
        await pool.stop()


def outstanding(pool: Pool, label: str) -> float | None:
    labels = {"model": "m", "replica": label}
    return pool.metrics.registry.get_sample_value("medassist_replica_outstanding", labels)


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"url": "http://xn--:8000"}, "is not a URL"),
        ({"url": "http://ä..de"}, "is not a URL"),
        ({"url": "http://h", "api_key_env": "NO_KEY"}, "NO_KEY is not set"),
    ],
)
def test_settings_that_cannot_be_used_change_nothing(wrong: dict[str, str], reason: str) -> None:
    async def work() -> None:
        engine = FaultyEngine()
        async with running(engine), serving(settings(m=on(engine))) as pool:
            before, replica = pool.settings, pool.models["m"].replicas[0]
            changed = Model.model_validate(on(engine, max_queue=7))
            at = changed.engines[0].model_copy(update=wrong)
            broken = changed.model_copy(update={"engines": (at,)})
            with pytest.raises(ValueError, match=reason):
                await pool.apply(before.model_copy(update={"models": {"m": changed, "z": broken}}))
            served = pool.models["m"]
            assert (pool.settings, list(pool.models), served.replicas) == (before, ["m"], [replica])
            assert served.settings.max_queue == served.scheduler.settings.max_queue != 7
            assert replica.available

    run(work())


def test_other_weights_may_take_the_place_of_the_old_ones() -> None:
    async def work() -> None:
        old, new = FaultyEngine(), FaultyEngine()
        new.logprobs = [-9.0, -9.0, -9.0, -9.0]
        async with running(old, new), serving(settings(60, m=on(old))) as pool:
            assert pool.models["m"].available
            await pool.apply(settings(60, m=on(new)))
            assert [replica.state for replica in pool.models["m"].replicas] == ["ready"]
            # Beside the old ones they must agree, until these are taken away.
            await pool.apply(settings(60, m=on(new, old)))
            refused = pool.models["m"].replicas[1]
            assert refused.state == "refused"
            await pool.apply(settings(60, m=on(old)))
            assert await eventually(lambda: refused.available)

    run(work())


def test_the_old_replica_answers_until_the_new_one_is_known() -> None:
    async def work() -> None:
        old, new = FaultyEngine(), FaultyEngine()
        new.delay["/health"] = 0.5
        async with running(old, new), serving(settings(m=on(old))) as pool:
            served = pool.models["m"]
            before = served.replicas[0]
            reload = asyncio.create_task(pool.apply(settings(m=on(new))))
            assert await eventually(lambda: new.asked["/health"] == 1)
            lease = await served.scheduler.admit(Job(arrived=0.0))
            assert lease.replica is before
            lease.done(ok=True)
            await reload
            lease = await served.scheduler.admit(Job(arrived=0.0))
            assert lease.replica.settings.url == new.url
            lease.done(ok=True)
            assert await eventually(lambda: before.session.closed)

    run(work())


def test_the_end_closes_replicas_that_are_just_met() -> None:
    async def work() -> None:
        old, new = FaultyEngine(), FaultyEngine()
        new.delay["/health"] = 60
        async with running(old, new):
            async with serving(settings(m=on(old))) as pool:
                reload = asyncio.create_task(pool.apply(settings(m=on(new))))
                assert await eventually(lambda: new.asked["/health"] == 1)
                (coming,) = pool._coming
            assert coming.session.closed
            reload.cancel()
            await asyncio.gather(reload, return_exceptions=True)

    run(work())


def test_removed_replica_keeps_its_label_until_its_requests_have_ended() -> None:
    async def work() -> None:
        first, second = FaultyEngine(), FaultyEngine()
        async with running(first, second), serving(settings(m=on(first))) as pool:
            served = pool.models["m"]
            removed = served.replicas[0]
            lease = await served.scheduler.admit(Job(arrived=0.0))
            await pool.apply(settings(m=on(second)))
            assert [replica.name for replica in served.replicas] == ["1"]
            assert (outstanding(pool, "0"), outstanding(pool, "1")) == (1, 0)
            assert not removed.session.closed
            lease.done(ok=True)
            assert await eventually(lambda: removed.session.closed)
            assert outstanding(pool, "0") == 0
            await pool.apply(settings(m=on(second, first)))
            assert [replica.name for replica in served.replicas] == ["1", "0"]

    run(work())


def test_the_end_closes_replicas_that_were_removed_too() -> None:
    async def work() -> None:
        first, second = FaultyEngine(), FaultyEngine()
        async with running(first, second):
            async with serving(settings(m=on(first))) as pool:
                removed = pool.models["m"].replicas[0]
                await pool.models["m"].scheduler.admit(Job(arrived=0.0))
                await pool.apply(settings(m=on(second)))
                assert not removed.session.closed
            assert removed.session.closed

    run(work())
