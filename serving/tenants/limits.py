"""What keys may use: requests and tokens in a minute, requests at once, tokens in a month.

Where several gateways share their counters, Redis decides (:mod:`serving.tenants.shared_limits`). Where there is no
Redis, or it is away, each worker holds a key to its part of the limits by what it has itself let through.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from serving.gateway.errors import ApiError
from serving.gateway.metrics import Metrics
from serving.gateway.settings import Settings
from serving.tenants.key import Key, KeyLimits
from serving.tenants.recent_use import RecentUse, Verdict

if TYPE_CHECKING:
    from serving.tenants.shared_limits import SharedLimits

TIDY = 30.0  # seconds between looks for keys that are not used any more
LONGEST_QUOTA_RETRY = 3600  # seconds; a budget can be raised before the month ends
LONGEST_RETRY = 300  # seconds
_SHOULD_NOT_RETRY = ((b"x-should-retry", b"false"),)
_NOTHING: tuple[tuple[bytes, bytes], ...] = ()


class Grant:
    """Leave for one request.

    Attributes:
        headers: ``x-ratelimit-*``, for its answer.
    """

    __slots__ = ("_began", "_limits", "_prompt", "_reserved", "_second", "_usage", "headers")

    def __init__(
        self, limits: "Limits", usage: RecentUse, second: int, reserved: int, prompt: int, began: float,
        headers: tuple[tuple[bytes, bytes], ...],
    ) -> None:  # fmt: skip
        self._limits, self._usage, self._second, self._reserved = limits, usage, second, reserved
        self._prompt, self._began, self.headers = prompt, began, headers

    def done(self, tokens: int) -> None:
        """The request has ended and has used so many, of its prompt and its answer. To be called exactly once."""
        limits, usage = self._limits, self._usage
        now = limits.now()
        usage.settle(self._second, self._reserved, tokens, int(now))
        usage.learn(tokens - self._prompt if tokens else None, now - self._began)
        if limits.shared is not None:
            limits.shared.settled(usage)


class Limits:
    """See above.

    Args:
        workers: of this gateway; without Redis each has its part of the limits.
        spent: tokens that a key has used this month, by the ledger.

    Raises:
        ValueError: the URL of Redis is not valid, or its variable is not set.
    """

    def __init__(
        self, settings: Settings, metrics: Metrics, workers: int = 1, spent: Callable[[str], int] = lambda key: 0
    ) -> None:
        self._spent, self._metrics = spent, metrics
        self._limited = {
            name: metrics.limited.labels(name) for name in ("requests", "tokens", "concurrency", "budget", "too_large")
        }
        self._uses: dict[str, RecentUse] = {}
        self._offset = time.time() - time.monotonic()
        self._tidying: asyncio.Task[None] | None = None
        self.workers = workers
        self.shared: SharedLimits | None = None
        if url := settings.redis.resolve():
            from serving.tenants import shared_limits  # imports Redis' client

            self.shared = shared_limits.SharedLimits(url, settings.redis, metrics, workers, self._uses, self.set_clock)

    def now(self) -> float:
        """Seconds by the clock that the counters go by: Redis', if there is one. Never goes back by itself."""
        return time.monotonic() + self._offset

    def set_clock(self, now: float) -> None:
        """Takes another's clock. What has been counted keeps its age."""
        change = now - self.now()
        if abs(change) > 0.5:
            for usage in self._uses.values():
                usage.shift(math.ceil(change))
        self._offset += change

    async def start(self) -> None:
        """Looks for Redis, if there is one, for at most ``redis.timeout``, and goes on looking."""
        self._tidying = asyncio.create_task(self._tidy())
        if self.shared is not None:
            await self.shared.start()

    async def stop(self) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._tidying
        if self.shared is not None:
            await self.shared.stop()

    async def apply(self, settings: Settings) -> None:
        """Nothing: where Redis is changes by a restart only, and keys bring their limits with them."""

    async def admit(self, key: Key, prompt_tokens: int, max_tokens: int | None) -> Grant | None:
        """Leave for a request; None: the key has no limits.

        Args:
            prompt_tokens: an estimate.
            max_tokens: of the answer; None: the request does not say, and counts as this key's answers of late until
                it is done.

        Raises:
            ApiError: 429.
        """
        limits = key.limits
        minute = limits.requests_per_minute is not None or limits.tokens_per_minute is not None
        if not minute and limits.concurrency is None and limits.tokens_per_month is None:
            return None
        usage = self._uses.get(key.id)
        if usage is None:
            usage = self._uses[key.id] = RecentUse(key.id)
        usage.limits, usage.used = limits, True
        tokens = prompt_tokens + (usage.answer if max_tokens is None else max_tokens)
        most = limits.tokens_per_minute
        if most is not None and tokens > most:
            if max_tokens is not None or prompt_tokens > most:
                raise self._too_large(limits, tokens)
            tokens = most
        if limits.tokens_per_month is not None and usage.month(self._spent(key.id)) >= limits.tokens_per_month:
            raise self._no_quota(limits.tokens_per_month)

        verdict = None
        if self.shared is not None and usage.is_shared:
            verdict = await self.shared.ask(usage, tokens)
        if verdict is None:
            verdict = self._decide(usage, tokens)
        if not verdict.granted:
            raise self._refusal(usage, verdict, tokens)
        now = self.now()
        return Grant(
            self, usage, verdict.second, tokens, prompt_tokens, now, _headers(limits, verdict) if minute else ()
        )

    def _decide(self, usage: RecentUse, tokens: int) -> Verdict:
        """By what this worker knows itself, and its part of the limits."""
        parts = self.shared.members if self.shared is not None else self.workers
        verdict = usage.decide(tokens, self.now(), parts)
        if verdict.granted and self.shared is not None and usage.is_shared:
            self.shared.let_through(usage, verdict.second, tokens)
        return verdict

    def _refusal(self, usage: RecentUse, verdict: Verdict, tokens: int) -> ApiError:
        limits = usage.limits
        wait, name = max((verdict.requests_wait, "requests"), (verdict.tokens_wait, "tokens"))
        if verdict.full:
            # Nobody knows when one of those that run will end: after as long as they take, divided by their number.
            at_once = usage.duration / max(limits.concurrency or 1, 1)
            if at_once >= wait:
                wait, name = max(0.001, at_once), "concurrency"
        self._limited[name].inc()
        if name == "concurrency":
            what = f"this key may have {limits.concurrency} requests at once"
        elif name == "requests":
            what = f"this key may send {limits.requests_per_minute} requests in a minute"
        else:
            what = f"this key may use {limits.tokens_per_minute} tokens in a minute, and the request needs {tokens}"
        headers = (*_headers(limits, verdict), (b"retry-after-ms", b"%d" % math.ceil(wait * 1000)))
        seconds = min(math.ceil(wait), LONGEST_RETRY)
        return ApiError(429, f"{what}: try again in {_duration(wait)}", "rate_limit_exceeded", None, seconds, headers)

    def _too_large(self, limits: KeyLimits, tokens: int) -> ApiError:
        self._limited["too_large"].inc()
        what = f"the request needs {tokens} tokens, prompt and max_tokens together, and this key may use"
        message = f"{what} {limits.tokens_per_minute} in a minute: shorten the prompt, or ask for fewer"
        return ApiError(429, message, "request_too_large", None, None, _SHOULD_NOT_RETRY)

    def _no_quota(self, budget: int) -> ApiError:
        self._limited["budget"].inc()
        today = datetime.now(UTC)
        month = datetime(today.year + today.month // 12, today.month % 12 + 1, 1, tzinfo=UTC)
        seconds = min(math.ceil((month - today).total_seconds()), LONGEST_QUOTA_RETRY)
        message = f"this key has used its {budget} tokens of the month, which ends at {month:%Y-%m-%d} 00:00 UTC"
        return ApiError(429, message, "insufficient_quota", None, seconds, _SHOULD_NOT_RETRY)

    async def _tidy(self) -> None:
        while True:
            await asyncio.sleep(TIDY)
            now = int(self.now())
            for key, usage in list(self._uses.items()):
                if usage.is_idle(now, self._spent(key)):
                    del self._uses[key]


def _headers(limits: KeyLimits, verdict: Verdict) -> tuple[tuple[bytes, bytes], ...]:
    headers = _NOTHING
    if limits.requests_per_minute is not None:
        headers = (
            (b"x-ratelimit-limit-requests", b"%d" % verdict.requests_limit),
            (b"x-ratelimit-remaining-requests", b"%d" % max(0, verdict.requests_limit - verdict.requests)),
            (b"x-ratelimit-reset-requests", _reset(verdict.reset)),
        )
    if limits.tokens_per_minute is not None:
        headers += (
            (b"x-ratelimit-limit-tokens", b"%d" % verdict.tokens_limit),
            (b"x-ratelimit-remaining-tokens", b"%d" % max(0, verdict.tokens_limit - verdict.tokens)),
            (b"x-ratelimit-reset-tokens", _reset(verdict.reset)),
        )
    return headers


def _reset(seconds: float) -> bytes:
    return _in_tenths(math.ceil(seconds * 10))


@lru_cache(1024)
def _in_tenths(tenths: int) -> bytes:
    return _duration(tenths / 10).encode()


def _duration(seconds: float) -> str:
    """As OpenAI writes it, rounded up to milliseconds: ``12ms``, ``1s``, ``1m0.5s``."""
    milliseconds = math.ceil(round(seconds * 1000, 3))
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds > 0 else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    return (f"{minutes}m" if minutes else "") + f"{rest / 1000:g}s"
