"""A request and its response, as an ASGI application sees them."""

import asyncio
import http
import logging
import os
import re
import traceback
import urllib.parse
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import httptools

from serving.gateway.errors import ApiError

if TYPE_CHECKING:
    from serving.gateway.connection import Connection
    from serving.gateway.edge import Server

logger = logging.getLogger("medassist.edge")

DISCONNECT = "medassist.on_disconnect"
ADMIN_LISTENER = "medassist.admin_listener"  # in the scope of requests that came to it
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")
_ASGI = {"version": "3.0", "spec_version": "2.3"}
STATUS = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in http.HTTPStatus}


def new_scope(connection: "Connection", version: str, method: bytes, url: bytes, headers: Any) -> dict[str, Any]:
    """An ASGI scope.

    Raises:
        ValueError, httptools.HttpParserError: the target is not valid.
    """
    if url[:1] == b"/":
        target, _, query = url.partition(b"#")[0].partition(b"?")
    elif url == b"*":
        target, query = url, b""
    else:
        parsed = httptools.parse_url(url)
        target, query = parsed.path or b"/", parsed.query or b""
    path = target.decode("ascii")
    if "%" in path:
        path = urllib.parse.unquote(path)
    scope = {
        "type": "http",
        "asgi": _ASGI,
        "http_version": version,
        "server": connection.local,
        "client": connection.client,
        "scheme": connection.server.scheme,
        "root_path": "",
        "headers": headers,
        "method": method.decode("ascii"),
        "path": path,
        "raw_path": target,
        "query_string": query,
    }
    if connection.admin:
        scope[ADMIN_LISTENER] = True
    return scope


def refusal(server: "Server", error: ApiError, request_id: bytes, origin: bytes) -> bytes:
    """The whole answer of a request that does not reach the application. Its connection is closed behind it.

    Args:
        request_id: the client's; it gets another where that is not valid.
    """
    name = request_id if _REQUEST_ID.fullmatch(request_id) else b"req-" + os.urandom(16).hex().encode()
    retry = b"retry-after: %d\r\n" % error.retry_after if error.retry_after is not None else b""
    fields = b"content-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\nconnection: close\r\n"
    more, _ = server.web.fields(origin, "", kept=False)
    body = error.body
    return STATUS[error.status] + server.date + retry + fields % (len(body), name) + more + b"\r\n" + body


