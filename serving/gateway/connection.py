"""One client's connection: HTTP/1.1 parsed by llhttp, an ASGI call for each request, and no wait without an end.

The application is called when a request has arrived whole. So slow senders cost a buffer and no task, and what the edge
refuses never reached the application. The clock is :class:`serving.gateway.edge.Server`'s: it looks at every connection
about once a second, and no request needs a timer.

A client that closes its sending side counts as gone: TCP does not tell it from one that left.
"""

import asyncio
import select
import socket
import struct
from collections import deque
from typing import TYPE_CHECKING, Any

import httptools

from serving.gateway.errors import ApiError
from serving.gateway.exchange import Exchange, new_scope, refusal

if TYPE_CHECKING:
    from serving.gateway.edge import Give, Server

MAX_HEADERS = 100
MAX_PIPELINED = 32
LINGER = 5.0  # seconds in which a refused client may go on sending, so that it comes to read the answer
SPARE_AFTER = 1.0  # seconds without a request after which a connection may have to make room for a new one
ENCODING_SLACK = 128 * 2**10  # bytes that frame a body: chunk sizes, trailers; beyond eight for each of the body's

# What is expected from the client: the first byte of a request, the rest of its head, the rest of its body, nothing
# (what comes is dropped), the end of the connection.
IDLE, HEAD, BODY, DEAF, CLOSING = range(5)

# Poll conditions of a connection whose other end is closed, or was reset.
_HUNG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR  # macOS has no POLLRDHUP
_NOTED = frozenset((b"content-length", b"transfer-encoding", b"x-request-id", b"origin"))


class _Refused(Exception):
    """Stops the parser; the answer is on its way."""


