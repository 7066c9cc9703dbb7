"""Fair shares between keys: the queue by itself, and a greedy key beside a polite one at simulated engines."""

import asyncio
import heapq
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.gateway.errors import ApiError
from serving.gateway.fair_queue import SPARE, FairQueue, Waiting
from serving.gateway.metrics import Metrics
from serving.gateway.scheduler import Job, Lease, Scheduler
from serving.gateway.settings import LatencyTarget, Model
from tests.serving.gateway.simulation import (
    LARGE_GPU,
    SMALL_CPU,
    FakeReplica,
    Load,
    Result,
    run,
    simulate,
    simulate_keys,
)

USUAL = 1.0


@contextmanager
def futures() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    try:
        yield loop
    finally:
        loop.close()


class Places:
    """A fair queue in front of so many places, in a time of its own; requests take what the test says."""

    def __init__(self, loop: asyncio.AbstractEventLoop, places: int) -> None:
        self.queue, self.loop, self.free = FairQueue(), loop, places
        self.now = 0.0
        self.work: defaultdict[str, float] = defaultdict(float)  # place-seconds by key
        self.served: list[Waiting] = []
        self._ends: list[tuple[float, int, Waiting, float, float]] = []
        self._seconds: dict[int, float] = {}

    def add(self, key: str, share: float = 1.0, seconds: float = USUAL, expires: float = 1e9) -> Waiting:
        waiting = Waiting(Job(self.now, key=key, share=share), expires, self.loop.create_future())
        self._seconds[id(waiting)] = seconds
        self.queue.add(waiting, self.now)
        return waiting

    def serve(self) -> None:
        """Gives the free places away."""
        while self.free and (waiting := self.queue.next(self.now)) is not None:
            self.queue.take(waiting, self.now)
            job = waiting.job
            flow = self.queue.begin(job.key, job.share, 1.0, USUAL, self.now)
            assert flow.key == job.key
            self.free -= 1
            self.served.append(waiting)
            end = self.now + self._seconds[id(waiting)]
            heapq.heappush(self._ends, (end, len(self.served), waiting, self.now, flow.usual))

    def end(self) -> Waiting | None:
        """The next of the running ones ends."""
        if not self._ends:
            return None
        self.now, _, waiting, began, charge = heapq.heappop(self._ends)
        self.work[waiting.job.key] += self.now - began
        flow = self.queue._flows[waiting.job.key]
        self.queue.end(flow, 1.0, charge, began, self.now)
        self.free += 1
        return waiting


def keys_of(served: list[Waiting]) -> str:
    return "".join(waiting.job.key for waiting in served)


def test_keys_take_turns_whatever_they_ask_for() -> None:
    with futures() as loop:
        places = Places(loop, 1)
        for _ in range(6):
            places.add("g")
        for _ in range(3):
            places.add("p")
        places.serve()
        while places.end():
            places.serve()
        assert sorted(keys_of(places.served)[:2]) == ["g", "p"]
        assert keys_of(places.served)[:6].count("p") == 3
        assert not places.queue.flows


def test_who_holds_all_places_does_not_get_the_next_one() -> None:
    with futures() as loop:
        places = Places(loop, 8)
        for i in range(100):
            places.add("g", seconds=0.1 * (i % 3 + 1))  # shorter than is usual, so it gets some of its charge back
        places.serve()
        places.end()
        places.serve()
        for _ in range(3):
            places.add("p")
            places.end()
            places.serve()
            assert places.served[-1].job.key == "p"


def test_long_requests_are_charged_while_they_run() -> None:
    with futures() as loop:
        places = Places(loop, 4)
        for _ in range(100):
            places.add("g", seconds=50.0)
            places.add("p", seconds=1.0)
        places.serve()
        while places.now < 400:
            places.end()
            places.serve()
        # Two places each, all the time; p's requests take a fiftieth.
        assert keys_of(places.served).count("p") == 100
        assert keys_of(places.served).count("g") <= 4 + 400 // 50 * 4


def test_being_idle_earns_no_credit() -> None:
    with futures() as loop:
        places = Places(loop, 1)
        places.add("p")
        for _ in range(500):
            places.add("g")
            places.serve()
            places.end()
        for _ in range(20):
            places.add("g")
            places.add("p")
        places.serve()
        while len(places.served) < 520:
            places.end()
            places.serve()
        assert abs(keys_of(places.served[-20:]).count("p") - 10) <= 1


