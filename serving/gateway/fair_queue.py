"""Who waits for a place at a replica, and who is next: fair queueing over keys.

Work is measured in place-seconds: for how long a request has a place, times its weight. Every key (a *flow*) has a
virtual time, its work so far divided by its share, and the next place goes to the waiting flow whose virtual time is
least; among equals to the one that has fewer places. So under overload flows get work in proportion to their shares,
whatever they ask for, and one that asks for less than its share finds itself next.

How long a request will take is not known when it gets its place: it is charged what is usual for its flow, and what it
really took when it ends, or from when its flow's requests have taken longer than usual (start-time fair queueing, Goyal
et al. 1996, with counters put right afterwards as in Sheng et al. 2024). *Level* is the work that the flow had really
had which was last given a place. A flow that comes back is no further behind it than a few requests, one that was idle
not at all: having asked for little earns no credit. It has the lead only of what still runs of the others'.

Within a flow those whose time is over first go first. Requests that have been sent to a replica before, which failed,
go before all others: they have been given a place once.
"""

import asyncio
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from heapq import heapify, heappop, heappush, heapreplace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from serving.gateway.scheduler import Job

SPARE = 64  # outdated entries that a heap may have beyond as many as valid ones
LEARN = 1 / 16  # of what is usual for a flow, at each request
CREDIT = 2.0  # usual requests' work that a flow may be behind the level while it has a place
FORGIVEN = 2.0  # usual requests' work that a flow may be ahead of the level and yet be forgotten when it goes idle


class Waiting:
    """A job in the queue.

    Attributes:
        order: it goes before those of its flow whose order is larger; the moment it expires, or its arrival if it was
            sent to a replica before.
        expires: the loop's time, the last moment at which starting it is of use.
        future: of its place.
        queued: it is in the queue; kept by the queue.
    """

    __slots__ = ("expires", "future", "job", "order", "queued")

    def __init__(self, job: "Job", expires: float, future: "asyncio.Future[Any]") -> None:
        self.job, self.expires, self.future = job, expires, future
        self.order = job.arrived if job.tried else expires
        self.queued = False


def _order(waiting: Waiting) -> float:
    return waiting.order


class Flow:
    """The requests of one key.

    Attributes:
        share: relative to other flows.
        usual: seconds that its requests have a place for, divided by their weight; 0: not known.
        waiting: by their order.
        running: requests that have a place; ``weight`` is the sum of their weights.
    """

    __slots__ = ("_began", "_charged", "_settled", "entry", "key", "running", "share", "usual", "waiting", "weight")

    def __init__(self, key: str) -> None:
        self.key, self.share = key, 1.0
        self.waiting: list[Waiting] = []
        self.running, self.weight, self.usual = 0, 0.0, 0.0
        self.entry = 0  # the valid one of the queue's heap of flows; 0: none
        self._settled = 0.0  # virtual time without what runs
        # Of the running ones: sum of weight * when it got its place, and of what they were charged.
        self._began = self._charged = 0.0

    def virtual_time(self, now: float) -> float:
        taken = self.weight * now - self._began
        return self._settled + (taken if taken > self._charged else self._charged) / self.share

    def work(self, now: float) -> float:
        """The part of the virtual time that was really had."""
        return self._settled + (self.weight * now - self._began) / self.share

    def lift(self, level: float, now: float) -> None:
        """Takes away credit, but for what a flow with requests may be behind by chance."""
        if self.running:
            level -= CREDIT * self.usual / self.share
        time = self.virtual_time(now)
        if time < level:
            self._settled += level - time

    def begin(self, weight: float, usual: float, now: float) -> None:
        self.usual = self.usual or usual
        self.running += 1
        self.weight += weight
        self._began += weight * now
        self._charged += weight * self.usual

    def end(self, weight: float, charge: float, began: float, now: float) -> None:
        self._settled += weight * (now - began) / self.share
        self.usual += LEARN * (now - began - self.usual)
        self.running -= 1
        if self.running:
            self.weight -= weight
            self._began -= weight * began
            self._charged -= charge
        else:
            self.weight = self._began = self._charged = 0.0  # without what rounding has left


