"""What one key has used of late, as far as this worker has let it through; and what follows from it."""

from typing import NamedTuple

from serving.tenants.key import KeyLimits
from serving.tenants.windows import DIFFERENCE, SPAN, Window

FIRST_ANSWER = 256  # tokens that an answer is taken to have before there was one
RECENT = 0.1  # weight of the last request in the means
MEMORY = 86_400  # seconds for which use that the ledger does not show yet is remembered; it may be of no key any more


class Verdict(NamedTuple):
    """What became of a request.

    Attributes:
        second: whose bucket it is in, if it was granted.
        requests, tokens: of the last minute, with the request if it was granted.
        requests_wait, tokens_wait: seconds until there is room for it; 0: there is.
        full: as many requests run as may at once.
        reset: seconds until nothing is left of the last minute.
        requests_limit, tokens_limit: that were applied; 0 where there is none.
    """

    granted: bool
    second: int
    requests: int
    tokens: int
    requests_wait: float
    tokens_wait: float
    full: bool
    reset: float
    requests_limit: int
    tokens_limit: int


class RecentUse:
    """See above. Times are seconds of one clock, see :meth:`serving.tenants.limits.Limits.now`.

    Attributes:
        limits: the key's.
        requests, tokens: that this worker let through in the last minute.
        in_flight: requests that run.
        answer: tokens that an answer of this key is expected to have.
        duration: mean of the last requests, in seconds.
        crowded: half as many requests as may run at once, or more, do so everywhere.
        used: somebody has asked since :meth:`is_idle` was called last.
        untold: what Redis does not have of ``requests`` and ``tokens``: changes, by the second.
    """

    __slots__ = (
        "_answer", "_last", "_ledger", "_reserved", "_seen", "_since", "crowded", "duration", "in_flight", "key",
        "limits", "requests", "tokens", "untold", "used",
    )  # fmt: skip

    def __init__(self, key: str) -> None:
        self.key, self.limits = key, KeyLimits()
        self.requests, self.tokens = Window(), Window()
        self.in_flight = 0
        self.crowded = self.used = False
        self.duration = 1.0
        self.untold: dict[int, list[int]] = {}
        self._answer = float(FIRST_ANSWER)
        self._ledger = self._since = self._reserved = self._last = 0
        self._seen = (0, 0, 0, 0, 0)  # second, and requests and tokens of the last minute: everyone's, this worker's

    @property
    def is_shared(self) -> bool:
        """The key has limits that gateways share; the month's is the ledger's."""
        limits = self.limits
        counted = limits.requests_per_minute is not None or limits.tokens_per_minute is not None
        return counted or limits.concurrency is not None

    @property
    def answer(self) -> int:
        return int(self._answer)

    def decide(self, tokens: int, now: float, parts: int) -> Verdict:
        """Whether this worker may let a request through that holds one of ``parts`` of the limits; if so it counts.

        A part is at least 1, and a request that is larger than the part waits until there is nothing else. What Redis
        has told of the last minute holds still, so that others' requests count until they are too old.
        """
        limits, second = self.limits, int(now)
        self.advance(second)
        seen, all_requests, all_tokens, own_requests, own_tokens = self._seen
        left = seen + SPAN - now  # seconds until what was seen is past
        if not 0 < left <= SPAN + DIFFERENCE:  # it was seen by a clock that has been set
            left = 0.0
        requests_limit = tokens_limit = 0
        requests_wait = tokens_wait = 0.0
        if limits.requests_per_minute is not None:
            requests_limit = max(limits.requests_per_minute // parts, 1)
            requests_wait = self.requests.wait(requests_limit - 1, now)
            most = own_requests + max(limits.requests_per_minute - all_requests, 0) // parts
            if left and self.requests.total + 1 > most:
                requests_wait = max(requests_wait, left)
        if limits.tokens_per_minute is not None:
            tokens_limit = max(limits.tokens_per_minute // parts, 1)
            tokens_wait = self.tokens.wait(max(tokens_limit - tokens, 0), now)
            most = own_tokens + max(limits.tokens_per_minute - all_tokens, 0) // parts
            if left and self.tokens.total and self.tokens.total + tokens > most:
                tokens_wait = max(tokens_wait, left)
        full = limits.concurrency is not None and self.in_flight >= max(limits.concurrency // parts, 1)
        granted = not (requests_wait or tokens_wait or full)
        if granted:
            self.count(second, tokens)
        reset = max(self.requests.empty_in(now), self.tokens.empty_in(now))
        return Verdict(
            granted, second, self.requests.total, self.tokens.total, requests_wait, tokens_wait, full, reset,
            requests_limit, tokens_limit,
        )  # fmt: skip

    def advance(self, second: int) -> None:
        self.requests.advance(second)
        self.tokens.advance(second)

    def count(self, second: int, tokens: int) -> None:
        """A request was let through."""
        self.in_flight += 1
        self._reserved += tokens
        if self.limits.requests_per_minute is not None:
            self.requests.add(second, 1)
        if self.limits.tokens_per_minute is not None:
            self.tokens.add(second, tokens)

    def undo(self, second: int, tokens: int) -> None:
        """It was not sent after all."""
        self.in_flight -= 1
        self._reserved -= tokens
        self._owe(second, self.requests.add(second, -1), self.tokens.add(second, -tokens))

    def settle(self, second: int, reserved: int, tokens: int, now: int) -> None:
        """It has ended. What it did not use is given back, what it used beyond is owed from ``now`` on."""
        self.in_flight -= 1
        self._reserved -= reserved
        self._since += tokens
        if self.limits.tokens_per_minute is not None and tokens != reserved:
            self.tokens.advance(now)
            at = second if tokens < reserved else now
            self._owe(at, 0, self.tokens.add(at, tokens - reserved))

    def learn(self, answer: int | None, seconds: float) -> None:
        """Takes a request into the means: the tokens of its answer, None without one, and how long it took."""
        if answer is not None:
            self._answer += RECENT * (max(answer, 0) - self._answer)
        self.duration += RECENT * (seconds - self.duration)

    def month(self, ledger: int) -> int:
        """Tokens of the month: the ledger's; what has ended here since it last changed, which it cannot have; and what
        those that run may still use."""
        if ledger != self._ledger:
            self._ledger, self._since = ledger, 0
        return ledger + self._since + self._reserved

    def saw(self, second: int, requests: int, tokens: int) -> None:
        """Redis has told how much went through everywhere."""
        self._seen = (second, requests, tokens, self.requests.total, self.tokens.total)

    def _owe(self, second: int, requests: int, tokens: int) -> None:
        if requests or tokens:
            if len(self.untold) > 2 * SPAN:  # Redis is away
                self.untold = {at: owed for at, owed in self.untold.items() if at > second - SPAN}
            owed = self.untold.setdefault(second, [0, 0])
            owed[0] += requests
            owed[1] += tokens

    def let_through(self, second: int, tokens: int) -> None:
        """Redis is to be told of a request that :meth:`decide` has granted."""
        limits = self.limits
        requests = limits.requests_per_minute is not None
        self._owe(second, int(requests), tokens if limits.tokens_per_minute is not None else 0)

    def tell_again(self, untold: dict[int, list[int]]) -> None:
        """Nobody knows whether Redis was told: what was given back is not given back twice."""
        for second, (requests, tokens) in untold.items():
            self._owe(second, max(requests, 0), max(tokens, 0))

    def tell_all(self, second: int) -> None:
        """Redis has nothing any more: all of the last minute is to be told."""
        self.advance(second)
        self.untold = {}
        for at, count in self.requests.items():
            self._owe(at, count, 0)
        for at, count in self.tokens.items():
            self._owe(at, 0, count)

    def shift(self, seconds: int) -> None:
        """The clock was set to a later time by so much."""
        self.requests.shift(seconds)
        self.tokens.shift(seconds)
        self.untold = {second + seconds: owed for second, owed in self.untold.items()}
        self._seen = (self._seen[0] + seconds, *self._seen[1:])

    def is_idle(self, second: int, ledger: int) -> bool:
        """There is nothing to remember, and nobody has asked for some time.

        Args:
            ledger: tokens of the month that it has.
        """
        used, self.used = self.used, False
        if used:
            self._last = second
        self.advance(second)
        self.month(ledger)
        counts = self.requests.total or self.tokens.total or self.in_flight or self.untold
        unbooked = self.limits.tokens_per_month is not None and self._since and second - self._last < MEMORY
        return not (used or counts or unbooked)