class Exchange:
    """A request that has arrived, and its response.

    ``scope["extensions"]["medassist.on_disconnect"]`` takes a function without arguments (or None). It is called once
    if the client leaves before the response is complete, and never after that. It spares the application a task that
    waits for ``http.disconnect``.
    """

    __slots__ = (
        "_bodiless", "_chunked", "_ended", "_left", "_on_disconnect", "body", "complete", "connection", "gone",
        "keep_alive", "origin", "scope", "started", "task",
    )  # fmt: skip

    def __init__(
        self, connection: "Connection", scope: dict[str, Any], body: bytes, keep_alive: bool, origin: bytes = b""
    ) -> None:
        self.connection, self.scope, self.keep_alive, self.origin = connection, scope, keep_alive, origin
        self.body: bytes | None = body
        self.started = self.complete = self.gone = False
        self.task: asyncio.Task[None] | None = None
        self._bodiless = self._chunked = False
        self._left: int | None = None  # bytes of the body that are to be sent; None: not said before
        self._ended: asyncio.Event | None = None
        self._on_disconnect: Callable[[], None] | None = None
        scope["extensions"] = {DISCONNECT: self.on_disconnect}

    def on_disconnect(self, callback: Callable[[], None] | None) -> None:
        if self.gone and callback is not None:
            self.connection.server.loop.call_soon(callback)
        else:
            self._on_disconnect = callback

    async def run(self) -> None:
        connection = self.connection
        try:
            if self.origin and self.scope["method"] == "OPTIONS" and await self._preflight():
                return
            await connection.server.app(self.scope, self.receive, self.send)
            if not self.complete and not self.gone:
                raise RuntimeError("the application returned before its response was complete")
        except asyncio.CancelledError:
            connection.fail(self)
            raise
        except Exception as e:
            # Not the exception's message: it can hold what the client sent.
            where = traceback.extract_tb(e.__traceback__)[-1]
            logger.error("%s in %s, line %s: request failed", type(e).__name__, where.filename, where.lineno)
            connection.fail(self)
        finally:
            connection.server.running.discard(self)

    async def _preflight(self) -> bool:
        """Answers a browser that asks what a page may send; false: it does not ask that."""
        status, body, headers = 204, b"", []
        try:
            told = self.connection.server.web.preflight(self.scope["path"], self.scope["headers"])
            if told is None:
                return False
            headers += told
        except ApiError as e:
            status, body = e.status, e.body
            headers += [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        await self.send({"type": "http.response.start", "status": status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})
        return True

    async def receive(self) -> dict[str, Any]:
        if self.body is not None:
            body, self.body = self.body, None
            return {"type": "http.request", "body": body, "more_body": False}
        if not self.complete and not self.gone:
            if self._ended is None:
                self._ended = asyncio.Event()
            await self._ended.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        connection = self.connection
        if connection.writable is not None and not self.gone:
            await connection.writable.wait()
        if self.gone:
            return
        if not self.started:
            connection.transport.write(self._head(message))
        elif self.complete or message["type"] != "http.response.body":
            raise RuntimeError(f"unexpected ASGI message {message['type']!r}")
        else:
            self._send_body(message.get("body", b""), message.get("more_body", False))

    def _head(self, message: Any) -> bytes:
        if message["type"] != "http.response.start":
            raise RuntimeError(f"unexpected ASGI message {message['type']!r}")
        status, server, scope = message["status"], self.connection.server, self.scope
        parts = [STATUS.get(status) or b"HTTP/1.1 %d \r\n" % status, server.date]
        kept = False
        for name, value in message.get("headers", ()):
            name = name.lower()
            if name == b"content-length":
                self._left = int(value)
            elif name == b"connection":
                if value.lower() == b"close":
                    self.keep_alive = False
                continue
            elif name == b"transfer-encoding":
                continue
            elif name == b"cache-control":
                kept = True
            parts += (name, b": ", value, b"\r\n")
        lines = 2 + (len(parts) - 2) // 4
        more, count = server.web.fields(self.origin, scope["path"], kept)
        parts.append(more)
        lines += count
        self._bodiless = scope["method"] == "HEAD" or status in (204, 304) or status < 200
        if self._left is None and not self._bodiless:
            if scope["http_version"] == "1.0":
                self.keep_alive = False  # the end of the connection is the end of the body
            else:
                self._chunked = True
                parts.append(b"transfer-encoding: chunked\r\n")
                lines += 1
        if server.draining or not self.keep_alive:
            self.keep_alive = False
            parts.append(b"connection: close\r\n")
            lines += 1
        parts.append(b"\r\n")
        head = b"".join(parts)
        if not head.count(b"\n") == head.count(b"\r") == lines + 1:
            raise RuntimeError("a header's value holds a line break")
        self.started = True
        return head

    def _send_body(self, body: bytes, more: bool) -> None:
        write = self.connection.transport.write
        if self._bodiless:
            pass
        elif self._chunked:
            if not more:
                write(b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n")
            elif body:
                write(b"%x\r\n%b\r\n" % (len(body), body))
        else:
            if self._left is not None:
                self._left -= len(body)
                if self._left < 0 or (self._left and not more):
                    raise RuntimeError("the response's body does not have its Content-Length")
            if body:
                write(body)
        if not more:
            self.complete = True
            self._on_disconnect = None
            if self._ended is not None:
                self._ended.set()
            self.connection.answered(self)

    def lost(self) -> None:
        """The client has gone."""
        self.gone = True
        self.body = None
        if self._ended is not None:
            self._ended.set()
        callback, self._on_disconnect = self._on_disconnect, None
        if callback is not None and not self.complete:
            callback()