def test_far_ahead_and_gone_for_a_moment_is_not_forgiven_while_others_wait() -> None:
    with futures() as loop:
        places = Places(loop, 1)
        for _ in range(200):
            places.add("p", seconds=1.0)
        turns = 0
        while places.now < 150:
            if "g" not in places.queue._flows or not (
                places.queue._flows["g"].waiting or places.queue._flows["g"].running
            ):
                places.add("g", seconds=10.0)  # one at a time, each as long as ten
                turns += 1
            places.serve()
            places.end()
        assert places.work["g"] <= 0.6 * places.now
        assert turns <= 10


@settings(deadline=None, max_examples=60)
@given(
    shares=st.lists(st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0]), min_size=2, max_size=6),
    places=st.integers(1, 12),
    longest=st.sampled_from([1.0, 3.0, 20.0]),
    seed=st.integers(0, 2**32),
)
def test_backlogged_keys_get_work_by_their_shares(shares: list[float], places: int, longest: float, seed: int) -> None:
    """At any moment the work of two of them, each by its share, differs by no more than a few of their longest
    requests."""
    rng = random.Random(seed)
    with futures() as loop:
        served = Places(loop, places)

        def add(key: int) -> None:
            served.add(str(key), shares[key], rng.uniform(0.1, longest))

        for key in range(len(shares)):
            for _ in range(places + 1):
                add(key)
        served.serve()
        # Beyond a request too much, what the others' running requests have not been charged yet.
        bound = (longest + USUAL) * (2 + places) / min(shares)
        for _ in range(150 * places):
            ended = served.end()
            assert ended is not None
            add(int(ended.job.key))
            served.serve()
            work = [served.work[str(key)] / share for key, share in enumerate(shares)]
            assert max(work) - min(work) <= bound


@settings(deadline=None, max_examples=100)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_nothing_is_lost_or_served_twice_and_nothing_stays(data: st.DataObject, seed: int) -> None:
    rng = random.Random(seed)
    with futures() as loop:
        places = Places(loop, data.draw(st.integers(1, 4)))
        queue, now_waiting, gone = places.queue, set[Waiting](), 0
        for step in data.draw(st.lists(st.sampled_from("aaaaserlx"), max_size=120)):
            if step == "a":
                job = Job(places.now, key=str(rng.randrange(5)), share=rng.choice([0.5, 1.0, 3.0]))
                if rng.random() < 0.1:
                    job.tried.add(object())
                waiting = Waiting(job, places.now + rng.random() * 20, loop.create_future())
                places._seconds[id(waiting)] = rng.random() * 3
                assert 0 <= queue.ahead(waiting, USUAL, places.now) <= len(queue)
                queue.add(waiting, places.now)
                now_waiting.add(waiting)
            elif step == "s":
                before = len(places.served)
                places.serve()
                for waiting in places.served[before:]:
                    now_waiting.remove(waiting)  # raises where it was served before
            elif step == "e":
                places.end()
            elif step == "r" and now_waiting:
                waiting = rng.choice(sorted(now_waiting, key=id))
                queue.remove(waiting, places.now)
                now_waiting.remove(waiting)
                gone += 1
            elif step == "l":
                newcomer = Waiting(Job(places.now, key=str(rng.randrange(5))), 1e9, loop.create_future())
                last = queue.last(newcomer)
                if last is not None:
                    assert last in now_waiting
                    assert last.job.key != newcomer.job.key or last.order > newcomer.order
            elif step == "x":
                late = {waiting for waiting in now_waiting if waiting.expires <= places.now}
                while (expired := queue.expired(places.now)) is not None:
                    queue.remove(expired, places.now)
                    late.remove(expired)
                    now_waiting.remove(expired)
                assert not late
            assert set(queue) == now_waiting
            assert len(queue) == len(now_waiting)
        for waiting in list(queue):
            queue.remove(waiting, places.now)
        while places.end():
            pass
        assert not queue.flows
        assert queue.level == 0
        assert queue.next(places.now) is None


