"""Which replica a request goes to, and when: one scheduler for every model.

A request goes to the replica with the least work that has room, at once if there is one. Otherwise it waits in a
bounded queue, unless it can be foreseen that it would wait in vain: then it is refused at once and told when to come
back. Keys have fair shares of the places (:mod:`serving.gateway.fair_queue`); of a key's requests those go first that
must start soonest to be of use.

Work is counted in requests: those at the replica, of this gateway and of others, and the prompt tokens that have had no
answer yet, at the rate at which a full prefill budget is a full replica (``max_prefill_tokens`` over
``max_concurrency`` tokens to a request). It is divided by the replica's weight, the heaviest being 1.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, cast

from prometheus_client import Gauge

from serving.gateway.affinity import Affinity
from serving.gateway.errors import ApiError
from serving.gateway.fair_queue import FairQueue, Flow, Waiting
from serving.gateway.limiter import WAIT, Limiter, Service
from serving.gateway.metrics import Metrics
from serving.gateway.settings import Model
from serving.gateway.slot import R, Slot

AFFINITY_SLACK = 2.0  # requests that a replica may be busier than the least busy, for the sake of its prefix cache,
AFFINITY_SHARE = 0.25  # or this share of its own work, if that is more
# Share of the latency target that a request may be expected to wait, unless it is next or next but one. A longer queue
# gains nothing: the replicas are busy all the same, and of those in it more would be refused late.
LONGEST_QUEUE = 0.15
# Standard deviations by which the predicted wait may be exceeded: who waits should be served. With a latency target
# whoever waits in vain could have had the answer elsewhere; without one, waiting is better than nothing.
DOUBT, DOUBT_WITH_TARGET = 1.2, 2.5
LONGEST_RETRY = 300  # seconds, in Retry-After
TICK = 0.001  # seconds; what uvloop's clock and timers are rounded to
RECHECK = 1.0  # seconds between looks at replicas that are all away while requests wait for one


@dataclass(slots=True)
class Job:
    """A request that wants a replica.

    Attributes:
        arrived: the loop's time.
        deadline: the loop's time at which the answer is worth nothing any more; None: there is none.
        prompt_tokens, max_tokens: of all its prompts and answers.
        prefixes: hashes of growing beginnings of the prompt, shortest first.
        stream: its first byte comes before its last.
        tried: replicas that failed at it; they get it again only if there is no other.
        key: id of who asks; under overload keys get equal parts, or as their shares are.
        share: of the key, relative to other keys.
    """

    arrived: float
    deadline: float | None = None
    prompt_tokens: int = 0
    max_tokens: int = 0
    prefixes: tuple[int, ...] = ()
    stream: bool = False
    tried: set[object] = field(default_factory=set)
    key: str = ""
    share: float = 1.0


class Lease(Generic[R]):
    """A place at a replica, until :meth:`done`."""

    __slots__ = (
        "_beside", "_charge", "_done", "_flow", "_job", "_prefilling", "_scheduler", "_sent", "_slot", "_weight",
        "replica",
    )  # fmt: skip

    def __init__(self, scheduler: "Scheduler[R]", slot: Slot[R], job: Job, now: float) -> None:
        self.replica = slot.replica
        self._weight = 1 + job.prompt_tokens * slot.token
        self._flow: Flow = scheduler.waiting.begin(job.key, job.share, self._weight, scheduler.usual, now)
        self._charge = self._weight * self._flow.usual
        self._scheduler, self._slot, self._job, self._sent = scheduler, slot, job, now
        self._beside = slot.replica.outstanding
        self._prefilling, self._done = True, False

    def first_byte(self) -> None:
        """The prompt is processed. Calls after the first do nothing."""
        if self._prefilling:
            self._prefilling = False
            self._slot.prefill -= self._job.prompt_tokens
            if self._job.stream:
                now = asyncio.get_running_loop().time()
                self._slot.limiter.first_byte(now - self._sent, (self._beside + self.replica.outstanding) / 2)
            if self._scheduler.waiting:
                self._scheduler.dispatch()

    def done(self, ok: bool, completion_tokens: int | None = None) -> None:
        """The replica is done with it, or was left. To be called exactly once.

        Args:
            ok: it was answered whole.
            completion_tokens: of the answer, if known.
        """
        assert not self._done, "a lease ends once"
        self._done = True
        if self._prefilling:
            self._prefilling = False
            self._slot.prefill -= self._job.prompt_tokens
        now = asyncio.get_running_loop().time()
        self._scheduler.waiting.end(self._flow, self._weight, self._charge, self._sent, now)
        self._scheduler.ended(self._slot, self._sent, self._beside, ok, completion_tokens, now)


def _long(completions: int, doubt: float) -> float:
    """How many completions' mean time so many may take: they come at random."""
    return completions + doubt * math.sqrt(completions)


