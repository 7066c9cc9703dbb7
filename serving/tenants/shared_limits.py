"""Limits that several gateways share through Redis.

All requests that come in while a call is under way are decided by the next one, so that a busy worker makes few calls
with many requests each. The same calls tell Redis what requests did not use, how many of them still run, and, after it
was away, what was let through meanwhile.

While Redis is away nobody waits for it: each worker decides by itself, see :meth:`RecentUse.decide`.
"""

import asyncio
import contextlib
import hashlib
import logging
import random
import secrets
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, TypeAlias

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AuthenticationError, RedisError

from serving.gateway.metrics import Metrics
from serving.gateway.settings import Redis
from serving.tenants.recent_use import RecentUse, Verdict
from serving.tenants.shared_script import BEGIN, DECIDE, PER_REQUEST

HEARTBEAT = 1.0  # seconds
MOST_KEYS = 200  # in one call, beside those that are asked about
TELL = 0.05  # seconds in which Redis is told what was given back
FIRST_DELAY, LONGEST_DELAY = 0.1, 1.0  # seconds between attempts to connect
STEADY = 10.0  # seconds after which a connection counts as one that holds
# Seconds in which every gateway has told an emptied Redis what it let through: those that look for it find it in
# LONGEST_DELAY, those that are connected notice with their next call, at the latest after HEARTBEAT.
EVERYONE = 2.0
CLOCK_WAS_SET = 5.0  # seconds by which Redis' clock must differ; less may be an answer that was read late

logger = logging.getLogger("medassist.limits")
_DECIDE_SHA = hashlib.sha1(DECIDE.encode(), usedforsecurity=False).hexdigest()
_Asked: TypeAlias = tuple[RecentUse, int, "asyncio.Future[Verdict | None]"]


class _Emptied(Exception):
    """Redis has other counters than it had."""


