"""Relays a completion request to its engine and the engine's bytes to the client.

The hot path is plain ASGI and aiohttp: chunks are passed on as they come, never decoded. Whatever stage a request has
reached, a client that leaves ends the work: its connection to the engine is closed, upon which vLLM aborts it.
"""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from uuid import uuid4

import aiohttp
from starlette.types import Message, Receive, Scope, Send

from serving.engine import Engine
from serving.gateway.errors import ApiError, engine_lost, from_engine
from serving.gateway.metrics import Metrics
from serving.gateway.requests import parse, prepare

MAX_BODY = 8 * 2**20  # bytes
DONE = b"data: [DONE]"
ERROR = b'data: {"error"'  # how vLLM reports a failure in a stream that has begun
_JSON = {"Content-Type": "application/json"}


class Gate:
    """Which engines there are, by the names of their models and adapters, and whether requests are still taken."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self.engines = {name: engine for engine in engines for name in engine.names}
        self.draining = False
        self.running: set[asyncio.Task[None]] = set()

    def choose(self, model: object) -> Engine:
        """The engine for a model.

        Raises:
            ApiError: no such model, or it is not ready.
        """
        if not isinstance(model, str) or not model:
            raise ApiError(400, "the request needs a field 'model' with a model's name", "missing_model", "model")
        if model not in self.engines:
            names = ", ".join(self.engines)
            raise ApiError(404, f"there is no model {model[:100]!r}; there are: {names}", "model_not_found", "model")
        engine = self.engines[model]
        if self.draining:
            raise ApiError(503, "the server is shutting down", "shutting_down", None, 5)
        if engine.state == "refused":
            raise ApiError(
                503, "the model does not reproduce its training and is not served", "model_refused", None, 60
            )
        if engine.state != "ready":
            raise ApiError(503, "the model's engine is starting", "engine_unavailable", None, engine.retry_after)
        return engine

    async def drain(self, seconds: float) -> None:
        """Takes no more requests, and lets those that run finish; those that have not by then end with an error."""
        self.draining = True
        if self.running:
            await asyncio.wait(self.running, timeout=seconds)
        for task in self.running:
            task.cancel()
        if self.running:
            await asyncio.wait(self.running, timeout=2)


class Relay:
    """An ASGI endpoint that relays POST requests to one route of the engines."""

    def __init__(self, route: str, gate: Gate, metrics: Metrics) -> None:
        self.route, self.gate, self.metrics = route, gate, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = _Request(self, scope, receive, send)
        work = asyncio.ensure_future(request.answer())
        self.gate.running.add(work)
        gone: asyncio.Task[None] | None = None
        try:
            await request.body_read.wait()
            gone = asyncio.ensure_future(_until_disconnected(receive))
            await asyncio.wait((work, gone), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                request.client_left = True
        finally:
            if not work.done():
                work.cancel()
            if gone is not None:
                gone.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work
            self.gate.running.discard(work)


async def _until_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Request:
    """One request on its way; ``answer`` is all of its work."""

    def __init__(self, relay: Relay, scope: Scope, receive: Receive, send: Send) -> None:
        self.relay, self.scope, self.receive, self.send = relay, scope, receive, send
        self.body_read = asyncio.Event()
        self.client_left = False
        self.started = time.perf_counter()
        self.headers_sent = False
        self.model = ""
        self.id = f"req-{uuid4().hex}"

    async def answer(self) -> None:
        """Answers, whatever happens, unless the client has left."""
        code = 500
        metrics = self.relay.metrics
        try:
            body = await self._read_body()
            request = parse(body)
            engine = self.relay.gate.choose(request.get("model"))
            self.model = str(request["model"])
            body = prepare(body, request, self.model, engine)
            with metrics.in_flight.labels(self.model).track_inprogress():
                code = await self._relay(engine, body)
        except ApiError as e:
            code = e.status
            await self._send_error(e)
        except asyncio.CancelledError:
            if self.client_left:
                code = 499
                metrics.disconnects.labels(self.model).inc()
            else:
                code = 503
                await self._send_error(ApiError(503, "the server was shut down", "shutting_down", None, 5))
        finally:
            self.body_read.set()
            metrics.requests.labels(self.relay.route, self.model, code).inc()
            if self.model:
                metrics.duration.labels(self.relay.route, self.model).observe(time.perf_counter() - self.started)

    async def _read_body(self) -> bytes:
        """The request's body.

        Raises:
            ApiError: 415 for another media type than JSON, 413 for a body that is too large.
        """
        headers = dict(self.scope["headers"])
        media_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if media_type != b"application/json":
            raise ApiError(
                415, "the request's Content-Type must be application/json", "unsupported_media_type", "Content-Type"
            )
        body, received = b"", 0
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                self.client_left = True
                raise asyncio.CancelledError
            part = message.get("body", b"")
            received += len(part)
            if received <= MAX_BODY:
                body += part
            # A client that is still sending does not read: what is a little too large is received and thrown away.
            if received > MAX_BODY and (not message.get("more_body") or received > 4 * MAX_BODY):
                raise ApiError(413, f"the request is larger than {MAX_BODY // 2**20} MiB", "request_too_large")
            if not message.get("more_body"):
                self.body_read.set()
                return body

    async def _relay(self, engine: Engine, body: bytes) -> int:
        try:
            upstream = await self._send_upstream(engine, body)
        except (aiohttp.ClientError, OSError):
            raise engine_lost(engine.retry_after) from None
        async with upstream:
            self.relay.metrics.first_byte.labels(self.relay.route, self.model).observe(
                time.perf_counter() - self.started
            )
            try:
                if upstream.status != 200:
                    raise from_engine(upstream.status, await upstream.read(), engine.retry_after)
                if upstream.content_type == "text/event-stream":
                    return await self._relay_stream(engine, upstream)
                whole = await upstream.read()
            except (aiohttp.ClientError, OSError):
                raise engine_lost(engine.retry_after) from None
            await self._start(200, b"application/json", len(whole))
            await self.send({"type": "http.response.body", "body": whole})
            return 200

    async def _send_upstream(self, engine: Engine, body: bytes) -> aiohttp.ClientResponse:
        headers = _JSON | {"X-Request-Id": self.id}
        url = engine.url(self.relay.route)
        try:
            return await engine.session.post(url, data=body, headers=headers)
        except aiohttp.ServerDisconnectedError:
            # An idle connection that closed as we took it; the engine has not seen the request.
            if engine.state != "ready":
                raise
            return await engine.session.post(url, data=body, headers=headers)

    async def _relay_stream(self, engine: Engine, upstream: aiohttp.ClientResponse) -> int:
        await self._start(200, b"text/event-stream; charset=utf-8", None)
        end = b""  # the last bytes seen, to tell a finished stream from a broken one
        reported = broken = False
        try:
            while chunk := await upstream.content.readany():
                end = (end + chunk)[-32:]
                reported = reported or ERROR in chunk
                await self.send({"type": "http.response.body", "body": chunk, "more_body": True})
        except (aiohttp.ClientError, OSError):
            broken = True
        failed = broken or DONE not in end
        if failed and not reported:
            await self._send_error(engine_lost(engine.retry_after))
        else:
            await self.send({"type": "http.response.body", "body": b""})
        if failed or reported:
            self.relay.metrics.broken_streams.labels(self.model).inc()
            return 503
        return 200

    async def _start(self, status: int, media_type: bytes, length: int | None, retry_after: int | None = None) -> None:
        headers = [(b"content-type", media_type), (b"x-request-id", self.id.encode())]
        if length is not None:
            headers.append((b"content-length", str(length).encode()))
        else:
            headers += [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]
        if retry_after is not None:
            headers.append((b"retry-after", str(retry_after).encode()))
        message: Message = {"type": "http.response.start", "status": status, "headers": headers}
        self.headers_sent = True
        await self.send(message)

    async def _send_error(self, error: ApiError) -> None:
        """As a response, or as the last event of a stream that has begun."""
        if self.headers_sent:
            await self.send({"type": "http.response.body", "body": error.event})
            return
        body = error.body
        await self._start(error.status, b"application/json", len(body), error.retry_after)
        await self.send({"type": "http.response.body", "body": body})