@settings(deadline=None, max_examples=60)
@given(
    waiting=st.lists(st.tuples(st.integers(0, 4), st.floats(0, 10)), max_size=40),
    running=st.lists(st.integers(0, 4), max_size=10),
    newcomer=st.tuples(st.integers(0, 4), st.floats(0, 10)),
)
def test_it_foresees_how_many_go_before(
    waiting: list[tuple[int, float]], running: list[int], newcomer: tuple[int, float]
) -> None:
    with futures() as loop:
        queue = FairQueue()
        for key in running:
            queue.begin(str(key), 1.0 + key, 1.0, USUAL, 0.0)

        def one(key: int, expires: float) -> Waiting:
            return Waiting(Job(0.0, key=str(key), share=1.0 + key), expires, loop.create_future())

        for each in waiting:
            queue.add(one(*each), 0.0)
        mine = one(*newcomer)
        foreseen = queue.ahead(mine, USUAL, 0.0)
        queue.add(mine, 0.0)
        before = 0
        while (first := queue.next(0.0)) is not mine:
            assert first is not None
            queue.take(first, 0.0)
            queue.begin(first.job.key, first.job.share, 1.0, USUAL, 0.0)
            before += 1
        assert abs(foreseen - before) <= 4  # one of each other key, where they are equal but for rounding


def test_ten_thousand_keys_are_cheap_and_leave_nothing() -> None:
    with futures() as loop:
        places = Places(loop, 8)
        queue, steps = places.queue, 0

        class Counted(float):  # stands for a comparison in a heap or a list
            def __lt__(self, other: float) -> bool:
                nonlocal steps
                steps += 1
                return float.__lt__(self, other)

            def __gt__(self, other: float) -> bool:
                nonlocal steps
                steps += 1
                return float.__gt__(self, other)

        count = 10_000
        for i in range(count):
            places.add(f"key{i}", expires=Counted(1e6 + i))
        assert queue.flows == count
        places.serve()
        for _ in range(count - 8):
            places.end()
            places.serve()
            places.add(f"key{count}", expires=Counted(2e6))  # one that goes on asking
        assert steps <= 40 * 2 * count
        assert queue.flows <= count // 2 + 10
        while places.end():
            places.serve()
        assert not queue.flows
        assert not len(queue)
        assert max(len(queue._next), len(queue._longest), len(queue._ahead)) <= 2 * 10 + SPARE


# With a scheduler.


def scheduler_of(**fields: int) -> Scheduler[FakeReplica]:
    replica = FakeReplica()
    return Scheduler("m", Model(engines=(replica.settings,), **fields), [replica], Metrics())


async def in_queue(scheduler: Scheduler[FakeReplica], key: str, **fields: float) -> "asyncio.Task[Lease[FakeReplica]]":
    job = Job(asyncio.get_running_loop().time(), key=key, **fields)  # type: ignore[arg-type]
    task = asyncio.ensure_future(scheduler.admit(job))
    await asyncio.sleep(0)
    return task


def test_a_full_queue_loses_the_last_of_who_waits_with_most() -> None:
    async def main() -> None:
        scheduler = scheduler_of(max_concurrency=1, max_queue=4)
        (await in_queue(scheduler, "g")).result()
        greedy = [await in_queue(scheduler, "g") for _ in range(4)]
        assert (await in_queue(scheduler, "g")).exception() is not None
        first = await in_queue(scheduler, "p")
        with pytest.raises(ApiError) as caught:
            await greedy[-1]
        assert (caught.value.status, caught.value.code) == (429, "overloaded")
        second = await in_queue(scheduler, "p")
        with pytest.raises(ApiError):
            await greedy[-2]
        assert (await in_queue(scheduler, "p")).exception() is not None  # it has as many as the other
        assert not any(task.done() for task in (*greedy[:2], first, second))
        third = await in_queue(scheduler, "p", share=3.0)  # now it may have more
        with pytest.raises(ApiError):
            await greedy[1]
        for task in (greedy[0], first, second, third):
            task.cancel()

    run(main())


def test_only_who_goes_before_counts_for_the_prediction() -> None:
    async def main() -> None:
        scheduler = scheduler_of(max_concurrency=1, queue_timeout=10)
        lease = (await in_queue(scheduler, "g")).result()
        await asyncio.sleep(3)
        lease.done(True)
        (await in_queue(scheduler, "g")).result()
        greedy = [await in_queue(scheduler, "g") for _ in range(8)]
        assert greedy[-1].exception() is not None
        assert not (await in_queue(scheduler, "p")).done()
        for task in greedy:
            task.cancel()

    run(main())


