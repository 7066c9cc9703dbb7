"""The life of a request: read, checked, queued, sent to a replica, relayed.

The hot path is plain ASGI and aiohttp: pieces of streams are passed on as they come, never decoded. Whatever stage a
request has reached, a client that leaves ends its work: its place in the queue is given up, its connection to the
engine is closed, upon which vLLM aborts.

Until an event of an engine's answer has reached the client, another replica may answer instead. An engine sends the
head of a stream long before its first token, so ours goes out with the first event, or with the first comment that
keeps a silent connection open; comments say nothing, and do not stand in the way of another replica.
"""

import asyncio
import secrets
from time import monotonic
from typing import TYPE_CHECKING, Any

import aiohttp
import orjson
from starlette.types import Receive, Scope, Send

from serving.gateway.errors import ApiError, engine_late, engine_lost, from_engine
from serving.gateway.parameters import Checked, check, parse
from serving.gateway.request_head import read_head
from serving.gateway.scheduler import Job, Lease
from serving.gateway.stream import KEEP_ALIVE, Events
from serving.gateway.unanswered import NoChunkUsage, Unanswered, refused
from serving.gateway.usage import Usage
from serving.tenants.key import NOBODY

if TYPE_CHECKING:
    from serving.gateway.accounts import Grant, Trace
    from serving.gateway.metrics import ModelMetrics
    from serving.gateway.pool import Pool, Served
    from serving.gateway.replica import Replica
    from serving.tenants.capture import Recorder

ON_DISCONNECT = "medassist.on_disconnect"  # an extension of the ASGI scope, see serving.gateway.edge
KEY = "medassist.key"  # in the ASGI scope: who asks, see serving.gateway.app
REFUSAL = "medassist.refusal"  # the same: an ApiError, why the request is not answered; it has no body then
LONGEST_ENDING = 2.0  # seconds between an engine's last event and the end of its answer
CONNECT_GRACE = 1.0  # seconds beyond timeouts.connect, which does not count the look-up of a name
MAX_BODIES = 128 * 2**20  # bytes of the bodies of all running requests, beyond which large ones are refused
LARGE_BODY = 2**16
BYTES_PER_TOKEN = 4  # of an answer whose engine tells no usage
LEFT = "client_left"  # in records, of requests whose client did not wait for the answer


