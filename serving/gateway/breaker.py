"""Keeps requests away from a replica that fails them, and finds out with few when it no longer does."""

FAILURES = 3  # in a row, after which no requests are sent for a while
DOUBTS = 20  # the same, of failures that may be the requests' own fault
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 30.0  # seconds; doubled as long as it goes on failing


class Breaker:
    """Stops requests after several failures in a row, then lets one through at a time until one is answered."""

    def __init__(self) -> None:
        self.until: float | None = None  # loop time at which one may be let through; None: all are
        self.reset()

    def reset(self) -> None:
        """A request has been answered whole."""
        self.failures = self.doubts = self._floor = 0
        self._pause = FIRST_PAUSE
        self.until = None

    def close(self) -> None:
        """An answer has begun: requests may go again. It counts for little until it has ended, too."""
        self.until = None

    def failed(self, now: float, outstanding: int, doubtful: bool = False) -> float | None:
        """Counts a failure; the seconds of pause where it begins one.

        Args:
            doubtful: it may be the request's own fault. Many of these make a pause as well, but never another one.
        """
        if doubtful:
            self.doubts += 1
            if self.doubts < DOUBTS or self.until is not None:
                return None
        else:
            self.failures += 1
            if self.failures < FAILURES or (self.until is not None and now < self.until):
                return None
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE)
        self.until, self._floor = now + pause, outstanding
        return pause

    def lets(self, now: float, outstanding: int) -> bool:
        """Whether a request may go now: none above those that are there already when the pause ends."""
        if self.until is None:
            return True
        if now < self.until:
            return False
        self._floor = min(self._floor, outstanding)
        return outstanding <= self._floor