def test_a_cancelled_job_of_one_key_lets_another_go_on() -> None:
    async def main() -> None:
        scheduler = scheduler_of(max_concurrency=4, max_prefill_tokens=100)
        (await in_queue(scheduler, "g", prompt_tokens=60)).result()
        large = await in_queue(scheduler, "g", prompt_tokens=90)
        small = await in_queue(scheduler, "g", prompt_tokens=10)
        assert not small.done()
        large.cancel()
        await asyncio.sleep(0)
        (await small).done(True)

    run(main())


TOTAL = LatencyTarget(total=5.0)
# Engines, requests a second that they can answer in time, and the target.
ENGINES = {
    "cpu": ([SMALL_CPU], 4.3, TOTAL, {}),
    "gpu": ([LARGE_GPU], 8.0, LatencyTarget(total=10.0), {"tokens": 128.0, "prompt": 300.0}),
    "two": ([SMALL_CPU, SMALL_CPU], 8.6, TOTAL, {}),
    "no target": ([SMALL_CPU], 4.3, LatencyTarget(), {}),
}


def load(rate: float, seed: int, key: str, share: float = 1.0, **lengths: float) -> Load:
    return Load(lambda _: rate, 120.0, seed=seed, key=key, share=share, **lengths)  # type: ignore[arg-type]


def waited(result: Result, share: float) -> float:
    waits = result.waits(20)
    return waits[int(share * len(waits))]


@pytest.mark.parametrize("case", ENGINES)
def test_a_greedy_key_takes_nothing_from_a_polite_one(case: str) -> None:
    speeds, capacity, target, lengths = ENGINES[case]
    settings: dict[str, Any] = {} if target.total else {"max_concurrency": 16}
    polite = load(0.3 * capacity, 1, "polite", **lengths)  # below its half
    alone, *_ = run(simulate_keys(speeds, [polite], target, **settings))
    found, greedy = run(
        simulate_keys(speeds, [polite, load(20 * polite.rate(0), 2, "greedy", **lengths)], target, **settings)
    )
    assert len(found.answered) >= 0.85 * len(alone.answered)
    assert found.goodput(20) >= 0.8 * alone.goodput(20)  # an engine that is kept busy is late more often
    busy = waited(run(simulate(speeds, load(capacity, 3, "", **lengths), target)), 0.5)
    assert waited(found, 0.5) <= 2 * busy + 0.2
    assert greedy.goodput(20) >= 0.5 * capacity  # what the other leaves
    assert len(greedy.refused) > 2 * len(greedy.answered)


def test_shares_are_what_keys_get() -> None:
    one, three = run(simulate_keys([SMALL_CPU], [load(8.0, 1, "one"), load(8.0, 2, "three", 3.0)], TOTAL))
    assert 2.4 <= len(three.answered) / len(one.answered) <= 3.6
    assert one.goodput(20) + three.goodput(20) >= 0.85 * 4.3


def test_a_greedy_key_alone_gets_everything() -> None:
    keyed, nobody = (run(simulate([SMALL_CPU], load(20.0, 4, key), TOTAL)) for key in ("greedy", ""))
    assert keyed.answered == nobody.answered
    assert keyed.goodput(20) >= 0.9 * 4.3


def test_longer_requests_are_no_larger_share() -> None:
    long, short = run(
        simulate_keys(
            [SMALL_CPU],
            [load(4.0, 1, "long", tokens=160.0, spread=0.2), load(12.0, 2, "short", tokens=20.0, spread=0.2)],
            LatencyTarget(),
            max_concurrency=12,
        )
    )
    work = [sum(tokens for *_, tokens in result.answered) for result in (long, short)]
    assert len(short.answered) >= 3 * len(long.answered), work


def test_many_keys_are_all_served() -> None:
    loads = [load(0.5, seed, f"key{seed}") for seed in range(40)]  # 20 a second, capacity is 4.3
    results = run(simulate_keys([SMALL_CPU], loads, TOTAL))
    answered = [len(result.answered) for result in results]
    assert min(answered) >= 0.4 * sum(answered) / len(answered)
    assert max(answered) <= 2 * sum(answered) / len(answered)


def test_requests_that_take_no_time_do_no_harm() -> None:
    with futures() as loop:
        places = Places(loop, 1)
        for _ in range(12_000):
            places.add("fast", seconds=0.0)
            places.serve()
            places.add("slow", seconds=0.001)
            places.end()
            places.serve()
            places.end()
        places.add("fast")
        newcomer = Waiting(Job(places.now, key="other"), 1e9, loop.create_future())
        assert places.queue.ahead(newcomer, USUAL, places.now) in (0, 1)
