"""The limit that a latency target leads to: against simulated engines under twice the load that they can answer."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from serving.gateway.limiter import FIRST_LIMIT, Limiter, Service
from serving.gateway.settings import LatencyTarget
from tests.serving.gateway.simulation import LARGE_GPU, SMALL_CPU, Engine, Load, Speed, run, simulate

TOTAL = LatencyTarget(total=5.0)

# Engines, what is asked of them, requests per second that are twice what they can answer in time, and fixed limits
# around the best.
CASES = {
    "cpu, total": ([SMALL_CPU], {}, TOTAL, 8.6, (6, 8, 12, 16)),
    "cpu, short answers": (
        [SMALL_CPU], {"tokens": 16.0, "prompt": 30.0}, LatencyTarget(total=1.0), 32.0, (6, 8, 12, 16)
    ),
    "cpu, first token and total": (
        [SMALL_CPU], {"stream": True}, LatencyTarget(first_token=0.5, total=6.0), 9.6, (8, 12, 16, 24)
    ),
    "gpu, total": (
        [LARGE_GPU], {"tokens": 128.0, "prompt": 300.0}, LatencyTarget(total=10.0), 16.0, (48, 64, 96, 128)
    ),
    "gpu, first token": (
        [LARGE_GPU], {"tokens": 128.0, "prompt": 300.0, "stream": True}, LatencyTarget(first_token=0.5), 30.0,
        (128, 192, 256),
    ),
    "cpu, one of two is half as fast": (
        [SMALL_CPU, Speed(0.010, 0.004, 0.0001)], {}, TOTAL, 12.0, (6, 8, 12, 16)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_twice_the_load_is_answered_like_the_load_itself(case: str) -> None:
    speeds, lengths, target, rate, limits = CASES[case]
    load = Load(lambda _: rate, 120.0, seed=5, **lengths)  # type: ignore[arg-type]
    best = max((run(simulate(speeds, load, target, limit)) for limit in limits), key=lambda r: r.goodput(20))
    found = run(simulate(speeds, load, target))
    assert found.goodput() >= 0.9 * best.goodput()
    assert found.goodput(20) >= 0.9 * best.goodput(20)
    assert found.goodput(20, 40) >= 0.75 * best.goodput(20)  # of twenty seconds, chance moves it by a tenth and more
    longest_wait = (target.total or target.first_token or 0.0) * rate
    assert found.longest_queue <= longest_wait
    refused = Counter(code for _, code, _ in found.refused)
    assert len(found.refused) > 0.2 * rate * 120  # some answers are late
    assert refused["overloaded"] + refused["queue_timeout"] == len(found.refused)
    assert sum(seconds == 0 for *_, seconds in found.refused) >= 0.75 * len(found.refused)


def test_load_comes_and_goes() -> None:
    def rate(now: float) -> float:
        return 8.6 if 30 <= now < 60 or now >= 120 else 1.7

    result = run(simulate([SMALL_CPU], Load(rate, 180.0, seed=1), TOTAL))
    calm = [result.goodput(0, 30), result.goodput(65, 120)]
    busy = [result.goodput(35, 60), result.goodput(120, 180)]
    assert min(calm) >= 0.8 * 1.7
    assert min(busy) >= 0.85 * 4.3
    assert not [at for at, *_ in result.refused if 70 <= at < 119]
    between = [limit for at, limit in result.limits if 65 <= at < 119]
    assert max(between) == min(between)  # too little came to learn anything


def feed(
    limiter: Limiter, answers: int, seconds_a_token: float, outstanding: int | None = None, ok: bool = True
) -> None:
    """Answers of 50 tokens, at the limit unless told otherwise."""
    for _ in range(answers):
        at_once = outstanding or limiter.limit
        limiter.done(50 * seconds_a_token, ok, at_once, 50, at_once)


def test_it_grows_only_while_it_holds_back() -> None:
    limiter = Limiter(256, TOTAL)
    assert limiter.limit == FIRST_LIMIT
    feed(limiter, 1000, 0.01, outstanding=4)
    assert limiter.limit == FIRST_LIMIT
    feed(limiter, 2000, 0.01)
    assert limiter.limit == 256


def test_an_engine_too_slow_for_the_target_keeps_one_request() -> None:
    limiter = Limiter(256, TOTAL)
    feed(limiter, 200, 1.0)
    assert limiter.limit == 1
    for _ in range(2000):  # it has recovered
        limiter.done(50 * 0.01, True, limiter.limit, 50, limiter.limit)
    assert limiter.limit > FIRST_LIMIT


def test_fast_failures_are_no_service_but_late_ones_are() -> None:
    limiter = Limiter(256, TOTAL)
    feed(limiter, 500, 0.0001, ok=False)
    assert limiter.total.mean == 0
    feed(limiter, 500, 1.0, ok=False)
    assert limiter.limit == 1


def test_without_a_target_the_limit_is_the_setting() -> None:
    limiter = Limiter(256, LatencyTarget())
    feed(limiter, 500, 1.0)
    assert limiter.limit == 256
    limiter.update(64, LatencyTarget())
    assert limiter.limit == 64
    limiter.update(64, TOTAL)
    assert limiter.limit <= FIRST_LIMIT
    limiter.update(4, TOTAL)
    assert limiter.limit <= 4


def test_a_replica_that_was_away_starts_from_the_first_limit() -> None:
    limiter = Limiter(256, TOTAL)
    feed(limiter, 2000, 0.01)
    limiter.reset()
    assert limiter.limit == FIRST_LIMIT
    assert limiter.total.mean == 0


def test_the_line_is_found_from_requests_of_any_length() -> None:
    service = Service()
    for i in range(1000):
        at_once, tokens = 4 + i % 13, 10 + i * 7 % 191
        service.add(tokens * (0.005 + 0.002 * at_once), at_once, tokens)
    a, b = service.line()
    assert a == pytest.approx(0.005, rel=0.2)
    assert b == pytest.approx(0.002, rel=0.1)
    # A token takes 25 ms when there are ten at once: in 2.5 s, those of up to 100 tokens are done.
    [share] = service.within(2.5, [10])
    assert share == pytest.approx(0.47, abs=0.1)


def test_an_engine_that_starts_anew_is_learnt_anew() -> None:
    load = Load(lambda _: 16.0, 120.0, prompt=300.0, tokens=128.0, seed=2)
    result = run(simulate([LARGE_GPU], load, LatencyTarget(total=10.0), away=(50.0, 60.0)))
    limits = dict((round(at), limit) for at, limit in result.limits)
    assert limits[49] > 2 * FIRST_LIMIT
    assert limits[61] <= FIRST_LIMIT + 1
    assert {code for at, code, _ in result.refused if 52 <= at < 60} == {"engine_unavailable"}
    assert result.goodput(80, 120) >= 0.85 * 8


def test_who_is_refused_is_refused_at_once() -> None:
    load = Load(lambda t: 28.0, 60.0, seed=3)
    result = run(simulate([SMALL_CPU] * 2, load, LatencyTarget(total=2.0)))
    waits = [seconds for at, _, seconds in result.refused if at > 20]
    assert len(waits) > 500
    assert sum(seconds > 0.05 for seconds in waits) <= 0.005 * len(waits)


# As an engine on two cores was measured: it runs 128 at once and is not always as fast.
SHARED_CPU = Speed(0.0022, 0.000065, 0.000005, noise=0.6)
STREAMS: dict[str, Any] = {"prompt": 60.0, "tokens": 64.0, "spread": 0.01, "stream": True}
BOTH = LatencyTarget(first_token=1.0, total=2.0)


def test_below_capacity_an_engine_that_is_slow_for_a_moment_keeps_its_limit() -> None:
    for noise, least in ((0.3, 0.98), (0.6, 0.85)):
        speed = replace(SHARED_CPU, noise=noise)
        result = run(simulate([speed], Load(lambda _: 110.0, 120.0, seed=1, **STREAMS), BOTH, sequences=128))
        assert result.goodput(5) >= least * 110


def test_an_engine_that_runs_fewer_than_the_limit_is_not_flooded_between_two_looks() -> None:
    waiting: list[int] = []

    class Watched(Engine):
        def scrape(self) -> None:
            super().scrape()
            waiting.append(self.waiting)

    load = Load(lambda _: 300.0, 60.0, seed=1, **STREAMS)
    result = run(simulate([SHARED_CPU], load, BOTH, sequences=128, engine=Watched))
    assert result.goodput(5) >= 140
    assert sum(at >= 48 for at in waiting[5:]) <= 1
    waits = [seconds for at, _, seconds in result.refused if at > 5]
    assert sum(seconds > 0.05 for seconds in waits) <= 0.005 * len(waits)
