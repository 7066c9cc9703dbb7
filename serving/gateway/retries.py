"""How much a gateway may retry: a share of what it is asked, so that retries never multiply an overload."""

import math
import time
from collections.abc import Callable

from serving.gateway.settings import Retries

PERIOD = 10.0  # seconds; for how long a request's deposit counts, and how long the free retries take to come back
FREE = 10  # retries in a period that need no deposits, or a quiet gateway could not retry at all


class RetryBudget:
    """A token bucket: every request deposits ``settings.budget``, every retry takes one.

    Deposits fade over ten seconds: a quiet hour saves nothing up for a storm.

    Args:
        settings: may be replaced at any time.
        share: this worker's share of the free retries.
        clock: seconds, monotonic.
    """

    def __init__(self, settings: Retries, share: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.settings = settings
        self._clock = clock
        self._most_free = max(1.0, FREE * share)
        self._free = self._most_free
        self._deposits = 0.0
        self._at = clock()

    def deposit(self) -> None:
        """A request has come."""
        self._pass_time()
        self._deposits += self.settings.budget

    def allow(self) -> bool:
        """Whether one more retry may be sent; if so, it is taken from the budget."""
        self._pass_time()
        if self._deposits >= 1:
            self._deposits -= 1
        elif self._free >= 1:
            self._free -= 1
        else:
            return False
        return True

    def _pass_time(self) -> None:
        now = self._clock()
        passed, self._at = now - self._at, now
        self._deposits *= math.exp(-passed / PERIOD)
        self._free = min(self._most_free, self._free + passed * self._most_free / PERIOD)