class Connection(asyncio.Protocol):
    """Reads requests, lets one at a time be answered, and refuses what breaks a limit."""

    __slots__ = (
        "_body", "_body_size", "_discarded", "_early", "_framing", "_head_size", "_headers", "_held", "_keep_alive",
        "_last_words", "_origin", "_over", "_paused_at", "_pipeline", "_pipelined", "_reading", "_replaying",
        "_request_id", "_requests", "_scope", "_since", "_slack", "_url", "_wanted", "admin", "client", "exchange",
        "local", "parser", "phase", "server", "transport", "writable",
    )  # fmt: skip

    transport: asyncio.Transport
    parser: Any

    def __init__(self, server: "Server", used: bool = False, admin: bool = False) -> None:
        """``used``: it has brought requests already, to another process. ``admin``: it came to that listener."""
        self.server, self.admin = server, admin
        self.phase = IDLE
        self.exchange: Exchange | None = None
        self.writable: asyncio.Event | None = None  # while the client reads slower than we write
        self._pipeline: deque[Exchange] = deque()
        self._last_words = b""  # a refusal, to be sent after the answers that are due before it
        self._requests = int(used)
        self._discarded = self._body_size = self._held = self._slack = self._head_size = 0
        self._wanted = True  # whether the application reads the body
        self._early = False  # the answer does not wait for the body
        self._pipelined = 0  # bytes of bodies in the pipeline
        # In one piece: as a list of a hostile client's chunks it would take thirty times its size.
        self._body: bytes | bytearray = b""
        self._framing = b""
        self._replaying = False
        self._reading = True
        self._request_id = self._origin = b""

    # The transport's callbacks.

    def connection_made(self, transport: Any) -> None:
        server = self.server
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)
        peer, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self.client = tuple(peer[:2]) if isinstance(peer, tuple) else None
        self.local = tuple(local[:2]) if isinstance(local, tuple) else None
        self._since = server.loop.time()
        most = server.http.max_connections
        self._over = len(server.connections) >= most and not server.make_room(self._since - SPARE_AFTER)
        server.connections.add(self)
        if self._requests:
            server.idle[self] = None
        if len(server.connections) > most + max(64, most // 8):  # no room even for the answer that there is no room
            server.refused("connections")
            transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.server.connections.discard(self)
        self.server.idle.pop(self, None)
        self._drop_body()
        self._drop_pipeline()
        self.phase = CLOSING
        self.parser = None  # the parser holds this object, too
        writable, self.writable = self.writable, None
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            exchange.lost()
        if writable is not None:
            writable.set()

    def pause_writing(self) -> None:
        self.writable = asyncio.Event()
        self._paused_at = self.server.loop.time()

    def resume_writing(self) -> None:
        if self.writable is not None:
            self.writable.set()
            self.writable = None

    def data_received(self, data: bytes) -> None:
        if self.phase >= DEAF:
            self._discard(len(data))
            return
        requests, body_size = self._requests, self._body_size
        try:
            self._feed(data)
        except httptools.HttpParserError as e:
            if self.phase < DEAF:
                self._refuse_malformed(data, e)
            return
        if self._requests != requests:
            return
        if self.phase == BODY:
            self._slack += len(data) - (self._body_size - body_size)
            if self._slack > ENCODING_SLACK + 8 * self._body_size:
                self.refuse(400, "the body's chunks hold more framing than body", "invalid_request", "malformed")
        elif self.phase <= HEAD:
            self._head_size += len(data)
            if self._head_size > self.server.http.max_header:
                self._refuse_head()

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as e:
                # We never upgrade: it is an ordinary request. The parser takes it for one without a body, and another
                # parser, told how long the body is, reads on.
                data = data[e.args[0] :]
                if self._framing:
                    self.parser = httptools.HttpRequestParser(self)
                    self._replaying = True
                    self.parser.feed_data(b"POST / HTTP/1.1\r\n" + self._framing + b"\r\n")
                    self._replaying = False
                    self._framing = b""
                if not data or self.phase >= DEAF:
                    return

    # The parser's callbacks.

    def on_message_begin(self) -> None:
        if not self._replaying:
            if self.phase >= DEAF:
                raise _Refused
            self.phase = HEAD
            self._since = self.server.loop.time()
            self.server.idle.pop(self, None)
            self._url = self._framing = self._request_id = self._origin = b""
            self._headers: list[tuple[bytes, bytes]] = []
            self._head_size = self._slack = 0

    def on_url(self, url: bytes) -> None:
        if not self._replaying:
            self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.phase != HEAD:  # a trailer, or the second parser
            return
        name = name.lower()
        if name in _NOTED:
            if name == b"content-length":
                if int(value) > self.server.http.max_body:
                    self._refuse_body()
                    raise _Refused
                if int(value):
                    self._framing = b"content-length: %b\r\n" % value
            elif name == b"transfer-encoding":
                self._framing = b"transfer-encoding: %b\r\n" % value
            elif name == b"origin":
                self._origin = value
            else:
                self._request_id = value
        self._headers.append((name, value))
        if len(self._headers) > MAX_HEADERS:
            self._refuse_head()
            raise _Refused

    def on_headers_complete(self) -> None:
        if self._replaying:
            return
        parser, url, headers, server = self.parser, self._url, self._headers, self.server
        size = len(url) + sum(len(name) + len(value) + 4 for name, value in headers)
        if size > server.http.max_header:
            self._refuse_head()
            raise _Refused
        if self._over:
            self.refuse(503, "too many connections", "overloaded", "connections", retry_after=1)
            raise _Refused
        version = parser.get_http_version()
        if version not in ("1.1", "1.0"):
            self.refuse(400, "this server speaks HTTP/1.1", "invalid_request", "malformed")
            raise _Refused
        self._keep_alive = version == "1.1" and parser.should_keep_alive()
        self._scope = scope = new_scope(self, version, parser.get_method(), url, headers)
        self._wanted = server.admit is None or server.admit(scope)
        self.phase = BODY
        self._since = server.loop.time()
        if self._framing:
            if self.exchange is None and any(n == b"expect" and v.lower() == b"100-continue" for n, v in headers):
                if not self._wanted:  # nor is it to be sent
                    self._keep_alive, self._early = False, True
                    self.on_message_complete()
                    raise _Refused
                self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            if not parser.should_upgrade():
                self._framing = b""

    def on_body(self, body: bytes) -> None:
        size = len(body)
        self._body_size += size
        if self._wanted:
            self._held += size
            self.server.buffered += size
            if not self._body:
                self._body = body
            else:
                if isinstance(self._body, bytes):
                    self._body = bytearray(self._body)
                self._body += body
        if self._body_size > self.server.http.max_body:
            self._refuse_body()
            raise _Refused
        if self.server.buffered > self.server.max_buffered:
            self.refuse(503, "too many bodies are being sent at once", "overloaded", "memory", retry_after=1)
            raise _Refused

    def on_message_complete(self) -> None:
        if self._framing and not self._replaying and not self._early:
            return  # the body of a request with an Upgrade header is still to come
        body = bytes(self._body)  # no copy if it came in one piece
        self._drop_body()
        exchange = Exchange(self, self._scope, body, self._keep_alive, self._origin)
        self.phase = IDLE if self._keep_alive else DEAF
        self._since = self.server.loop.time()
        self._requests += 1
        if self.exchange is None:
            self._start(exchange)
            return
        self._pipeline.append(exchange)
        self._pipelined += len(body)
        self.server.buffered += len(body)
        if self._reading:
            self._reading = False
            self.transport.pause_reading()
        if len(self._pipeline) > MAX_PIPELINED:
            self.refuse(400, f"more than {MAX_PIPELINED} requests wait for an answer", "invalid_request", "malformed")
            raise _Refused

    # Answers.

    def _start(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.server.running.add(exchange)
        exchange.task = self.server.loop.create_task(exchange.run())

    def answered(self, exchange: Exchange) -> None:
        """A response is complete."""
        self.exchange = None
        self._since = self.server.loop.time()
        if not exchange.keep_alive:
            self._finish()
        elif self._pipeline:
            if self._hung_up():  # nobody reads the next answer
                self._drop_pipeline()
                self.transport.abort()
                return
            successor = self._pipeline.popleft()
            size = len(successor.body or b"")
            self._pipelined -= size
            self.server.buffered -= size
            self._start(successor)
            if not self._pipeline and not self._reading:
                self._reading = True
                self.transport.resume_reading()
        elif self._last_words:
            self.transport.write(self._last_words)
            self.phase = HEAD  # what was refused may be on its way still
            self._finish()
        elif self.phase == IDLE:
            self.server.idle[self] = None

    def fail(self, exchange: Exchange) -> None:
        """The application left a request without a whole answer."""
        if exchange.gone or exchange.complete:
            return
        exchange.lost()
        self.exchange = None
        if exchange.started:  # the end that the response announced does not come, so nobody takes it for whole
            self.phase, self._since = CLOSING, self.server.loop.time()
            self.transport.close()
        else:
            error = ApiError(500, "internal error", "internal_error")
            self.transport.write(refusal(self.server, error, self._request_id, exchange.origin))
            self._finish()

    def refuse(self, status: int, message: str, code: str, reason: str, retry_after: int | None = None) -> None:
        """Answers in the application's place, as soon as earlier requests have their answers, and closes."""
        self.server.refused(reason)
        error = ApiError(status, message, code, None, retry_after)
        answer = refusal(self.server, error, self._request_id, self._origin)
        self._drop_body()
        if self.exchange is not None:
            self.phase = DEAF
            self._last_words = answer
            return
        self.transport.write(answer)
        self.phase = HEAD  # there may be more to come than was read
        self._finish()

    def _refuse_head(self) -> None:
        most = self.server.http.max_header
        message = f"the request's head has more than {most} bytes or {MAX_HEADERS} lines"
        self.refuse(431, message, "header_too_large", "header_size")

    def _refuse_body(self) -> None:
        most = self.server.http.max_body
        self.refuse(413, f"the request's body has more than {most} bytes", "request_too_large", "body_size")

    def _refuse_malformed(self, data: bytes, error: httptools.HttpParserError) -> None:
        if self._requests == 0 and data[:2] == b"\x16\x03":
            message = "this port speaks plain HTTP: use http://, or a proxy that ends TLS"
        elif isinstance(error, httptools.HttpParserCallbackError):
            message = "the request's target is not a valid URL"
        else:
            message = f"not a valid HTTP/1.1 request: {error}"
        self.refuse(400, message, "invalid_request", "malformed")

    # The end.

    def _finish(self) -> None:
        """Closes when all is sent. A client that may be sending is listened to a while: closing on it would reset the
        connection, and it would never read its answer."""
        sending = self.phase in (HEAD, BODY) or self._early or not self._reading
        self.phase = CLOSING
        self._since = self.server.loop.time()
        if not sending:
            self.transport.close()
            return
        if not self._reading:
            self._reading = True
            self.transport.resume_reading()
        if not self.transport.is_closing():
            self.transport.write_eof()

    def _discard(self, size: int) -> None:
        self._discarded += size
        if self._discarded > 2 * self.server.http.max_body:
            self.transport.abort()

    def _reset(self) -> None:
        """Ends the connection at once. The kernel would hold megabytes for minutes, offering them to the client."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def _drop_body(self) -> None:
        self.server.buffered -= self._held
        self._body_size = self._held = 0
        self._body = b""

    def _drop_pipeline(self) -> None:
        self.server.buffered -= self._pipelined
        self._pipelined = 0
        self._pipeline.clear()

    @property
    def since(self) -> float:
        """The loop's time when the phase began."""
        return self._since

    def check(self, now: float) -> None:
        """Ends what takes too long. Called about once a second."""
        server, limits = self.server, self.server.http
        if self.writable is not None and now - self._paused_at > limits.send_timeout:
            server.refused("send_timeout")
            self._reset()
            return
        waited = now - self._since
        if self.phase == CLOSING:
            unsent = self.transport.get_write_buffer_size()
            if waited > (max(limits.send_timeout, LINGER) if unsent else LINGER):
                self._reset()
        elif not self._reading:
            self._since = now  # it is we who do not read, and so are not told that the client has left
            if self._hung_up():
                self._drop_pipeline()
                self.transport.abort()
        elif self.phase == HEAD:
            if waited > limits.header_timeout:
                message = f"the head took longer than {limits.header_timeout:g} s"
                self.refuse(408, message, "request_timeout", "header_timeout")
        elif self.phase == BODY:
            if waited > limits.body_timeout:
                message = f"the body took longer than {limits.body_timeout:g} s"
                self.refuse(408, message, "request_timeout", "body_timeout")
        elif self.phase == IDLE and self.exchange is None and not self.transport.is_closing():
            patience = limits.keep_alive if self._requests else limits.header_timeout
            if server.draining:
                waited, patience = min(waited, now - server.draining_since), min(patience, server.lame_duck)
            if waited > patience and not self._readable():
                self.phase = CLOSING
                self._since = now
                self.transport.close()

    def hand_over(self, give: "Give") -> bool:
        """Gives the connection to another process, if nothing has arrived that was not answered. What arrives from now
        on is read there: the client notices nothing. Returns false if ``give`` cannot take it now."""
        if self.phase != IDLE or self.exchange is not None or self.transport.is_closing():
            return True
        if self.transport.get_write_buffer_size():
            return True
        self.transport.pause_reading()
        if not give(self.transport.get_extra_info("socket").fileno(), self._requests > 0, self.admin):
            self.transport.resume_reading()
            return False
        self.phase = CLOSING
        self.transport.abort()  # closes this process's descriptor; the connection stays, as the other has one
        return True

    def spare(self) -> bool:
        """Closes the connection if it has no request, to make room. Returns whether it did."""
        if self.phase != IDLE or self.exchange is not None or self.transport.is_closing():
            return False
        if self.transport.get_write_buffer_size() or self._readable():
            return False
        self.phase = CLOSING
        self.transport.close()
        return True

    @property
    def deaf(self) -> bool:
        """Whether what comes from the client is dropped."""
        return self.phase >= DEAF

    def _readable(self) -> bool:
        """Whether there is data that has not been read: a request that arrived after the last look."""
        return self._poll(select.POLLIN)

    def _hung_up(self) -> bool:
        """Whether the client has left: what a connection that is not read from would not learn."""
        return self.transport.is_closing() or self._poll(_HUNG_UP)

    def _poll(self, conditions: int) -> bool:
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), conditions)
        return bool(poll.poll(0))