class SharedLimits:
    """See above.

    Args:
        url: of Redis; its password is never told.
        workers: of this gateway; as many are taken to share the limits until Redis has told.
        uses: what has been used of late, by key.
        set_clock: takes the time of Redis' clock, in seconds.

    Attributes:
        members: workers of all gateways that share the limits, as far as was last heard.
        up: Redis decides.

    Raises:
        ValueError: the URL is not valid.
    """

    def __init__(
        self,
        url: str,
        settings: Redis,
        metrics: Metrics,
        workers: int,
        uses: dict[str, RecentUse],
        set_clock: Callable[[float], None],
    ) -> None:
        try:
            self._pool = ConnectionPool.from_url(url)
            self._pool.make_connection()  # an option in the URL that there is none of is found out only here
        except (ValueError, TypeError):  # which may quote a password
            raise ValueError("redis.url must be redis://HOST:PORT/DB, rediss://... or unix://PATH") from None
        self._prefix, self._timeout = settings.prefix, settings.timeout
        self._uses, self._set_clock = uses, set_clock
        self._gauge = metrics.shared_limits_up.labels("redis")
        self._gauge.set(0)
        self._reconnects = metrics.shared_limits_reconnects.labels("redis")
        self.members, self.up = max(workers, 1), False
        self._worker = secrets.token_hex(6)
        self._epoch = b""
        self._connection: AbstractConnection | None = None
        self._settled = 0.0  # monotonic time at which everyone has told
        self._heard = 0.0
        self._ahead = 0.0  # Redis' clock, of the monotonic one
        self._asked: list[_Asked] = []
        self._dirty: dict[str, RecentUse] = {}
        self._work = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None
        self._tried = asyncio.Event()  # the first attempt has ended
        self._told_down = self._stopping = False

    async def start(self) -> None:
        """Returns when Redis has answered, or after ``redis.timeout``."""
        self._task = asyncio.create_task(self._run())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._tried.wait(), self._timeout)

    async def stop(self) -> None:
        """Tells what is left to tell."""
        self._stopping = True
        self._work.set()
        if self._task is not None:
            await asyncio.wait((self._task,), timeout=2 * self._timeout)
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._timer is not None:
            self._timer.cancel()

    async def ask(self, use: RecentUse, tokens: int) -> Verdict | None:
        """Redis' verdict, which is also counted in ``use``; None: it is away."""
        if not self.up:
            return None
        future: asyncio.Future[Verdict | None] = asyncio.get_running_loop().create_future()
        self._asked.append((use, tokens, future))
        self._work.set()
        try:
            return await future
        except asyncio.CancelledError:
            # Otherwise whoever answers sees that nobody waits.
            if not future.cancelled() and (verdict := future.result()) is not None and verdict.granted:
                self._give_back(use, verdict.second, tokens)
            raise

    def let_through(self, use: RecentUse, second: int, tokens: int) -> None:
        """A request was let through without Redis."""
        use.let_through(second, tokens)
        self._tell(use, TELL)

    def settled(self, use: RecentUse) -> None:
        """A request has ended."""
        if use.untold or use.limits.concurrency is not None:
            # The next request may ask elsewhere.
            self._tell(use, 0 if use.crowded else TELL)

    def _give_back(self, use: RecentUse, second: int, tokens: int) -> None:
        use.undo(second, tokens)
        self._tell(use, TELL)

    def _tell(self, use: RecentUse, delay: float) -> None:
        self._dirty[use.key] = use
        if not delay:
            self._work.set()
        elif self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(delay, self._time_to_tell)

    def _time_to_tell(self) -> None:
        self._timer = None
        self._work.set()

    # The connection.

    async def _run(self) -> None:
        delay = FIRST_DELAY
        while not self._stopping:
            began = time.monotonic()
            try:
                await self._connect()
                while not self._stopping:
                    with contextlib.suppress(_Emptied):
                        await self._begin()
                        await self._serve()
                    self._is_down()
            except (RedisError, OSError, TimeoutError, EOFError) as e:
                if not self._told_down:
                    self._told_down = True
                    why = type(e).__name__
                    if isinstance(e, AuthenticationError):
                        why = "it refuses the user or the password"
                    logger.warning("Redis is away (%s): each worker holds keys to its part of their limits", why)
            except Exception as e:  # nobody else would go on, or say so
                if not self._told_down:
                    self._told_down = True
                    logger.error(
                        "limits are not shared (%s), each worker holds keys to its part of them", type(e).__name__
                    )
            finally:
                self._is_down()
                self._tried.set()
                if self._connection is not None:
                    with contextlib.suppress(Exception):
                        await self._connection.disconnect(nowait=True)
                    self._connection = None
            if not self._stopping:
                delay = FIRST_DELAY if time.monotonic() - began > STEADY else min(2 * delay, LONGEST_DELAY)
                await asyncio.sleep(delay * random.uniform(0.5, 1))

    def _is_down(self) -> None:
        self.up = False
        self._gauge.set(0)
        self._answer_nobody(self._asked)
        self._asked = []

    async def _connect(self) -> None:
        self._connection = self._pool.make_connection()
        async with asyncio.timeout(max(self._timeout, 1.0)):
            await self._connection.connect()
        await self._command("SCRIPT", "LOAD", DECIDE)

    async def _begin(self) -> None:
        """Finds out which counters there are, and tells what they do not have yet."""
        info: bytes = await self._command("INFO", "server")
        process = next((line[7:23] for line in info.splitlines() if line.startswith(b"run_id:")), b"redis")
        arguments = (process, secrets.token_hex(4), int(bool(self._epoch or self._uses)), int(EVERYONE * 1000))
        epoch, clock, rest = await self._command("EVAL", BEGIN, 1, f"{self._prefix}:epoch", *arguments)
        self._take_clock(clock)
        if epoch != self._epoch:
            for use in self._uses.values():
                use.tell_all(clock // 1000)
            self._epoch = epoch
        self._dirty = dict(self._uses)
        while self._dirty:
            await self._call(heartbeat=False)
        self._settled = time.monotonic() + rest / 1000
        self._heard = 0.0
        self._work.set()

    def _take_clock(self, milliseconds: int) -> None:
        self._ahead = milliseconds / 1000 - time.monotonic()
        self._set_clock(milliseconds / 1000)

    async def _command(self, *parts: Any) -> Any:
        connection = self._connection
        assert connection is not None
        # A loop that was itself busy for so long may only not have read the answer yet.
        loop, grace = asyncio.get_running_loop(), self._timeout / 4
        async with asyncio.timeout(None) as limit:
            timer = loop.call_later(self._timeout, lambda: limit.reschedule(loop.time() + grace))
            try:
                await connection.send_packed_command(connection.pack_command(*parts))
                return await connection.read_response(disable_decoding=True)
            finally:
                timer.cancel()

    async def _serve(self) -> None:
        """Decides, until Redis is away or this is to end.

        Raises:
            _Emptied: Redis has other counters now.
        """
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            self._work.clear()
            now = time.monotonic()
            due = now - self._heard >= 0.9 * HEARTBEAT  # timers are rounded
            if due:
                self._heard = now
                loop.call_later(HEARTBEAT, self._work.set)
            if due or self._asked or self._dirty:
                await self._call(due)
            if self._stopping:
                await self._command("ZREM", f"{self._prefix}:workers", self._worker)
                return
            if not self.up and now >= self._settled:
                self._is_up()

    def _is_up(self) -> None:
        self.up = True
        self._gauge.set(1)
        self._tried.set()
        if self._told_down:
            self._told_down = False
            self._reconnects.inc()
            logger.warning("Redis is back: limits are shared again")

    async def _call(self, heartbeat: bool) -> None:
        """One round: tells, and asks."""
        asked, self._asked = self._asked, []
        dirty, self._dirty = self._dirty, {}
        if len(dirty) > MOST_KEYS:
            rest = iter(dirty.items())
            dirty = dict(islice(rest, MOST_KEYS))
            self._dirty.update(rest)  # in the next one
            self._work.set()
        if heartbeat:  # those that run still do
            dirty |= {u.key: u for u in self._uses.values() if u.in_flight and u.limits.concurrency is not None}
        by_key: dict[str, tuple[RecentUse, list[_Asked]]] = {key: (use, []) for key, use in dirty.items()}
        for item in asked:
            if not item[2].done():
                use = item[0]
                found = by_key.get(use.key)
                if found is None:
                    found = by_key[use.key] = (use, [])
                found[1].append(item)
        names: list[str] = [f"{self._prefix}:epoch", f"{self._prefix}:workers"]
        arguments: list[bytes | str | int] = [self._epoch, self._worker, int(heartbeat)]
        stem = f"{self._prefix}:{self._epoch.decode()}:{{"
        told: list[tuple[RecentUse, dict[int, list[int]]]] = []
        for key, (use, items) in by_key.items():
            names += (f"{stem}{key}}}:minute", f"{stem}{key}}}:running")
            limits, untold = use.limits, use.untold
            most, requests, tokens = limits.concurrency, limits.requests_per_minute, limits.tokens_per_minute
            arguments += (
                use.in_flight,
                -1 if most is None else most,
                -1 if requests is None else requests,
                -1 if tokens is None else tokens,
                len(untold),
            )
            for second, (requests_changed, tokens_changed) in untold.items():
                arguments += (second, requests_changed, tokens_changed)
            arguments.append(len(items))
            arguments += [item[1] for item in items]
            if untold:
                told.append((use, untold))
                use.untold = {}
        try:
            answer = await self._command("EVALSHA", _DECIDE_SHA, len(names), *names, *arguments)
            if len(answer) == 1:
                raise _Emptied
            if abs(answer[0] / 1000 - time.monotonic() - self._ahead) > CLOCK_WAS_SET:
                self._take_clock(answer[0])
        except BaseException:
            for use, untold in told:
                use.tell_again(untold)
                self._dirty[use.key] = use
            self._answer_nobody(asked)
            raise
        if heartbeat:
            self.members = max(answer[1], 1)
        at = 2
        try:
            for _, items in by_key.values():
                for item in items:
                    self._answer(item, answer[at : at + PER_REQUEST])
                    at += PER_REQUEST
        finally:
            self._answer_nobody(asked)  # whom a failure has left

    def _answer(self, item: _Asked, values: list[int]) -> None:
        use, tokens, future = item
        granted, second, all_requests, all_tokens, requests_wait, tokens_wait, running, reset = values
        limits = use.limits
        if granted:
            use.advance(second)
            use.count(second, tokens)
        use.saw(second, all_requests, all_tokens)
        most = limits.concurrency
        if most is not None:
            use.crowded = 2 * running >= most
        if future.done():
            if granted:
                self._give_back(use, second, tokens)
            return
        future.set_result(
            Verdict(
                granted == 1, second, all_requests, all_tokens, requests_wait / 1000, tokens_wait / 1000,
                most is not None and not granted and running >= most, reset / 1000,
                limits.requests_per_minute or 0, limits.tokens_per_minute or 0,
            )
        )  # fmt: skip

    @staticmethod
    def _answer_nobody(asked: Iterable[_Asked]) -> None:
        """They decide without Redis."""
        for _, _, future in asked:
            if not future.done():
                future.set_result(None)
