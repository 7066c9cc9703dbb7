"""What went through in the last minute: sliding windows of one-second buckets."""

WINDOW = 60  # seconds
# A bucket counts until no part of it can be within the last 60 seconds: what came at its very end has left too.
SPAN = WINDOW + 1
DIFFERENCE = 5  # seconds


class Window:
    """Counts by the second. Whoever asks has it :meth:`advance` first.

    As much as fits in it within 61 seconds goes through in any 61, so that never more does in any 60, and at least
    60/61 of the allowed rate is had.

    Attributes:
        total: what counts now.
        newest: the last second in which something went through.
    """

    __slots__ = ("_counts", "_first", "newest", "total")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._first = self.newest = self.total = 0

    def advance(self, second: int) -> None:
        """Lets go of what is too old at ``second``. Where that is before the last one by more than two clocks may
        differ, the clock was set back, and all is moved to where it counts."""
        first = second - WINDOW
        if self._first > first + DIFFERENCE:
            self.shift(first - self._first)
        if self._first < first:
            self._first = first
            counts = self._counts
            for old in [s for s in counts if s < first]:
                self.total -= counts.pop(old)

    def add(self, second: int, count: int) -> int:
        """Adds to a second's bucket, or takes from it what it has; returns by how much it changed.

        Nothing changes where the second is too old.
        """
        if second < self._first:
            return 0
        had = self._counts.get(second, 0)
        count = max(count, -had)
        if count:
            self._counts[second] = had + count
            self.total += count
            self.newest = max(self.newest, second)
        return count

    def wait(self, room: int, now: float) -> float:
        """Seconds from ``now`` until no more than ``room`` counts, if nothing is added; 0 where that is so."""
        excess = self.total - room
        if excess <= 0:
            return 0.0
        for second in sorted(self._counts):
            excess -= self._counts[second]
            if excess <= 0:
                return second + SPAN - now
        return SPAN

    def empty_in(self, now: float) -> float:
        """Seconds from ``now`` until nothing counts."""
        return self.newest + SPAN - now if self.total else 0.0

    def items(self) -> list[tuple[int, int]]:
        """Seconds and their counts."""
        return list(self._counts.items())

    def shift(self, seconds: int) -> None:
        """Moves everything to later seconds, or earlier ones: the clock was set."""
        self._counts = {second + seconds: count for second, count in self._counts.items()}
        self._first += seconds
        self.newest += seconds
