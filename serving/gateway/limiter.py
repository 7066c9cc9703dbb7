"""How many requests a replica may have at once: a fixed number, or what its latency target leaves room for.

With a target the number is found by measuring. An engine that batches takes longer for each request the more it has at
once, about ``a + b * n`` seconds a token. That line is fitted to the service times seen at different numbers of
requests; with it the recent times tell how many answers per second would be in time at another number. The limit moves,
by steps, to where that is most. Too few requests at once waste the engine, too many are all late; a few late ones among
many in time are no reason to go lower. Below capacity the line misleads: there an engine that is slow for a moment has
more requests at once for that reason, not the other way round. So the limit stays as long as nearly all are in time.
"""

from bisect import bisect_right
from collections import deque

from serving.gateway.settings import LatencyTarget

FIRST_LIMIT = 16  # until something was measured
WAIT = 0.15  # share of the target that is kept for waiting in the gateway
STEPS = tuple(2.0 ** (i / 4) for i in range(-4, 5))  # of the limit, from one look to the next
_STAY = STEPS.index(1.0)
LOOK = (4, 32)  # answers between two looks, at least and at most; half the limit in between
BINDING = 0.9  # of the limit in use, on average since the last look: then the limit is what holds back
GAIN = 0.1  # a doubled limit must bring so much more to be worth it: it costs latency
KEPT = 0.97  # share of the requests that are in time, from which on fewer at once would gain nothing
MEMORY = 64  # service times that are kept
FORGET = 1 / 200  # of the line, at each answer
MOST = 0.9  # share of the requests whose service time is what one must expect
# Until requests at different numbers were seen, twice as many are taken to be 1.6 times as slow. That counts as much
# as a spread of this share of the number; of a larger one where lengths are not known, for they blur the line.
PRIOR_SLOPE, PRIOR_SPREAD, PRIOR_SPREAD_BLURRED = 0.6, 0.15, 0.3