class Scheduler(Generic[R]):
    """Admission to the replicas of one model, and the choice between them.

    :meth:`wake` must be called when a replica's availability or load has changed.

    Args:
        name: the model's, for messages and metrics.
        settings: the model's.
        replicas: its replicas; their ``outstanding`` is kept here.
        share: this worker's share of the limits.
    """

    def __init__(self, name: str, settings: Model, replicas: Sequence[R], metrics: Metrics, share: float = 1.0) -> None:
        self.name, self.metrics, self.share = name, metrics, share
        self.waiting = FairQueue()
        self.usual = 1.0  # seconds that a request has its place for
        self._slots: list[Slot[R]] = []
        self._turn = 0
        self._affinity: Affinity[R] = Affinity()
        self._timer: asyncio.TimerHandle | None = None
        self._queue_length = metrics.queue_length.labels(name)
        self._outstanding: dict[R, Gauge] = {}
        self.update(settings, replicas)

    def update(self, settings: Model, replicas: Sequence[R]) -> None:
        """Takes over changed settings. Waiting and running requests go on, those at removed replicas too."""
        self.settings = settings
        self._max_queue = max(1, round(settings.max_queue * self.share)) if settings.max_queue else 0
        old = {slot.replica: slot for slot in self._slots}
        heaviest = max((replica.settings.weight for replica in replicas), default=1.0)
        self._slots = []
        for replica in replicas:
            weight = replica.settings.weight / heaviest
            ceiling = max(1, round(settings.max_concurrency * weight * self.share))
            slot = old.pop(replica, None)
            if slot is None:
                slot = Slot(replica, Limiter(ceiling, settings.latency_target, self.share))
            else:
                slot.limiter.update(ceiling, settings.latency_target)
            slot.weight = weight
            slot.token = settings.max_concurrency / settings.max_prefill_tokens
            slot.prefill_budget = max(1, round(settings.max_prefill_tokens * self.share))
            self._slots.append(slot)
        for replica in old:
            self.metrics.limit.labels(self.name, replica.name).set(0)
        self._by_replica = {slot.replica: slot for slot in self._slots}
        # Those that were removed finish the requests that they have.
        leaving = {replica: gauge for replica, gauge in self._outstanding.items() if replica.outstanding}
        self._outstanding = leaving | {r: self.metrics.outstanding.labels(self.name, r.name) for r in self._by_replica}
        self._show_limits()
        self._affinity.keep(set(self._by_replica))
        if self.waiting:
            self.wake()

    def _show_limits(self) -> None:
        for slot in self._slots:
            self.metrics.limit.labels(self.name, slot.replica.name).set(slot.limiter.limit)

    def wake(self) -> None:
        """A replica's availability or load may have changed."""
        for slot in self._slots:
            slot.look()
        if self.waiting:
            self._refuse_hopeless()
            self.dispatch()

    async def admit(self, job: Job) -> Lease[R]:
        """A place at a replica; waits for one, if there is hope for it in time. Cancelling it gives up the place.

        Raises:
            ApiError: 503 if no replica is available (those that wait already stay while one is expected back in
                time) or if it waited in vain; 429 if too many wait, or if it would wait in vain.
        """
        # Jobs that wait only because the replica that has room failed at them hold back no other.
        if not self.waiting.fresh:
            slot = self._choose(job)
            if slot is not None:
                return self._grant(slot, job, asyncio.get_running_loop().time())
        return await self._wait(job)

    def _choose(self, job: Job) -> Slot[R] | None:
        """The slot for a job now. None: all are busy, or away."""
        slots = [slot for slot in self._slots if slot.replica.available]
        if job.tried:
            slots = [slot for slot in slots if slot.replica not in job.tried] or slots
        tokens = job.prompt_tokens
        slots = [slot for slot in slots if slot.has_room(tokens)]
        if not slots:
            return None
        if len(slots) == 1:
            return slots[0]
        # Among equals the turn decides.
        turn = self._turn % len(slots)
        self._turn += 1
        works = [slot.work for slot in slots]
        least = min(works)
        if job.prefixes:
            near = self._affinity.find(job.prefixes, lambda replica: self._by_replica[replica] in slots)
            if near is not None:
                slot = self._by_replica[near]
                work = slot.work
                if work - least <= max(AFFINITY_SLACK, AFFINITY_SHARE * work):
                    return slot
        for i in range(turn - len(slots), turn):
            if works[i] == least:
                return slots[i]
        raise AssertionError("one of them has the least work")

    def _grant(self, slot: Slot[R], job: Job, now: float) -> Lease[R]:
        replica = slot.replica
        if not replica.outstanding:
            slot.alive_at = now
        replica.outstanding += 1
        slot.prefill += job.prompt_tokens
        slot.since_scrape += 1
        self._outstanding[replica].set(replica.outstanding)
        if job.prefixes and len(self._slots) > 1:
            self._affinity.remember(job.prefixes, replica)
        return Lease(self, slot, job, now)

    def ended(self, slot: Slot[R], sent: float, beside: int, ok: bool, tokens: int | None, now: float) -> None:
        """A lease has ended that was given at this time, when the replica had so many."""
        replica = slot.replica
        if ok:
            slot.alive_at = now
        at_once = (beside + replica.outstanding) / 2
        changed = slot.limiter.done(now - sent, ok, at_once, tokens, replica.outstanding)
        self.usual = slot.limiter.total.mean or self.usual
        replica.outstanding -= 1
        slot.since_scrape -= 1
        self._outstanding[replica].set(replica.outstanding)
        if replica not in self._by_replica:
            if not replica.outstanding:
                del self._outstanding[replica]
        elif changed:
            self._show_limits()
        if self.waiting:
            self.dispatch()

    async def _wait(self, job: Job) -> Lease[R]:
        loop = asyncio.get_running_loop()
        now = loop.time()
        if not self._any_available():
            raise self._refused(self._unavailable())
        waiting = Waiting(job, self._last_start(job, now), loop.create_future())
        target = self.settings.latency_target
        doubt = DOUBT if target.total is None and target.first_token is None else DOUBT_WITH_TARGET
        if self.waiting.modest(job):
            doubt = 0.0  # there is overload because others want more than their shares
        rate = 0.0 if job.tried else self._rate(now)
        most = rate * (waiting.expires - now) if rate else math.inf  # beyond which it would wait in vain
        ahead = self.waiting.ahead(waiting, self.usual, now, most)
        excess = sum(slot.excess for slot in self._slots)
        wait = _long(ahead + excess + 1, doubt) / rate if rate else 0.0
        soonest = min(target.total or math.inf, (target.first_token or math.inf) if job.stream else math.inf)
        if now + wait >= waiting.expires or (ahead > 1 and wait >= LONGEST_QUEUE * soonest):
            raise self._refused(self._overloaded(now))
        if len(self.waiting) >= self._max_queue:
            last = None if not self._max_queue else self.waiting.last(waiting)
            if last is None:
                raise self._refused(self._overloaded(now))
            self._refuse(last, self._overloaded(now))
        self.waiting.add(waiting, now)
        self.dispatch()
        try:
            return cast(Lease[R], await waiting.future)
        except asyncio.CancelledError:
            if waiting.future.cancelled():
                self._leave(waiting)
            elif waiting.future.exception() is None:
                waiting.future.result().done(ok=False)  # the place came together with the cancellation
            raise

    def _leave(self, waiting: Waiting) -> None:
        if waiting.queued:
            self.waiting.remove(waiting, asyncio.get_running_loop().time())
            self.dispatch()  # it may have held back others

    def _last_start(self, job: Job, now: float) -> float:
        """The moment after which a job had better not start any more."""
        last = now + self.settings.queue_timeout
        target = self.settings.latency_target
        if job.deadline is not None:
            last = min(last, job.deadline - self._expected("total"))
        if job.tried:
            return last  # it was let in; that a replica failed at it is no reason to refuse it now
        if target.total is not None:
            last = min(last, job.arrived + self._spare(target.total, "total"))
        if target.first_token is not None and job.stream:
            last = min(last, job.arrived + self._spare(target.first_token, "first"))
        return last

    def _spare(self, target: float, phase: str) -> float:
        """Seconds that a request may wait, if most are to be in time; always the share that the limiters leave."""
        expected = self._expected(phase)
        return max(target - expected, WAIT * target) if expected else WAIT * target

    def _expected(self, phase: str) -> float:
        """Seconds that most requests take, once sent, to the first byte or in total; 0: not known."""
        services: list[Service] = [getattr(slot.limiter, phase) for slot in self._slots if slot.replica.available]
        times = [service.most for service in services if service.mean]
        return sum(times) / len(times) if times else 0.0

    def _rate(self, now: float) -> float:
        """Requests per second that the model's replicas complete; 0: not known."""
        return sum(slot.rate(now) for slot in self._slots if slot.replica.available)

    def dispatch(self) -> None:
        """Gives waiting jobs the places there are, and refuses those whose time is over."""
        queue = self.waiting
        now = asyncio.get_running_loop().time()
        while (late := queue.expired(now + TICK)) is not None:
            self._refuse(late, self._timed_out(now))
        for waiting in list(queue.again):
            # Where there is no slot, what has room failed at it; it holds back no other.
            if waiting.future.done():  # it was cancelled just now
                queue.remove(waiting, now)
            elif (slot := self._choose(waiting.job)) is not None:
                queue.remove(waiting, now)
                waiting.future.set_result(self._grant(slot, waiting.job, now))
        while (first := queue.next(now)) is not None:
            if first.future.done():
                queue.remove(first, now)
            elif (slot := self._choose(first.job)) is not None:
                queue.take(first, now)
                first.future.set_result(self._grant(slot, first.job, now))
            else:
                break
        self._queue_length.set(len(queue))
        self._arm(now)

    def _arm(self, now: float) -> None:
        """One timer, for the job that expires first."""
        at = self.waiting.expires()
        if self.waiting and not self._any_available():
            at = min(at, now + RECHECK)
        if self._timer is not None:
            if now < self._timer.when() <= at < math.inf:
                return  # early is good enough: it then arms itself anew
            self._timer.cancel()
            self._timer = None
        if self.waiting:
            self._timer = asyncio.get_running_loop().call_at(at, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.dispatch()

    def _refuse_hopeless(self) -> None:
        """When all replicas are away, only those stay that can wait for the first to come back."""
        if self._any_available():
            return
        back = asyncio.get_running_loop().time() + self._away_for() if self._slots else math.inf
        for waiting in [waiting for waiting in self.waiting if waiting.expires < back]:
            self._refuse(waiting, self._unavailable())

    def _away_for(self) -> int:
        states = [slot.replica for slot in self._slots if slot.replica.state != "refused"]
        return min((replica.retry_after for replica in states or [slot.replica for slot in self._slots]), default=30)

    def _unavailable(self) -> ApiError:
        if self._slots and all(slot.replica.state == "refused" for slot in self._slots):
            message = f"the model {self.name!r} does not compute what it should and is not served"
            return ApiError(503, message, "model_refused", None, self._away_for())
        message = f"no engine of the model {self.name!r} is available at the moment"
        return ApiError(503, message, "engine_unavailable", None, self._away_for())

    def _overloaded(self, now: float) -> ApiError:
        message = f"the model {self.name!r} has more requests than it can answer in time"
        return ApiError(429, message, "overloaded", None, self._retry_after(now))

    def _timed_out(self, now: float) -> ApiError:
        if not self._any_available():
            return self._unavailable()
        message = f"no engine of the model {self.name!r} had room for the request in time"
        return ApiError(503, message, "queue_timeout", None, self._retry_after(now))

    def _retry_after(self, now: float) -> int:
        """Seconds until those that wait now have been served."""
        rate = self._rate(now)
        seconds = (len(self.waiting) + 1) / rate if rate else self.settings.queue_timeout
        return min(LONGEST_RETRY, max(1, math.ceil(seconds)))

    def _any_available(self) -> bool:
        return any(slot.replica.available for slot in self._slots)

    def _refuse(self, waiting: Waiting, error: ApiError) -> None:
        self.waiting.remove(waiting, asyncio.get_running_loop().time())
        if not waiting.future.done():
            waiting.future.set_exception(self._refused(error))

    def _refused(self, error: ApiError) -> ApiError:
        self.metrics.rejections.labels(error.code).inc()
        return error
