"""Limits of one worker, by a clock of the tests' own."""

import asyncio
import math
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from serving.gateway.errors import ApiError
from serving.gateway.metrics import Metrics
from serving.gateway.settings import Settings
from serving.tenants.key import NOBODY, Key, KeyLimits
from serving.tenants.limits import Grant, Limits, _duration
from serving.tenants.recent_use import FIRST_ANSWER, RecentUse
from serving.tenants.windows import SPAN, Window

SETTINGS = Settings.from_engines(["demo=http://127.0.0.1:1"])


class Clock:
    """A Limits whose time stands still, unless it is moved."""

    def __init__(self, workers: int = 1, spent: int = 0) -> None:
        self.time, self.ledger = 1_700_000_000.25, spent
        self.metrics = Metrics()
        self.limits = Limits(SETTINGS, self.metrics, workers, lambda key: self.ledger)
        self.limits.now = lambda: self.time  # type: ignore[method-assign]

    def admit(self, key: Key, prompt: int = 1, answer: int | None = 1) -> Grant:
        grant = asyncio.run(self.limits.admit(key, prompt, answer))
        assert grant is not None
        return grant

    def refusal(self, key: Key, prompt: int = 1, answer: int | None = 1) -> ApiError:
        with pytest.raises(ApiError) as caught:
            self.admit(key, prompt, answer)
        return caught.value

    def count(self, key: Key, most: int = 10_000) -> int:
        """How many requests are let through at once."""
        for number in range(most):
            try:
                self.admit(key)
            except ApiError:
                return number
        return most


def key(**limits: int) -> Key:
    return Key("key_a", "clinic", limits=KeyLimits(**limits))


arrivals = st.lists(st.tuples(st.floats(0, 20), st.integers(1, 40)), max_size=120)


@hypothesis_settings(deadline=None, max_examples=150)
@given(arrivals, st.integers(1, 100))
def test_a_window_is_as_a_log_of_all_that_came(arrivals: list[tuple[float, int]], limit: int) -> None:
    window, now = Window(), 1000.0
    log: list[tuple[float, int]] = []
    for pause, count in arrivals:
        now += pause
        second = int(now)
        window.advance(second)
        counts = sum(c for t, c in log if math.floor(t) > second - SPAN)
        assert window.total == counts
        wait = window.wait(limit - count, now)
        assert (wait == 0) == (counts + count <= limit)
        if wait == 0:
            window.add(second, count)
            log.append((now, count))
        elif count <= limit:
            # It is the first moment at which it fits, if nothing else comes.
            then = now + wait
            assert sum(c for t, c in log if math.floor(t) > math.floor(then + 1e-6) - SPAN) + count <= limit
            assert sum(c for t, c in log if math.floor(t) > math.floor(then - 0.01) - SPAN) + count > limit
        # What was promised: no 60 seconds have more.
        assert sum(c for t, c in log if t >= now - 60) <= limit


@pytest.mark.parametrize(("limit", "rate"), [(60, 3), (600, 30), (7, 1), (1000, 200)])
def test_the_allowed_rate_is_had(limit: int, rate: int) -> None:
    """Whoever always asks gets at least 98 % of the limit, and never more."""
    use = RecentUse("key_a")
    use.limits = KeyLimits(requests_per_minute=limit)
    start, minutes = 1000.0, 61
    granted = [t for i in range(minutes * 60 * rate) if use.decide(1, t := start + i / rate, 1).granted]
    assert len(granted) >= 0.98 * limit * minutes
    for first, later in zip(granted, granted[limit:], strict=False):
        assert later - first > 60


def test_a_request_needs_room_for_its_prompt_and_its_answer() -> None:
    clock, limited = Clock(), key(tokens_per_minute=100)
    grant = clock.admit(limited, 30, 40)
    assert dict(grant.headers) == {
        b"x-ratelimit-limit-tokens": b"100",
        b"x-ratelimit-remaining-tokens": b"30",
        b"x-ratelimit-reset-tokens": b"1m0.8s",
    }
    assert clock.refusal(limited, 30, 40).code == "rate_limit_exceeded"
    grant.done(35)  # the other half is free again
    assert clock.admit(limited, 60, 5).headers[1][1] == b"0"


