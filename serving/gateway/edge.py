"""The HTTP server in front of the application: every wait and every size is limited (:class:`settings.Http`).

uvicorn has no limit on the time in which a head or a body arrives, none on a head's size with httptools, and answers
errors as plain text; here these are the point. And it can end without failing a request: :meth:`Server.retire` where
another process goes on, :meth:`Server.begin_drain` where none does.
"""

import asyncio
import socket
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from email.utils import formatdate
from functools import partial

from starlette.types import ASGIApp, Scope

from serving.gateway.connection import Connection
from serving.gateway.exchange import Exchange
from serving.gateway.settings import Http
from serving.gateway.tls import Certificates, Tunnel
from serving.gateway.web import Web

BACKLOG = 2048  # connections that the kernel keeps for us to accept
LAME_DUCK = 2.0  # seconds in which a draining server still takes requests on connections that are open
_TICK = 0.02  # seconds between looks at what is left, at the end

Give = Callable[[int, bool, bool], bool]


class Server:
    """Serves an ASGI application on sockets.

    Attributes:
        http: the limits; may be replaced at any time.
        web: header lines of every answer; may be replaced at any time.
        admit: called with the scope when a request's head is complete; returns whether the body will be read. One that
            will not is dropped as it comes. None: every body is read.
        refused: called with the reason whenever a request is refused here: "header_size", "header_timeout",
            "body_size", "body_timeout", "malformed", "connections", "memory", "send_timeout", "tls".
        connections, running: open connections; requests in the application.
        idle: connections that wait for another request, the longest idle first.
        buffered: bytes of bodies that have not arrived whole, or wait behind another request of their connection.
        draining: whether :meth:`begin_drain` was called, or :meth:`retire` with TLS.
    """

    def __init__(
        self,
        app: ASGIApp,
        http: Http,
        refused: Callable[[str], None] = lambda reason: None,
        admit: Callable[[Scope], bool] | None = None,
        certificates: Certificates | None = None,
    ) -> None:
        """``certificates``: the listeners speak TLS."""
        self.app, self.http, self.refused, self.admit, self.certificates = app, http, refused, admit, certificates
        self.scheme = "https" if certificates else "http"
        self.web = Web((), secure=certificates is not None)
        self.connections: set[Connection] = set()
        self.idle: OrderedDict[Connection, None] = OrderedDict()
        self.running: set[Exchange] = set()
        self.buffered = 0
        self.max_buffered = max(128 * 2**20, 4 * http.max_body)
        self.date = b""
        self.draining = False
        self.draining_since = 0.0
        self.lame_duck = LAME_DUCK
        self.loop: asyncio.AbstractEventLoop
        self._listeners: list[asyncio.AbstractServer] = []
        self._accepting = False
        self._sweeper: asyncio.Task[None] | None = None
        self._stopped = asyncio.Event()

    async def start(self, sockets: Sequence[socket.socket], admin: Sequence[socket.socket] = ()) -> None:
        """Begins to accept connections; those of ``admin`` are marked in the scopes of their requests."""
        self.loop = asyncio.get_running_loop()
        self._set_date()
        for sock in (*sockets, *admin):
            create = partial(self._connection, admin=sock in admin)
            self._listeners.append(await self.loop.create_server(create, sock=sock, backlog=BACKLOG))
        self._accepting = True
        self._sweeper = self.loop.create_task(self._sweep())

    def _connection(self, used: bool = False, admin: bool = False) -> asyncio.Protocol:
        connection = Connection(self, used, admin)
        return Tunnel(connection, self.certificates.context) if self.certificates else connection

    async def serve(self, sockets: Sequence[socket.socket]) -> None:
        """Serves until :meth:`stop`."""
        await self.start(sockets)
        await self._stopped.wait()

    def begin_drain(self, lame_duck: float = LAME_DUCK) -> None:
        """Accepts no more connections, and ends those there are without failing a request.

        Each response that begins from now on says ``Connection: close``. A connection without a request is closed when
        it has been idle for ``lame_duck`` seconds: until then its client may be about to send the next request, and
        gets it answered.
        """
        if self.draining:
            self.lame_duck = min(self.lame_duck, lame_duck)
            return
        self.draining, self.draining_since, self.lame_duck = True, self.loop.time(), lame_duck
        self._stop_accepting_soon()

    def retire(self, give: Give) -> None:
        """Accepts no more connections, and gives those there are to another process, each when it has no request.

        Other processes that have the same socket go on accepting. No client notices anything.

        With TLS they stay, as its keys are in this process: each ends with the next answer, which says so, or when it
        has been idle for as long as it may always be.

        Args:
            give: takes a connection's file descriptor, whether it has brought requests and whether it came to the admin
                listener, for :meth:`adopt` there. Returns false if it cannot take it now. The descriptor is closed here
                afterwards.
        """
        if self.certificates:
            self.begin_drain(self.http.keep_alive)
            return
        self._stop_accepting_soon()
        self._hand_over(give)

    async def adopt(self, connection: socket.socket, used: bool, admin: bool = False) -> None:
        """Takes over a connection that another process has accepted; ``used``: it has brought requests before;
        ``admin``: it came to the admin listener."""
        connection.setblocking(False)
        try:
            await self.loop.connect_accepted_socket(lambda: Connection(self, used, admin), connection)
        except OSError:  # the client has left
            connection.close()

    def make_room(self, before: float) -> bool:
        """Closes the connection that has been idle for longest, if that is since ``before`` (the loop's time). Returns
        whether there was one. Clients expect that a server closes idle connections, and not to be refused for them."""
        while self.idle:
            connection = next(iter(self.idle))
            if connection.since > before:
                return False
            del self.idle[connection]
            if connection.spare():
                self.connections.discard(connection)  # its end comes in the loop's next round
                return True
        return False

    async def drained(self) -> None:
        """Waits until there are no more connections."""
        while self._accepting or self.connections:  # noqa: ASYNC110  so rare that an event would cost more
            await asyncio.sleep(_TICK)

    async def stop(self) -> None:
        """Ends at once: listening, connections, and the requests in the application."""
        self._stop_accepting()
        if self._sweeper is not None:
            self._sweeper.cancel()
        tasks = [exchange.task for exchange in self.running if exchange.task is not None]
        for connection in tuple(self.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # they learn that their connection is lost
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._stopped.set()

    def _hand_over(self, give: Give) -> None:
        if self.draining:  # there is no other process any more
            return
        for connection in tuple(self.connections):
            if not connection.hand_over(give):
                break
        if self._accepting or self.connections:
            self.loop.call_later(_TICK, self._hand_over, give)

    def _stop_accepting_soon(self) -> None:
        # Not at once: connections that the kernel has for us already are accepted in the loop's next rounds.
        self.loop.call_later(_TICK, self._stop_accepting)

    def _stop_accepting(self) -> None:
        self._accepting = False
        for listener in self._listeners:
            listener.close()
        self._listeners = []

    async def _sweep(self) -> None:
        while True:
            http = self.http
            shortest = min(http.header_timeout, http.body_timeout, http.send_timeout, http.keep_alive)
            if self.draining:
                shortest = min(shortest, self.lame_duck)
            await asyncio.sleep(min(1.0, shortest / 4))
            self._set_date()
            now = self.loop.time()
            for connection in tuple(self.connections):
                connection.check(now)

    def _set_date(self) -> None:
        self.date = b"date: %b\r\n" % formatdate(time.time(), usegmt=True).encode()


def create_server(
    app: ASGIApp,
    http: Http,
    refused: Callable[[str], None] = lambda reason: None,
    admit: Callable[[Scope], bool] | None = None,
    certificates: Certificates | None = None,
) -> Server:
    """A server for an application; it listens when it is started."""
    return Server(app, http, refused, admit, certificates)
