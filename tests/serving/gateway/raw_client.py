"""A small application behind the HTTP server, and clients that say what they are told to, byte for byte."""

import asyncio
import json
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import uvloop

from serving.gateway.edge import Server, create_server
from serving.gateway.settings import Http

QUICK = Http(
    max_body=200_000, max_header=8192, header_timeout=0.4, body_timeout=0.5, send_timeout=0.4, keep_alive=0.8,
    max_connections=20,
)  # fmt: skip


class App:
    """Echoes ``/echo``; ``/stream`` sends until it is told to stop; ``/flood`` sends 64 MiB; ``/crash`` raises."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.bodies: list[bytes] = []
        self.disconnects = 0
        self.finish, self.lost = asyncio.Event(), asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.seen.append(scope["path"])
        body = (await receive())["body"]
        self.bodies.append(body)
        scope["extensions"]["medassist.on_disconnect"](self.left)
        headers = [(b"content-type", b"text/plain")]
        if scope["path"] == "/crash":
            raise ValueError("holds what the client sent: secret")
        if scope["path"] == "/stream":
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            await self.finish.wait()
            await send({"type": "http.response.body", "body": b"last"})
        elif scope["path"] == "/flood":
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            for _ in range(1024):
                await send({"type": "http.response.body", "body": bytes(65536), "more_body": True})
            await send({"type": "http.response.body"})
        else:
            answer = body or scope["path"].encode()
            headers.append((b"content-length", b"%d" % len(answer)))
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": answer})

    def left(self) -> None:
        self.disconnects += 1
        self.lost.set()


class Client:
    """A socket, and what a response on it is."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def response(self, limit: float = 3.0) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body.

        Raises:
            asyncio.IncompleteReadError: the connection was closed before a response.
        """
        async with asyncio.timeout(limit):
            head = (await self.reader.readuntil(b"\r\n\r\n")).decode()
            status, *lines = head.strip().split("\r\n")
            headers = {k.lower(): v for k, v in (line.split(": ", 1) for line in lines)}
            body = b""
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            elif headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readline(), 16):
                    body += (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readline()
        return int(status.split()[1]), headers, body

    async def closed(self, limit: float = 3.0) -> bool:
        """Waits until the server closes; true if it sends nothing before."""
        async with asyncio.timeout(limit):
            try:
                return await self.reader.read() == b""
            except ConnectionResetError:
                return True


class Edge:
    def __init__(self, server: Server, app: App, refused: list[str], port: int) -> None:
        self.server, self.app, self.refused, self.port = server, app, refused, port

    async def connect(self, context: ssl.SSLContext | None = None) -> Client:
        name = "localhost" if context else None
        return Client(*await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname=name))


@asynccontextmanager
async def serving(http: Http = QUICK, **more: Any) -> AsyncIterator[Edge]:
    """``more``: for :func:`create_server`."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = App()
    refused: list[str] = []
    server = create_server(app, http, refused.append, **more)
    await server.start([listener])
    try:
        yield Edge(server, app, refused, listener.getsockname()[1])
    finally:
        app.finish.set()
        await server.stop()


def run(test: Callable[[Edge], Awaitable[None]], http: Http = QUICK, **more: Any) -> None:
    async def main() -> None:
        async with serving(http, **more) as edge:
            await test(edge)

    uvloop.run(main())


def request(path: str, *lines: str, body: bytes = b"", method: str = "") -> bytes:
    if body:
        lines = (*lines, f"Content-Length: {len(body)}")
    head = f"{method or ('POST' if body else 'GET')} {path} HTTP/1.1\r\nHost: x\r\n"
    return (head + "".join(f"{line}\r\n" for line in lines) + "\r\n").encode() + body


async def refusal(client: Client, status: int) -> dict[str, Any]:
    """The error of a refused request, whose connection must be closed behind it."""
    got, headers, body = await client.response()
    assert got == status
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert re.fullmatch(r"[\w.-]+", headers["x-request-id"])
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert await client.closed()
    return error