def test_what_was_used_beyond_is_owed_from_when_it_was_used() -> None:
    clock, limited = Clock(), key(tokens_per_minute=100)
    grant = clock.admit(limited, 10, 10)
    clock.time += 50
    grant.done(150)
    assert int(clock.refusal(limited, 1, 1).retry_after or 0) == 61
    clock.time += 15  # what was reserved has left, what was owed has not
    assert clock.refusal(limited, 1, 1).status == 429
    clock.time += 46
    clock.admit(limited, 50, 50)


def test_a_long_request_gives_nothing_back_that_has_left_already() -> None:
    clock, limited = Clock(), key(tokens_per_minute=100)
    grant = clock.admit(limited, 50, 50)
    clock.time += 100
    clock.admit(limited, 50, 10)
    grant.done(0)
    assert clock.admit(limited, 20, 20).headers[1][1] == b"0"


def test_retry_after_is_the_moment_when_there_is_room() -> None:
    clock, limited = Clock(), key(requests_per_minute=10, tokens_per_minute=1000)
    for prompt in (100, 200, 300, 300):
        clock.admit(limited, prompt, 0)
        clock.time += 3.3
    error = clock.refusal(limited, 250, 0)  # both of the first must leave
    headers = dict(error.headers)
    wait = int(headers[b"retry-after-ms"]) / 1000
    assert error.retry_after == math.ceil(wait)
    assert headers[b"x-ratelimit-remaining-tokens"] == b"100"
    assert headers[b"x-ratelimit-remaining-requests"] == b"6"
    clock.time += wait - 0.01
    clock.refusal(limited, 250, 0)
    clock.time += 0.011
    clock.admit(limited, 250, 0)


def test_a_request_larger_than_the_limit_is_not_to_come_again() -> None:
    clock, limited = Clock(), key(tokens_per_minute=1000)
    for prompt, answer in ((1001, None), (500, 501)):
        error = clock.refusal(limited, prompt, answer)
        assert (error.status, error.code, error.retry_after) == (429, "request_too_large", None)
        assert (b"x-should-retry", b"false") in error.headers
    clock.admit(limited, 900, None)  # 256 are expected, and not asked for
    assert b'medassist_limited_total{limit="too_large"} 2.0' in clock.metrics.render()[0]


def test_an_answer_of_unknown_length_is_taken_as_those_of_late() -> None:
    clock, limited = Clock(), key(tokens_per_minute=100_000)
    assert clock.admit(limited, 0, None).headers[1][1] == b"%d" % (100_000 - FIRST_ANSWER)
    for _ in range(60):
        clock.admit(limited, 20, None).done(20 + 1000)
    clock.time += 200
    remaining = int(clock.admit(limited, 0, None).headers[1][1])
    assert 98_900 <= remaining <= 99_100
    clock.admit(limited, 20, None).done(0)  # a failure says nothing of answers
    clock.time += 200
    assert int(clock.admit(limited, 0, None).headers[1][1]) == remaining


def test_requests_at_once() -> None:
    clock, limited = Clock(), key(concurrency=2)
    first, second = clock.admit(limited), clock.admit(limited)
    assert first.headers == ()
    error = clock.refusal(limited)
    assert error.code == "rate_limit_exceeded"
    assert error.retry_after == 1
    first.done(1)
    third = clock.admit(limited)
    clock.refusal(limited)
    second.done(0)
    third.done(0)
    assert clock.count(limited) == 2


def test_workers_have_their_part_of_each_limit() -> None:
    clock = Clock(workers=4)
    assert clock.count(key(requests_per_minute=10)) == 2
    assert clock.count(Key("key_b", "clinic", limits=KeyLimits(concurrency=2))) == 1
    tokens = Key("key_c", "clinic", limits=KeyLimits(tokens_per_minute=100))
    clock.admit(tokens, 50, 50)  # larger than a part, and there is nothing else
    clock.refusal(tokens, 1, 1)
    clock.time += SPAN
    clock.admit(tokens, 5, 5)
    assert clock.refusal(tokens, 50, 50).status == 429


def test_new_limits_hold_at_once() -> None:
    clock = Clock()
    assert clock.count(key(requests_per_minute=5)) == 5
    assert clock.count(key(requests_per_minute=8)) == 3
    clock.refusal(key(requests_per_minute=4))