class Request:
    """One POST to a relayed route. ``answer`` is all of its work; ``tick`` is called about once a second meanwhile.

    Attributes:
        phase: "reading", "queued", "connecting", "waiting" (for the first byte), "streaming" or "ending".
        key: who asks.
        stream: the client wants one.
        prompt_tokens: the estimate of the check.
        usage: what the engine has told of the last attempt.
        queued, upstream, first_token: seconds; the last from arrival, -1 without one.
        replica, attempts: label of the last that was asked; how many were.
        recorder: takes what is sent and answered, where it is captured.
    """

    __slots__ = (
        "_aborted", "_arrived", "_asked", "_complete", "_deadline", "_gaps", "_last_sent", "_metrics", "_receive",
        "_scope", "_send", "_served", "_settled", "_since", "_started", "_task", "_writing", "attempts", "first_token",
        "grant", "id", "key", "model", "phase", "pool", "prompt_tokens", "queued", "recorder", "replica", "route",
        "stream", "trace", "upstream", "usage",
    )  # fmt: skip

    def __init__(self, pool: "Pool", route: str, scope: Scope, receive: Receive, send: Send) -> None:
        self.pool, self.route = pool, route
        self._scope, self._receive, self._send = scope, receive, send
        self._arrived = self._since = self._last_sent = monotonic()
        self.phase = "reading"
        self.id = b""
        self.model = ""
        self._served: Served | None = None
        self._metrics: ModelMetrics | None = None
        self.key = scope.get(KEY, NOBODY)
        self.queued = self.upstream = 0.0
        self.first_token = -1.0
        self.stream = False
        self._settled = 0  # the status that was put down
        self.prompt_tokens = self.attempts = 0
        self.replica = ""
        self.usage = Usage()
        self.grant: Grant | None = None
        self.trace: Trace | None = None
        self.recorder: Recorder | None = None
        self._gaps: list[float] = []  # between pieces of the stream, that are not in the metrics yet
        self._asked = 0.0  # when the replica was, if it is being asked now
        self._started = self._writing = self._complete = False
        self._deadline: float | None = None  # the client's own
        self._aborted = ""  # why the task was cancelled, where it was us
        self._task: asyncio.Task[Any] | None = None

    # What others do to it.

    def abort(self, reason: str) -> None:
        """Ends the work: "left" (the client), "unreachable", "late" or "stalled" (the engine), "overdue" (by the
        client's own limit), "shutdown", "answered"."""
        if self._task and not self._task.done() and not self._aborted:
            self._aborted = reason
            self._task.cancel()

    def left(self) -> None:
        """The client has closed its connection."""
        self.abort("left")

    def upstream_until(self, seconds: float) -> float:
        """How many of the seconds since its arrival it has been at engines."""
        return self.upstream + (self._arrived + seconds - self._asked if self._asked else 0.0)

    def tick(self, now: float) -> None:
        """Gives up silent engines, and keeps silent streams open."""
        if self._gaps and self._metrics is not None:
            self._metrics.observe_gaps(self._gaps)
        if self._writing or self._served is None:
            return
        timeouts = self._served.settings.timeouts
        silent = now - self._since
        at_engine = self.phase in ("connecting", "waiting", "streaming")
        if at_engine and self._deadline is not None and now > self._deadline:
            self.abort("overdue")
        elif self.phase == "connecting" and silent > timeouts.connect + CONNECT_GRACE:
            self.abort("unreachable")
        elif self.phase == "waiting" and silent > timeouts.first_byte:
            self.abort("late")
        elif self.phase == "streaming" and silent > timeouts.stall:
            self.abort("stalled")
        elif self.phase == "ending":
            if silent > LONGEST_ENDING:
                self.abort("answered")
        elif self.stream and now - self._last_sent > self.pool.settings.keep_alive_comments:
            self._last_sent = now
            self.pool.spawn(self._comment())

    async def _comment(self) -> None:
        if not (self._writing or self._aborted or self._complete):
            await self._write(KEEP_ALIVE)
            self.pool.metrics.keep_alives.inc()

    # What it does.

    async def answer(self) -> None:
        """Answers, whatever happens, unless the client has left."""
        self._task = asyncio.current_task()
        pool, code = self.pool, 500
        pool.requests.add(self)
        if watch := (self._scope.get("extensions") or {}).get(ON_DISCONNECT):
            watch(self.left)
        try:
            try:
                code = await self._answer()
            except ApiError as e:
                code = e.status
                await self._send_error(e)
        except asyncio.CancelledError:
            code = await self._cancelled()
        finally:
            pool.requests.discard(self)
            pool.metrics.requests.labels(self.route, self.model, code).inc()
            if self._metrics is not None:
                total = monotonic() - self._arrived
                self._metrics.duration.observe(total)
                self._metrics.overhead.observe(max(0.0, total - self.queued - self.upstream))
                if self.trace is not None and self.trace.trace_id:
                    self._metrics.exemplify(self.trace.trace_id, total, self.first_token)
            self._settle(code, LEFT if code == 499 else "")  # where nothing was sent
            if self.recorder is not None:
                self.recorder.close(code)

    def _settle(self, status: int, code: str) -> None:
        """Puts down what was used. Done before the last byte is sent: whoever has a whole answer is in the ledger,
        even if this process is killed now."""
        if not self._settled:
            self._settled = status
            self.pool.accounts.settle(self, status, code, monotonic() - self._arrived)

    async def _cancelled(self) -> int:
        assert self._task is not None
        if not self._aborted:
            raise asyncio.CancelledError
        self._task.uncancel()
        if self._complete:
            return self._settled
        if self._aborted == "left":
            self.pool.metrics.cancellations.labels(self.phase).inc()
            return 499
        await self._send_error(ApiError(503, "the server was shut down", "shutting_down", None, 5))
        return 503

    async def _answer(self) -> int:
        pool = self.pool
        head = read_head(self._scope["headers"])
        self.id = head.id
        self.trace = pool.accounts.trace(head.traceparent)
        if refusal := self._scope.get(REFUSAL) or head.refusal:
            raise refusal
        message = await self._receive()  # the edge has the whole body before it calls
        if message["type"] == "http.disconnect":
            self._aborted = "left"
            raise asyncio.CancelledError
        body = message.pop("body")
        size = len(body)
        if self.key.id:
            self.recorder = pool.accounts.recorder(self.key, self.id, body)
        request = parse(body, pool.settings.http.json_depth)
        served, name = pool.resolve(request.get("model"), self.key)
        checked = check(self.route, request, served.settings_for(self.key))
        del request, body
        served.refuse_too_long(checked)
        self._served, self.model, self.stream = served, name, checked.stream
        self.prompt_tokens = checked.prompt_tokens
        pool.accounts.prepare(self.key, self.route, checked, served.settings)
        self._metrics = metrics = pool.metrics.of(self.route, name)
        self._deadline = self._arrived + head.deadline if head.deadline else None
        job = Job(
            arrived=self._arrived,
            deadline=self._deadline,
            prompt_tokens=checked.prompt_tokens,
            max_tokens=checked.max_tokens,
            prefixes=checked.prefixes,
            stream=checked.stream,
            tried=set(),
            key=self.key.id,
            share=self.key.share,
        )
        if size > LARGE_BODY and pool.bodies + size > MAX_BODIES:
            raise ApiError(503, "too many large requests are being answered", "overloaded", None, 5)
        max_tokens = None if checked.open_ended else checked.max_tokens
        self.grant = await pool.accounts.admit(self.key, checked.prompt_tokens, max_tokens)
        pool.bodies += size
        metrics.in_flight.inc()
        try:
            return await self._until_answered(served, checked, job)
        finally:
            metrics.in_flight.dec()
            pool.bodies -= size

    async def _until_answered(self, served: "Served", checked: Checked, job: Job) -> int:
        metrics, retries = self.pool.metrics, self.pool.retries
        retries.deposit()
        attempts = 1
        while True:
            self.phase, self._since = "queued", monotonic()
            try:
                lease = await served.scheduler.admit(job)
            finally:
                queued = monotonic() - self._since
                self.queued += queued
                metrics.of(self.route, self.model).queued.observe(queued)
            try:
                self.pool.accounts.renew(self.key)  # it may have been revoked meanwhile
            except ApiError:
                lease.done(ok=False)
                raise
            try:
                return await self._attempt(lease, checked)
            except Unanswered as e:
                job.tried.add(lease.replica)
                # A connection that was kept can end just when it is used: that is not the replica's failure yet.
                again = e.reason == "reset" and attempts == 1
                others = any(r.available and r not in job.tried for r in served.replicas)
                # What makes one engine fail may make all fail that it is sent to.
                suspect = e.reason == "500" and attempts > 1
                spent = attempts >= self.pool.settings.retries.attempts
                if suspect or spent or not (others or again) or not retries.allow():
                    # Only now it is known when the replica will be back.
                    raise (e.error or engine_lost(lease.replica.retry_after)) from None
                attempts += 1
                metrics.retries.labels(self.model, e.reason).inc()

    async def _attempt(self, lease: Lease, checked: Checked) -> int:
        """Asks one replica.

        Raises:
            Unanswered: it did not answer, and another may be asked.
            ApiError: it refused the request, or answered too late.
        """
        replica, usage, code = lease.replica, Usage(checked.prompts, checked.answers), 0
        self.usage, self.replica = usage, replica.name
        self.attempts += 1
        self.phase, self._since = "waiting", monotonic()
        began = self._asked = self._since
        try:
            try:
                code = await self._ask(lease, checked, usage)
            except NoChunkUsage:
                replica.chunk_usage = False
                code = await self._ask(lease, checked, usage)
            return code
        except Unanswered as e:
            replica.failed(e.reason)
            raise
        except ApiError:
            replica.succeeded()  # it works: the request was at fault
            raise
        except asyncio.CancelledError:
            if self._aborted == "left" and self.phase == "waiting":
                replica.unanswered(monotonic() - began)
            if self._aborted not in ("unreachable", "late", "stalled", "overdue"):
                raise
            return await self._given_up(replica)
        finally:
            if code == 200:
                replica.succeeded()
            lease.done(code == 200, usage.completion_tokens)
            upstream, self._asked = monotonic() - began, 0.0
            self.upstream += upstream
            usage.close()
            if self._metrics is not None:
                self._metrics.count(upstream, usage)
                if self._gaps:
                    self._metrics.observe_gaps(self._gaps)

    async def _given_up(self, replica: "Replica") -> int:
        """After an engine was silent for too long, or the client's own limit has passed.

        Raises:
            Unanswered: there was no connection yet. Otherwise the time is spent, and another is not asked.
        """
        assert self._task is not None
        assert self._served is not None
        self._task.uncancel()
        why, self._aborted = self._aborted, ""
        timeouts = self._served.settings.timeouts
        if why == "unreachable":
            replica.failed("connect")
            raise Unanswered("connect", engine_lost(replica.retry_after))
        if why == "overdue":
            error = ApiError(504, "the request's own limit of time has passed", "deadline_exceeded")
        else:
            replica.failed("timeout" if why == "late" else "stall")
            error = engine_late(timeouts.first_byte if why == "late" else timeouts.stall)
        await self._send_error(error)
        return error.status

    async def _ask(self, lease: Lease, checked: Checked, usage: Usage) -> int:
        replica = lease.replica
        checked.body["model"] = replica.name_there(self.model)
        if checked.chunk_usage_added and not replica.chunk_usage:
            checked.body["stream_options"].pop("continuous_usage_stats", None)
        headers = {
            "Content-Type": "application/json",
            **(self.trace.headers if self.trace else {}),
            # Never one that another request of the engine may have.
            "X-Request-Id": f"{self.id[:64].decode()}-{secrets.token_hex(4)}",
        }
        try:
            upstream = await replica.session.post(
                replica.url(self.route),
                data=orjson.dumps(checked.body),
                headers=headers,
                timeout=replica.timeout,
                allow_redirects=False,
                trace_request_ctx=self,
            )
        except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError):
            raise Unanswered("connect") from None
        except (aiohttp.ClientError, OSError):
            raise Unanswered("reset") from None
        try:
            if upstream.status != 200:
                raise await refused(upstream, replica, checked, self.route, self.model)
            if upstream.content_type == "text/event-stream":
                return await self._relay_stream(upstream, lease, checked, usage)
            self.phase, self._since = "streaming", monotonic()
            whole = await upstream.read()
        except (aiohttp.ClientError, OSError):
            raise Unanswered("reset") from None
        finally:
            upstream.release() if upstream.content.at_eof() else upstream.close()
        lease.first_byte()
        assert self._metrics is not None
        self.first_token = monotonic() - self._arrived
        self._metrics.first_token.observe(self.first_token)
        usage.read_answer(self.route, whole)
        if usage.completion_tokens is None:
            usage.events = len(whole) // BYTES_PER_TOKEN
        if self._started:  # with a comment
            raise ApiError(502, "the engine does not stream this", "unsupported_stream", "stream")
        self._settle(200, "")
        await self._start(200, b"application/json", len(whole))
        if self.recorder is not None:
            self.recorder.answer(whole)
        await self._send({"type": "http.response.body", "body": whole})
        self._complete = True
        return 200

    async def _relay_stream(
        self, upstream: aiohttp.ClientResponse, lease: Lease, checked: Checked, usage: Usage
    ) -> int:
        metrics = self._metrics
        assert metrics is not None
        events = Events(self.route, checked.usage_added, usage, checked.chunk_usage_added)
        content = upstream.content
        try:
            while data := await content.readany():
                out = events.feed(data)
                if out:
                    now = monotonic()
                    if self.phase == "waiting":
                        self.phase = "streaming"
                        lease.first_byte()
                        lease.replica.began()
                        self.first_token = now - self._arrived
                        metrics.first_token.observe(self.first_token)
                    else:
                        self._gaps.append(now - self._since)
                    self._since = now
                    await self._write(out, last=events.finished)
                if events.finished:
                    self.phase = "ending"  # after which the connection can be used again
                    await content.read()
                    return 200
                if events.failed:
                    break
        except (aiohttp.ClientError, OSError):
            if events.finished:
                return 200
        if out := events.rest():
            await self._write(out, last=True)
            return 200
        if events.refusal is not None:
            raise from_engine(*events.refusal, self.route, self.model)
        if self.phase == "waiting":
            raise Unanswered("500" if events.failed else "reset")
        lease.replica.failed("reset")
        self.pool.metrics.broken_streams.labels(self.model).inc()
        await self._send_error(engine_lost(lease.replica.retry_after))
        return 503

    # What it reads and writes.

    async def _write(self, data: bytes, last: bool = False) -> None:
        """Events or comments of a stream."""
        self._writing = True
        if last:
            self._settle(200, "")
        if not self._started:
            await self._start(200, b"text/event-stream; charset=utf-8", None)
        if self.recorder is not None:
            self.recorder.answer(data)
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})
        self._complete = last
        self._last_sent = monotonic()
        self._writing = False

    async def _start(
        self,
        status: int,
        media_type: bytes,
        length: int | None,
        retry_after: int | None = None,
        more: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        headers = [(b"content-type", media_type), (b"x-request-id", self.id)]
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        else:
            headers += [(b"cache-control", b"no-store"), (b"x-accel-buffering", b"no")]
        if retry_after is not None:
            headers.append((b"retry-after", b"%d" % retry_after))
        headers += more
        if self.grant is not None:
            headers += self.grant.headers
        self._started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def _send_error(self, error: ApiError) -> None:
        """As a response, or as the last event of a stream that has begun."""
        if self._complete:
            return
        self.pool.metrics.errors.labels(error.code or str(error.status)).inc()
        self._settle(error.status, error.code or "")
        self._writing = self._complete = True
        body = error.event(self.route) if self._started else error.body
        if self.recorder is not None:
            self.recorder.answer(body)
        if self._started:
            await self._send({"type": "http.response.body", "body": body})
            return
        await self._start(error.status, b"application/json", len(body), error.retry_after, error.headers)
        await self._send({"type": "http.response.body", "body": body})
