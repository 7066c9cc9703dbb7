"""An engine that misbehaves on purpose, and a gateway in front, both on real sockets in one event loop."""

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from serving.gateway.app import Gateway
from serving.gateway.edge import Server, create_server
from serving.gateway.settings import Settings

CHAT = "/v1/chat/completions"
Behaviour = Callable[["Engine", web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def chunk(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}).encode() + b"\n\n"


USAGE_EVENT = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2,"total_tokens":5}}\n\n'
DONE = b"data: [DONE]\n\n"


async def answers(engine: "Engine", request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """As an engine should."""
    if not body.get("stream"):
        message = {"index": 0, "message": {"role": "assistant", "content": "ab"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        return web.json_response({"id": "x", "object": "chat.completion", "choices": [message], "usage": usage})
    response = await engine.begin(request)
    for piece in (chunk("a"), chunk("b"), USAGE_EVENT, DONE):
        await response.write(piece)
    return response


class Engine:
    """A server on a port of its own whose ``behaviour`` can be changed at any time."""

    def __init__(self, behaviour: Behaviour = answers, *routes: str) -> None:
        self.behaviour, self.routes = behaviour, {CHAT, *routes}
        self.received: list[dict[str, Any]] = []
        self.ids: list[str] = []
        self.aborted = 0
        self.metrics = ""

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["Engine"]:
        app = web.Application()
        for route in self.routes:
            app.router.add_post(route, self._chat)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield self
        finally:
            await runner.cleanup()

    async def begin(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        return response

    async def _health(self, request: web.Request) -> web.Response:
        return web.Response()

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(text=self.metrics, status=200 if self.metrics else 404)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.received.append(body)
        self.ids.append(request.headers.get("X-Request-Id", ""))
        try:
            return await self.behaviour(self, request, body)
        except (asyncio.CancelledError, ConnectionError):
            self.aborted += 1
            raise


class Client:
    """Requests to a gateway, over connections that are kept."""

    def __init__(self, root: str, gateway: Gateway, session: aiohttp.ClientSession, server: Server) -> None:
        self.root, self.gateway, self.session, self.server = root, gateway, session, server

    def post(self, stream: bool = False, path: str = CHAT, headers: Any = None, **changes: Any) -> Any:
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": stream} | changes
        return self.session.post(self.root + path, json=body, headers=headers)

    async def metric(self, name: str, **labels: str) -> float:
        async with self.session.get(self.root + "/metrics") as response:
            text = await response.text()
        total = 0.0
        for line in text.splitlines():
            named = line.startswith((f"medassist_{name} ", f"medassist_{name}{{"))
            if named and all(f'{label}="{value}"' in line for label, value in labels.items()):
                total += float(line.rsplit(" ", 1)[1])
        return total


@contextlib.asynccontextmanager
async def gateway_for(
    *engines: Engine, model: Any = None, accounts: Path | None = None, **settings: Any
) -> AsyncIterator[Client]:
    """A gateway with one model "m" on these engines; ``accounts`` is a keeper's folder."""
    urls = [{"url": engine.url} for engine in engines]
    content = {"models": {"m": {"engines": urls, **(model or {})}}, **settings}
    content.setdefault("probes", {"interval": 0.1, "canary_interval": 0})
    gateway = Gateway(Settings.model_validate(content), accounts=accounts)
    await gateway.start()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = create_server(gateway, gateway.pool.settings.http, admit=gateway.admit)
        await server.start([listener])
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            try:
                yield Client(f"http://127.0.0.1:{listener.getsockname()[1]}", gateway, session, server)
            finally:
                await session.close()
                await server.stop()
                await gateway.stop()
