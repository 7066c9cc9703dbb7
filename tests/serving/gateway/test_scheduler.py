"""Who gets a replica, who waits, and who is refused at once."""

import asyncio
from collections import Counter
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from serving.gateway.errors import ApiError
from serving.gateway.metrics import Metrics
from serving.gateway.scheduler import Job, Lease, Scheduler
from serving.gateway.settings import LatencyTarget, Model
from tests.serving.gateway.simulation import FakeReplica, run

T = TypeVar("T")
Places = list[Lease[FakeReplica]]


def scheduler_of(*replicas: FakeReplica, share: float = 1.0, **settings: Any) -> Scheduler[FakeReplica]:
    model = Model(engines=tuple(replica.settings for replica in replicas), **settings)
    return Scheduler("m", model, replicas, Metrics(), share)


def job(**fields: Any) -> Job:
    return Job(asyncio.get_running_loop().time(), **fields)


async def fill(scheduler: Scheduler[FakeReplica], count: int, **fields: Any) -> Places:
    return [await scheduler.admit(job(**fields)) for _ in range(count)]


async def in_queue(admission: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
    """Waits until the admission waits."""
    task = asyncio.ensure_future(admission)
    await asyncio.sleep(0)
    assert not task.done()
    return task


async def refusal(admission: Coroutine[Any, Any, Lease[FakeReplica]]) -> ApiError:
    """Of an admission that is refused at once."""
    began = asyncio.get_running_loop().time()
    with pytest.raises(ApiError) as caught:
        await admission
    assert asyncio.get_running_loop().time() == began
    assert caught.value.retry_after is not None
    assert caught.value.retry_after >= 1
    return caught.value


async def serve(scheduler: Scheduler[FakeReplica], seconds: float, **fields: Any) -> float:
    """A request that takes so long at its replica; returns how long it waited."""
    request = job(**fields)
    lease = await scheduler.admit(request)
    waited = asyncio.get_running_loop().time() - request.arrived
    await asyncio.sleep(seconds)
    lease.done(True, 10)
    return waited


def rejections(scheduler: Scheduler[FakeReplica]) -> dict[str, float]:
    samples = next(iter(scheduler.metrics.rejections.collect())).samples
    return {s.labels["reason"]: s.value for s in samples if s.name.endswith("_total")}


def test_equal_replicas_share_and_weights_count() -> None:
    async def main() -> None:
        equal = [FakeReplica(str(i)) for i in range(4)]
        await fill(scheduler_of(*equal), 40)
        assert [replica.outstanding for replica in equal] == [10] * 4
        big, small = FakeReplica("0", weight=1.0), FakeReplica("1", weight=0.25)
        scheduler = scheduler_of(big, small, max_concurrency=80)
        await fill(scheduler, 50)
        assert (big.outstanding, small.outstanding) == (40, 10)
        await fill(scheduler, 50)
        assert (big.outstanding, small.outstanding) == (80, 20)
        await in_queue(scheduler.admit(job()))  # both are full

    run(main())


def test_one_after_the_other_equal_replicas_take_turns() -> None:
    async def main() -> None:
        seen: Counter[str] = Counter()
        scheduler = scheduler_of(*[FakeReplica(str(i)) for i in range(3)])
        for _ in range(30):
            lease = await scheduler.admit(job())
            seen[lease.replica.name] += 1
            lease.done(True)
        assert seen == {"0": 10, "1": 10, "2": 10}

    run(main())


def test_others_load_and_unread_prompts_are_work() -> None:
    async def main() -> None:
        a, b = FakeReplica("0", foreign=3), FakeReplica("1")
        scheduler = scheduler_of(a, b, max_concurrency=100, max_prefill_tokens=10_000)
        assert [lease.replica.name for lease in await fill(scheduler, 3)] == ["1", "1", "1"]
        a.foreign, b.outstanding = 0, 0
        [lease] = await fill(scheduler, 1, prompt_tokens=900)  # as much as nine requests
        other = "1" if lease.replica is a else "0"
        assert {place.replica.name for place in await fill(scheduler, 9)} == {other}
        lease.first_byte()
        assert (await scheduler.admit(job())).replica is lease.replica

    run(main())


def test_the_queue_is_ordered_by_deadline() -> None:
    async def main() -> None:
        scheduler = scheduler_of(FakeReplica(), max_concurrency=1)
        [place] = await fill(scheduler, 1)
        order: list[str] = []

        async def one(name: str, deadline: float | None) -> None:
            lease = await scheduler.admit(job(deadline=deadline))
            order.append(name)
            lease.done(True)

        tasks = [await in_queue(one(*each)) for each in (("none", None), ("late", 8.0), ("soon", 5.0))]
        place.done(True)
        await asyncio.gather(*tasks)
        assert order == ["soon", "late", "none"]

    run(main())


def test_a_full_queue_takes_only_who_is_more_urgent() -> None:
    async def main() -> None:
        scheduler = scheduler_of(FakeReplica(), max_concurrency=1, max_queue=2)
        [place] = await fill(scheduler, 1)
        first, last = [await in_queue(scheduler.admit(job(deadline=at))) for at in (5.0, 6.0)]
        error = await refusal(scheduler.admit(job(deadline=6.0)))
        assert (error.status, error.code) == (429, "overloaded")
        urgent = await in_queue(scheduler.admit(job(deadline=4.0)))
        with pytest.raises(ApiError) as evicted:
            await last
        assert (evicted.value.status, evicted.value.code) == (429, "overloaded")
        assert len(scheduler.waiting) == 2
        place.done(True)
        (await urgent).done(True)
        (await first).done(True)
        assert rejections(scheduler) == {"overloaded": 2}

    run(main())


def test_who_would_wait_in_vain_is_refused_at_once_and_may_come_back_when_told() -> None:
    async def main() -> None:
        scheduler = scheduler_of(FakeReplica(), max_concurrency=2, queue_timeout=10.0)
        await asyncio.gather(*(serve(scheduler, 4.0) for _ in range(2)))  # now its rate is known: one in two seconds
        running = [asyncio.ensure_future(serve(scheduler, 4.0)) for _ in range(30)]
        await asyncio.sleep(0.01)
        waits = await asyncio.gather(*running, return_exceptions=True)
        served = [wait for wait in waits if isinstance(wait, float)]
        refused = [e for e in waits if isinstance(e, ApiError)]
        assert len(served) + len(refused) == 30
        assert {(e.status, e.code) for e in refused} == {(429, "overloaded")}
        assert 4 <= len(served) <= 2 + 5
        assert max(served) <= 10.0
        # Each of those that waited takes two seconds of the engine, and so does who comes back.
        assert {e.retry_after for e in refused} == {2 * (len(served) - 2 + 1)}

    run(main())


def test_a_deadline_that_cannot_be_kept_is_refused_at_once() -> None:
    async def main() -> None:
        scheduler = scheduler_of(FakeReplica(), max_concurrency=1)
        await serve(scheduler, 4.0)
        running = asyncio.ensure_future(serve(scheduler, 4.0))
        await asyncio.sleep(0)
        loop = asyncio.get_running_loop()
        error = await refusal(scheduler.admit(job(deadline=loop.time() + 7.0)))  # 4 s of waiting, 4 s of service
        assert error.code == "overloaded"
        assert await serve(scheduler, 4.0, deadline=loop.time() + 20.0) == pytest.approx(4.0)
        await running

    run(main())


def test_waiting_ends_in_time() -> None:
    async def main() -> None:
        scheduler = scheduler_of(FakeReplica(), max_concurrency=1, queue_timeout=3.0)
        [place] = await fill(scheduler, 1)
        loop = asyncio.get_running_loop()
        slow = await in_queue(scheduler.admit(job()))
        hasty = await in_queue(scheduler.admit(job(deadline=1.0)))
        for task, moment in ((hasty, 1.0), (slow, 3.0)):
            with pytest.raises(ApiError) as caught:
                await task
            assert loop.time() == pytest.approx(moment, abs=0.01)
            assert (caught.value.status, caught.value.code) == (503, "queue_timeout")
        assert not scheduler.waiting
        place.done(True)

    run(main())


def test_cancelled_in_the_queue_is_out_of_it() -> None:
    async def main() -> None:
        replica = FakeReplica()
        scheduler = scheduler_of(replica, max_concurrency=1)
        [place] = await fill(scheduler, 1)
        first, second = [await in_queue(scheduler.admit(job())) for _ in range(2)]
        first.cancel()
        await asyncio.wait([first])
        assert len(scheduler.waiting) == 1
        second.cancel()
        place.done(True)  # comes before the task could take itself out
        await asyncio.wait([second])
        assert not scheduler.waiting
        assert replica.outstanding == 0

    run(main())


def test_a_place_given_to_a_cancelled_task_goes_to_the_next() -> None:
    async def main() -> None:
        replica = FakeReplica()
        scheduler = scheduler_of(replica, max_concurrency=1)
        [place] = await fill(scheduler, 1)
        first, second = [await in_queue(scheduler.admit(job())) for _ in range(2)]
        place.done(True)  # gives the place to the first
        first.cancel()
        (await second).done(True)
        assert first.cancelled() or first.cancelling()
        assert replica.outstanding == 0

    run(main())


def test_replicas_away() -> None:
    async def main() -> None:
        a, b = FakeReplica("0", retry_after=2), FakeReplica("1", retry_after=30)
        scheduler = scheduler_of(a, b, max_concurrency=1, queue_timeout=5.0)
        places = await fill(scheduler, 2)
        patient = await in_queue(scheduler.admit(job()))
        hasty = await in_queue(scheduler.admit(job(deadline=1.0)))
        a.state, b.state = "down", "starting"
        scheduler.wake()
        with pytest.raises(ApiError) as caught:
            await hasty
        assert (caught.value.status, caught.value.code, caught.value.retry_after) == (503, "engine_unavailable", 2)
        assert asyncio.get_running_loop().time() == 0  # not when its time is over
        error = await refusal(scheduler.admit(job()))
        assert (error.code, error.retry_after) == ("engine_unavailable", 2)
        for place in places:
            place.done(False)
        await asyncio.sleep(2)
        a.state = "ready"
        scheduler.wake()
        assert (await patient).replica is a
        a.state = b.state = "refused"
        assert (await refusal(scheduler.admit(job()))).code == "model_refused"
        assert rejections(scheduler) == {"engine_unavailable": 2, "model_refused": 1}

    run(main())


def test_waiting_for_replicas_that_do_not_come_back_ends_as_unavailable() -> None:
    async def main() -> None:
        replica = FakeReplica(retry_after=1)
        scheduler = scheduler_of(replica, max_concurrency=1, queue_timeout=3.0)
        [place] = await fill(scheduler, 1)
        waiting = await in_queue(scheduler.admit(job()))
        replica.state = "down"
        scheduler.wake()
        place.done(False)
        with pytest.raises(ApiError) as caught:
            await waiting
        assert caught.value.code == "engine_unavailable"

    run(main())


@pytest.mark.parametrize(("field", "busy"), [("waiting", 9), ("cache_usage", 0.98)])
def test_a_busy_engine_is_left_alone_but_for_one(field: str, busy: float) -> None:
    async def main() -> None:
        replica = FakeReplica(**{field: busy})  # type: ignore[arg-type]
        scheduler = scheduler_of(replica, max_concurrency=64)
        scheduler.wake()
        await fill(scheduler, 1)
        second = await in_queue(scheduler.admit(job()))
        setattr(replica, field, 0)
        scheduler.wake()
        await second

    run(main())


def test_what_left_since_the_last_look_at_an_engine_no_longer_waits_there() -> None:
    async def main() -> None:
        replica = FakeReplica()
        scheduler = scheduler_of(replica, max_concurrency=256)
        places = await fill(scheduler, 20)
        replica.running, replica.waiting = 10, 10
        scheduler.wake()
        task = await in_queue(scheduler.admit(job()))
        places.pop().done(True)
        await asyncio.sleep(0)
        assert not task.done()
        places.pop().done(True)
        await task

    run(main())


def test_prompts_are_sent_within_the_budget() -> None:
    async def main() -> None:
        scheduler = scheduler_of(FakeReplica(), max_prefill_tokens=1000)
        [large] = await fill(scheduler, 1, prompt_tokens=5000)
        waiting = await in_queue(scheduler.admit(job(prompt_tokens=600)))
        small = await in_queue(scheduler.admit(job(prompt_tokens=10)))  # does not overtake
        large.first_byte()
        (await waiting).first_byte()
        await small
        [unread] = await fill(scheduler, 1, prompt_tokens=990)
        blocked = await in_queue(scheduler.admit(job(prompt_tokens=1)))
        unread.done(False)
        await blocked

    run(main())


def test_a_retry_goes_elsewhere_if_it_can() -> None:
    async def main() -> None:
        a, b = FakeReplica("0"), FakeReplica("1")
        scheduler = scheduler_of(a, b, max_concurrency=1)
        [at_a] = await fill(scheduler, 1, tried={b})
        assert at_a.replica is a
        retry = await in_queue(scheduler.admit(job(tried={b})))
        [at_b] = await fill(scheduler, 1)  # the waiting retry holds back no other
        assert at_b.replica is b
        at_b.done(True)
        await asyncio.sleep(0)
        assert not retry.done()
        a.state = "down"
        scheduler.wake()
        assert (await retry).replica is b  # there is no other any more

    run(main())


def test_a_retry_is_not_refused_for_being_late_and_is_next() -> None:
    async def main() -> None:
        a, b = FakeReplica("0"), FakeReplica("1")
        scheduler = scheduler_of(a, b, max_concurrency=1, latency_target=LatencyTarget(total=2.0))
        await serve(scheduler, 1.0)
        await fill(scheduler, 1, tried={a})
        [place] = await fill(scheduler, 1, tried={b})
        first = await in_queue(scheduler.admit(job()))
        late = job(tried={b})
        late.arrived -= 5.0
        retry = await in_queue(scheduler.admit(late))
        place.done(True)
        assert (await retry).replica is a
        assert not first.done()
        first.cancel()

    run(main())


def test_affinity_yields_to_load() -> None:
    async def main() -> None:
        a, b = FakeReplica("0"), FakeReplica("1")
        scheduler = scheduler_of(a, b)
        lease = await scheduler.admit(job(prefixes=(1, 2)))
        home, other = lease.replica, b if lease.replica is a else a
        assert [place.replica for place in await fill(scheduler, 1, prefixes=(1, 2, 3))] == [home]
        await fill(scheduler, 1, tried={other})  # nothing of that prefix: 3 to 0
        assert (await scheduler.admit(job(prefixes=(1, 2)))).replica is other

    run(main())


def test_reload_keeps_running_and_waiting_requests() -> None:
    async def main() -> None:
        a, b = FakeReplica("0"), FakeReplica("1")
        scheduler = scheduler_of(a, max_concurrency=1)
        [place] = await fill(scheduler, 1)
        waiting = [await in_queue(scheduler.admit(job())) for _ in range(2)]
        scheduler.update(scheduler.settings, [b])
        assert (await waiting[0]).replica is b
        place.done(True)  # at a removed replica: its place is nobody's
        await asyncio.sleep(0)
        assert not waiting[1].done()
        assert a.outstanding == 0
        scheduler.update(scheduler.settings.model_copy(update={"max_concurrency": 2}), [b])
        assert (await waiting[1]).replica is b
        last = await in_queue(scheduler.admit(job()))
        scheduler.update(scheduler.settings, [])
        with pytest.raises(ApiError) as caught:
            await last
        assert caught.value.code == "engine_unavailable"

    run(main())


def test_workers_have_their_share_but_at_least_one() -> None:
    async def main() -> None:
        scheduler = scheduler_of(FakeReplica(), share=0.25, max_concurrency=8, max_queue=8)
        await fill(scheduler, 2)
        for _ in range(2):
            await in_queue(scheduler.admit(job()))
        await refusal(scheduler.admit(job()))
        await fill(scheduler_of(FakeReplica(), share=0.25, max_concurrency=1), 1)

    run(main())


def test_a_lease_ends_once() -> None:
    async def main() -> None:
        replica = FakeReplica()
        [lease] = await fill(scheduler_of(replica), 1)
        lease.done(True)
        with pytest.raises(AssertionError):
            lease.done(True)
        assert replica.outstanding == 0

    run(main())