class Service:
    """Recent times of one phase of a replica's service, in seconds, and how they depend on its requests at once."""

    def __init__(self) -> None:
        self.mean = 0.0  # 0: nothing was measured yet
        self.most = 0.0  # what nine of ten requests keep within
        self._recent: deque[tuple[float, float]] = deque(maxlen=MEMORY)  # seconds, requests at once
        # Weighted sums of the fit: weight, n, n * n, t, n * t.
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)
        self._blurred = True
        self._count = 0

    def add(self, seconds: float, at_once: float, tokens: int | None = None) -> None:
        """One more: of so many tokens (None or 0: not known), when there were so many requests at once."""
        recent = self._recent
        recent.append((seconds, at_once))
        self.mean += (seconds - self.mean) / min(len(recent), MEMORY // 2)
        self._count += 1
        if self._count < 8 or not self._count % 8:  # sorting at each is a waste
            ordered = sorted(seconds for seconds, _ in recent)
            self.most = ordered[min(len(ordered) - 1, int(MOST * len(ordered)))]
        if tokens:
            self._blurred = False
        else:
            tokens = 1
        keep = 1 - FORGET
        w, n, nn, t, nt = self._sums
        self._sums = (
            w * keep + tokens,
            n * keep + tokens * at_once,
            nn * keep + tokens * at_once * at_once,
            t * keep + seconds,
            nt * keep + seconds * at_once,
        )

    def line(self) -> tuple[float, float]:
        """``a`` and ``b``: a token takes about ``a + b * n`` seconds when there are ``n`` requests at once."""
        w, n, nn, t, nt = self._sums
        if not t:
            return 1.0, 0.0
        n, nn, t, nt = n / w, nn / w, t / w, nt / w
        prior = ((PRIOR_SPREAD_BLURRED if self._blurred else PRIOR_SPREAD) * n) ** 2
        b = (nt - n * t + prior * PRIOR_SLOPE * t / n) / (nn - n * n + prior)
        b = min(max(b, 0.0), t / n)
        return t - b * n, b

    def within(self, seconds: float, numbers: list[float]) -> list[float]:
        """The share of requests that would take at most this long, if there were so many at once, for each number."""
        if not self._recent:
            return [1.0] * len(numbers)
        a, b = self.line()
        work = sorted(taken / (a + b * at_once) for taken, at_once in self._recent)
        return [bisect_right(work, seconds / (a + b * n)) / len(work) for n in numbers]


class Limiter:
    """The limit of one replica, and what is known of its service times.

    Args:
        ceiling: the limit is never above it, and is it when there is no target.
        target: seconds from a request's arrival.
        share: this worker's share of the first limit.

    Attributes:
        limit: requests at once, at least 1.
        first, total: from sending to the first byte of a stream, and to the end of an answer.
    """

    def __init__(self, ceiling: int, target: LatencyTarget, share: float = 1.0) -> None:
        self._start = max(1.0, FIRST_LIMIT * share)
        self._exact = self._start
        self.ceiling, self.target = ceiling, target
        self.limit = 1
        self.reset()

    @property
    def adaptive(self) -> bool:
        return self.target.first_token is not None or self.target.total is not None

    def update(self, ceiling: int, target: LatencyTarget) -> None:
        """Takes over changed settings. What was measured is kept."""
        self.ceiling, self.target = ceiling, target
        self._set(self._exact)

    def reset(self) -> None:
        """The replica was away: what comes back may be another engine, and is cold."""
        self.first, self.total = Service(), Service()
        self._ended = self._in_use = self._room = 0
        self.limit = self.ceiling
        self._set(min(self._exact, self._start))

    def _set(self, exact: float) -> None:
        self._exact = min(max(exact, 1.0), float(self.ceiling))
        if not self.adaptive:
            self.limit = self.ceiling
        else:
            self.limit = min(self.limit, round(self._exact))

    def first_byte(self, seconds: float, at_once: float) -> None:
        """A stream has begun; see :meth:`done` for the arguments."""
        self.first.add(seconds, at_once)

    def done(self, seconds: float, ok: bool, at_once: float, tokens: int | None, outstanding: int) -> bool:
        """A request has ended. Returns whether the limit has changed.

        Args:
            seconds: since it was sent.
            ok: it was answered whole; a broken one says something only if it was late already.
            at_once: requests that the replica had meanwhile, on average.
            tokens: of the answer, if known.
            outstanding: requests that the replica has, this one included.
        """
        if ok or (self.target.total is not None and seconds > self.target.total):
            self.total.add(seconds, at_once, tokens)
        if not self.adaptive:
            return False
        before = self.limit
        if self.limit < round(self._exact):
            # Not at once: of a crowd of prompts at the same moment all first tokens would be late.
            pace = 1 if self.target.first_token is not None else 2
            self.limit = min(self.limit + pace, round(self._exact))
        self._ended += 1
        self._in_use += outstanding
        self._room += before
        if self._ended < min(max(self.limit // 2, LOOK[0]), LOOK[1]):
            return self.limit != before
        binding = self._in_use >= BINDING * self._room
        self._ended = self._in_use = self._room = 0
        if binding:  # else what is seen says little about the limit
            self._set(self._best())
        return self.limit != before

    def _best(self) -> float:
        """The number of requests at once, near the limit, at which most answers per second are in time."""
        numbers = [min(max(self._exact * step, 1.0), float(self.ceiling)) for step in STEPS]
        in_time = [1.0] * len(numbers)
        for service, target in ((self.first, self.target.first_token), (self.total, self.target.total)):
            if target is not None:
                shares = service.within((1 - WAIT) * target, numbers)
                in_time = [min(pair) for pair in zip(in_time, shares, strict=True)]
        if in_time[_STAY] >= KEPT:
            numbers, in_time = numbers[_STAY:], in_time[_STAY:]
        a, b = self.total.line()
        worth = [share * n ** (1 - GAIN) / (a + b * n) for n, share in zip(numbers, in_time, strict=True)]
        best = max(worth)
        if not best:
            return numbers[0]
        return numbers[worth.index(best)]