class FairQueue:
    """The jobs that wait, and the places that flows have. Operations take logarithmic time in the number of flows."""

    def __init__(self) -> None:
        self.level = 0.0
        self.again: list[Waiting] = []  # sent to a replica before; by their order
        self._flows: dict[str, Flow] = {}
        self._fresh = 0  # jobs that wait and are not in again
        self._backlogged = 0  # flows that have such
        self._weight = self._shares = 0.0  # of all flows
        self._entry = 0
        # Entries can be outdated. These are never too late: virtual time, weight / share, number, flow.
        self._next: list[tuple[float, float, int, Flow]] = []
        self._longest: list[tuple[float, int, Flow]] = []  # - waiting / share, number, flow
        self._expiring: list[tuple[float, int, Waiting]] = []
        self._ahead: list[tuple[float, str]] = []  # idle flows that are far ahead of the level

    def __len__(self) -> int:
        return self._fresh + len(self.again)

    def __iter__(self) -> Iterator[Waiting]:
        yield from self.again
        for flow in self._flows.values():
            yield from flow.waiting

    @property
    def fresh(self) -> int:
        """How many wait that have not been sent to a replica before."""
        return self._fresh

    @property
    def flows(self) -> int:
        """How many flows are remembered."""
        return len(self._flows)

    def _number(self) -> int:
        self._entry += 1
        return self._entry

    def _flow(self, key: str, share: float) -> Flow:
        flow = self._flows.get(key)
        if flow is None:
            flow = self._flows[key] = Flow(key)
            flow.share = share
            self._shares += share
        elif flow.share != share:  # it was changed
            self._shares += share - flow.share
            flow.share = share
        return flow

    def _drop(self, flow: Flow) -> None:
        del self._flows[flow.key]
        self._shares -= flow.share
        if not self._flows:
            self.level = self._weight = self._shares = 0.0

    # Places.

    def begin(self, key: str, share: float, weight: float, usual: float, now: float) -> Flow:
        """A flow has got a place. It is charged ``weight`` times its ``usual``, at first the one given here."""
        flow = self._flow(key, share)
        flow.lift(self.level, now)
        if not self._fresh:
            self.level = max(self.level, flow.work(now))
        flow.begin(weight, usual, now)
        self._weight += weight
        if flow.waiting:
            self._enter(flow, now)
        if self._ahead:
            self._forget()
        return flow

    def end(self, flow: Flow, weight: float, charge: float, began: float, now: float) -> None:
        """A place that a flow got at ``began`` is free again."""
        flow.end(weight, charge, began, now)
        self._weight -= weight
        if flow.waiting:
            self._enter(flow, now)
        elif not flow.running:
            self._idle(flow, flow.work(now), FORGIVEN * charge)

    def _idle(self, flow: Flow, time: float, forgiven: float) -> None:
        """Forgets a flow, unless it has taken more than others that wait."""
        if self._fresh and (time - self.level) * flow.share > forgiven:
            heappush(self._ahead, (time, flow.key))
            return
        self._drop(flow)

    def _forget(self) -> None:
        """Idle flows that are no longer ahead of the level, or of nobody: they have taken nothing from who waits."""
        level = self.level if self._fresh else math.inf
        while self._ahead and self._ahead[0][0] <= level:
            flow = self._flows.get(heappop(self._ahead)[1])
            # One that has come back is forgotten when it is idle again.
            if flow is not None and not flow.running and not flow.waiting and flow.virtual_time(0.0) <= level:
                self._drop(flow)

    # Who waits.

    def add(self, waiting: Waiting, now: float) -> None:
        job = waiting.job
        waiting.queued = True
        if job.tried:
            self.again.insert(bisect_right(self.again, waiting.order, key=_order), waiting)
        else:
            flow = self._flow(job.key, job.share)
            flow.waiting.insert(bisect_right(flow.waiting, waiting.order, key=_order), waiting)
            self._fresh += 1
            if len(flow.waiting) == 1:
                self._backlogged += 1
                flow.lift(self.level, now)
                self._enter(flow, now)
            if len(self._longest) > 2 * self._backlogged + SPARE:
                flows = {entry[2] for entry in self._longest if entry[2].waiting}
                self._longest = [(-len(each.waiting) / each.share, self._number(), each) for each in flows]
                heapify(self._longest)
            heappush(self._longest, (-len(flow.waiting) / flow.share, self._number(), flow))
        if len(self._expiring) > 2 * len(self) + SPARE:
            self._expiring = [entry for entry in self._expiring if entry[2].queued]
            heapify(self._expiring)
        heappush(self._expiring, (waiting.expires, self._number(), waiting))

    def remove(self, waiting: Waiting, now: float) -> None:
        """Takes out one that is in the queue."""
        if waiting.job.tried:
            waiting.queued = False
            self.again.remove(waiting)
        else:
            flow = self._take_out(waiting)
            if not flow.waiting and not flow.running:
                self._idle(flow, flow.work(now), 0.0)
            self._forget()
        if not len(self):
            self._expiring.clear()

    def _take_out(self, waiting: Waiting) -> Flow:
        waiting.queued = False
        flow = self._flows[waiting.job.key]
        at = bisect_left(flow.waiting, waiting.order, key=_order)
        while flow.waiting[at] is not waiting:
            at += 1
        del flow.waiting[at]
        self._fresh -= 1
        if not flow.waiting:
            self._backlogged -= 1
            flow.entry = 0
        if not self._fresh:
            self._next.clear()
            self._longest.clear()
        return flow

    def _enter(self, flow: Flow, now: float) -> None:
        """Puts a flow where it belongs, when it has come to wait or its places have changed."""
        if len(self._next) > 2 * self._backlogged + SPARE:
            self._next = [entry for entry in self._next if entry[3].entry == entry[2]]
            heapify(self._next)
        flow.entry = self._number()
        heappush(self._next, (flow.virtual_time(now), flow.weight / flow.share, flow.entry, flow))

    def next(self, now: float) -> Waiting | None:
        """The one that the next place is for, of those that have not been sent to a replica before."""
        heap = self._next
        while heap:
            time, places, entry, flow = heap[0]
            if flow.entry != entry:
                heappop(heap)
                continue
            actual = flow.virtual_time(now)
            if actual <= time:
                return flow.waiting[0]
            flow.entry = self._number()  # its requests take longer than usual
            heapreplace(heap, (actual, places, flow.entry, flow))
        return None

    def take(self, waiting: Waiting, now: float) -> None:
        """Takes out the one that :meth:`next` has returned, for :meth:`begin`."""
        self.level = max(self.level, self._take_out(waiting).work(now))

    def expired(self, now: float) -> Waiting | None:
        """One whose time is over."""
        at = self.expires()
        return self._expiring[0][2] if at <= now else None

    def expires(self) -> float:
        """When the next one's time is over."""
        heap = self._expiring
        while heap and not heap[0][2].queued:
            heappop(heap)
        return heap[0][0] if heap else math.inf

    # Where a newcomer would be.

    def modest(self, job: "Job") -> bool:
        """With this one its flow still has no more than its share, waiting ones included."""
        own = self._flows.get(job.key)
        has, shares = 1.0, self._shares
        if own is None:
            shares += job.share
        else:
            has += own.weight + len(own.waiting)
        return has * shares <= self._weight * job.share

    def ahead(self, waiting: Waiting, usual: float, now: float, most: float = math.inf) -> int:
        """How many go before it if it is added and none comes later; those beyond ``most`` need not be counted.

        Args:
            usual: work of a request of a flow of which nothing is known.
        """
        job = waiting.job
        if job.tried:
            return bisect_right(self.again, waiting.order, key=_order)
        count = len(self.again)
        own = self._flows.get(job.key)
        begins, places = self.level, 0.0
        if own is not None:
            position = bisect_right(own.waiting, waiting.order, key=_order)
            count += position
            begins = max(begins, own.virtual_time(now)) + position * (own.usual or usual) / job.share
            places = (own.weight + position) / job.share
        if self._backlogged == (1 if own is not None and own.waiting else 0):
            return count
        # Down the heap, as far as flows are before it.
        heap, stack = self._next, [0]
        while stack and count <= most:
            at = stack.pop()
            if at >= len(heap) or heap[at][0] > begins:
                continue
            stack += (2 * at + 1, 2 * at + 2)
            _, _, entry, flow = heap[at]
            if flow.entry != entry or flow is own:
                continue
            lead = (begins - flow.virtual_time(now)) * flow.share / (flow.usual or usual)
            if lead >= len(flow.waiting):
                count += len(flow.waiting)
            elif lead >= 0:
                turns = math.ceil(lead)
                if turns == lead and (flow.weight + turns) / flow.share <= places:
                    turns += 1  # as far, and with no more places
                count += turns
        return count

    def last(self, waiting: Waiting) -> Waiting | None:
        """Who has to go in favour of a newcomer: the last of the flow that waits with most, relative to its share.
        None: the newcomer itself."""
        job = waiting.job
        own = self._flows.get(job.key)
        mine = 0.0 if job.tried else ((len(own.waiting) if own is not None else 0) + 1) / job.share
        heap = self._longest
        while heap:
            length, _, flow = heap[0]
            actual = -len(flow.waiting) / flow.share
            if not flow.waiting:
                heappop(heap)
            elif actual != length:
                heapreplace(heap, (actual, self._number(), flow))
            elif -actual > mine and (flow is not own or job.tried):
                return flow.waiting[-1]
            else:
                break
        rivals = self.again if job.tried else own.waiting if own is not None else []
        return rivals[-1] if rivals and waiting.order < rivals[-1].order else None
