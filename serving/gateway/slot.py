"""A replica as the scheduler sees it: whether it has room, how much work it has, how fast it is."""

import math
from typing import Generic, Protocol, TypeVar

from serving.gateway.limiter import WAIT, Limiter
from serving.gateway.settings import EngineAt

CACHE_FULL = 0.97  # share of the KV cache from which on an engine preempts rather than runs
ENGINE_WAITING = (2, 32)  # requests that an engine may have waiting itself: two, or a 32nd of its limit
ROOM_GROWTH = 8  # where it was found to run all, it may get an 8th more
_AWAY = ("starting", "down", "refused")


class Target(Protocol):
    """What the scheduler needs to know of a replica; see :class:`serving.gateway.replica.Replica`."""

    outstanding: int

    @property
    def name(self) -> str: ...
    @property
    def settings(self) -> EngineAt: ...
    @property
    def state(self) -> str: ...
    @property
    def available(self) -> bool: ...
    @property
    def retry_after(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def cache_usage(self) -> float: ...
    @property
    def foreign(self) -> int: ...


R = TypeVar("R", bound=Target)


class Slot(Generic[R]):
    """A replica as the scheduler sees it.

    Attributes:
        limiter: says how many requests it may have at once.
        prefill: prompt tokens sent to it that have had no answer yet.
        prefill_budget: the most of them.
        token: work of one of them, in requests.
        weight: relative to the heaviest replica's.
        since_scrape: how many more requests of ours it has than when its engine last told its load.
        room: requests that its engine runs at once, as seen when others waited there; infinite: none did.
        alive_at: the loop's time of its last answer, or since when it is busy.
    """

    __slots__ = (
        "alive_at",
        "away",
        "limiter",
        "prefill",
        "prefill_budget",
        "replica",
        "room",
        "scraped",
        "since_scrape",
        "token",
        "weight",
    )

    def __init__(self, replica: R, limiter: Limiter) -> None:
        self.replica = replica
        self.limiter = limiter
        self.prefill = 0
        self.prefill_budget = 0
        self.token = 0.0
        self.weight = 1.0
        self.away = False
        self.alive_at = 0.0
        # What the engine last told, and how many more requests it has had of us since.
        self.scraped = (0, 0)
        self.since_scrape = 0
        self.room = math.inf

    @property
    def work(self) -> float:
        replica = self.replica
        return (replica.outstanding + replica.foreign + self.prefill * self.token) / self.weight

    def has_room(self, prompt_tokens: int) -> bool:
        replica, limit = self.replica, self.limiter.limit
        if not replica.outstanding:
            return True  # whatever the engine says: without one of ours there, nothing would tell that it is better
        if replica.outstanding >= limit or replica.cache_usage > CACHE_FULL:
            return False
        # What the engine told is up to a second old, in which it could be sent many times what it has room for.
        if replica.running + replica.waiting + self.since_scrape >= self.room + self._may_wait + 1:
            return False
        return not self.prefill or self.prefill + prompt_tokens <= self.prefill_budget

    @property
    def _may_wait(self) -> int:
        return max(ENGINE_WAITING[0], self.limiter.limit // ENGINE_WAITING[1])

    @property
    def excess(self) -> int:
        """Requests that must end before one that ends makes room: the limit has shrunk below what was let in."""
        return max(0, self.replica.outstanding - self.limiter.limit)

    def look(self) -> None:
        """Takes note of what the replica's probes have found."""
        scraped = (self.replica.running, self.replica.waiting)
        if scraped != self.scraped:
            self.scraped, self.since_scrape = scraped, 0
            running, waiting = scraped
            if waiting > self._may_wait:
                self.room = running
            elif not waiting and running >= self.room:
                self.room = running + max(ENGINE_WAITING[0], running // ROOM_GROWTH)
        if self.replica.state in _AWAY:
            self.away = True
        elif self.away:
            self.away = False
            self.limiter.reset()
            self.room = math.inf

    def rate(self, now: float) -> float:
        """Requests per second that it completes when as busy as now; 0: not known."""
        limiter, outstanding = self.limiter, self.replica.outstanding
        service = limiter.total.mean
        if not service:
            if limiter.target.total is None:
                return 0.0
            service = WAIT * limiter.target.total / 2  # at first about as many may wait as run
        # An engine from which nothing has come for long has become slower than its last answers.
        return (outstanding or limiter.limit) / max(service, (now - self.alive_at) / 2 if outstanding else 0.0)