def test_the_months_budget() -> None:
    clock, limited = Clock(spent=900), key(tokens_per_month=1000)
    grant = clock.admit(limited, 20, 30)
    clock.admit(limited, 20, 20).done(20)
    clock.admit(limited, 20, 20)
    error = clock.refusal(limited, 1, 0)  # 20 that the ledger does not have yet, and 90 that those may use which run
    assert error.code == "insufficient_quota"
    assert b'"type":"insufficient_quota"' in error.body
    assert (b"x-should-retry", b"false") in error.headers
    assert 0 < (error.retry_after or 0) <= 3600
    grant.done(10)
    clock.ledger = 930  # it has all of it now
    clock.admit(limited, 1, 1)


def test_what_the_ledger_has_is_not_counted_twice() -> None:
    clock, limited = Clock(), key(tokens_per_month=100)
    for used in range(0, 100, 10):
        clock.ledger = used
        clock.admit(limited, 5, 5).done(10)
    clock.refusal(limited)
    clock.ledger = 0  # another month
    clock.admit(limited)


def test_the_month_ends_when_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class December(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime(2026, 12, 31, 23, 59, 30, tzinfo=UTC)

    clock, limited = Clock(spent=100), key(tokens_per_month=100)
    monkeypatch.setattr("serving.tenants.limits.datetime", December)
    error = clock.refusal(limited)
    assert error.retry_after == 30
    assert "2027-01-01" in error.message


def test_a_key_without_limits_leaves_nothing() -> None:
    limits = Limits(SETTINGS, Metrics(), 1)
    assert asyncio.run(limits.admit(NOBODY, 1, 1)) is None
    assert asyncio.run(limits.admit(key(max_tokens=100), 1, 1)) is None
    assert not limits._uses


def test_keys_that_are_not_used_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.tenants.limits.TIDY", 0.001)

    async def run() -> None:
        clock = Clock()
        await clock.limits.start()
        grant = await clock.limits.admit(key(requests_per_minute=1), 1, 1)
        assert grant
        clock.time += 100
        await asyncio.sleep(0.05)
        assert clock.limits._uses  # it runs still
        grant.done(1)
        async with asyncio.timeout(5):
            while clock.limits._uses:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        await clock.limits.stop()

    asyncio.run(run())


def test_keys_with_a_budget_are_forgotten_when_the_ledger_has_their_use(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    limited = key(tokens_per_month=100)

    async def tidied() -> bool:
        monkeypatch.setattr("serving.tenants.limits.TIDY", 0.001)
        await clock.limits.start()
        await asyncio.sleep(0.05)
        await clock.limits.stop()
        return not clock.limits._uses

    clock.admit(limited, 10, 10).done(20)
    assert not asyncio.run(tidied())
    clock.ledger = 20
    assert asyncio.run(tidied())
    clock.admit(limited, 10, 10).done(20)  # and then the key is revoked: nobody tells of it any more
    assert not asyncio.run(tidied())
    clock.time += 100_000
    assert asyncio.run(tidied())


def test_a_window_survives_a_clock_that_goes_forward_and_back() -> None:
    window = Window()
    for second in (1000, 5000, 1010):
        window.advance(second)
        window.add(second, 2)
    assert window.total == 2 + 2  # of 5000, which counts as of late, and of 1010
    assert 0 < window.wait(0, 1010.0) <= SPAN
    window.advance(1010 + SPAN)
    assert window.total == 0


def test_what_was_seen_by_a_clock_that_was_ahead_holds_nobody_up() -> None:
    use = RecentUse("key_a")
    use.limits = KeyLimits(requests_per_minute=2)
    use.saw(5000, 2, 0)
    assert use.decide(1, 1000.0, 1).granted


def test_a_clock_that_is_set_keeps_ages() -> None:
    limits = Limits(SETTINGS, Metrics(), 1)
    limited = key(requests_per_minute=1)
    assert asyncio.run(limits.admit(limited, 1, 1))
    for change in (3600, -7200):
        limits.set_clock(limits.now() + change)
        with pytest.raises(ApiError) as caught:
            asyncio.run(limits.admit(limited, 1, 1))
        assert 55 <= int(dict(caught.value.headers)[b"retry-after-ms"]) / 1000 <= 65


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0121, "13ms"), (0.012, "12ms"), (1, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s"),
     (60.412, "1m0.412s")],
)  # fmt: skip
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert _duration(seconds) == text


@pytest.fixture(autouse=True)
def no_loop_left() -> Iterator[None]:
    yield
    asyncio.set_event_loop(None)
