"""A small OpenAI-compatible server that is ill on purpose, for faults that a real engine cannot be made to have."""

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web


class FaultyEngine:
    """Answers as its attributes say, which a test changes as it goes.

    Attributes:
        port: stays the same when it is stopped and started again.
        status: by path, in place of 200; 404 where a route is to be missing.
        delay: seconds that health and completions take, by path.
        models: entries of ``/v1/models``.
        logprobs: of the prompt's tokens from the second on.
        echoes, tells: whether it can tell log-probabilities of the prompt, and any at all.
        load: running and waiting requests, and cache usage.
        asked: requests by path; headers: of the last one.
        completions: bodies of completions requests.
    """

    def __init__(self) -> None:
        self.port = 0
        self.status: dict[str, int] = {}
        self.delay: dict[str, float] = {}
        self.models: list[dict[str, Any]] = [{"id": "demo", "max_model_len": 512}]
        self.logprobs: list[Any] = [-1.0, -2.0, -3.0, -4.0]
        self.chosen: list[int] = [7]
        self.chosen_logprobs: list[Any] = [-0.5]
        self.echoes = self.tells = True
        self.load: tuple[int, int, float] | None = (0, 0, 0.0)
        self.asked: Counter[str] = Counter()
        self.headers: dict[str, str] = {}
        self.completions: list[dict[str, Any]] = []
        self.at_once = self.most_at_once = 0
        self._runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self, socket: Path | None = None) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.01)
        await self._runner.setup()
        if socket:
            await web.UnixSite(self._runner, str(socket)).start()
        else:
            await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
            self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def _answer(self, request: web.Request) -> web.Response:
        path = request.path
        self.asked[path] += 1
        self.headers = dict(request.headers)
        await asyncio.sleep(self.delay.get(path, 0))
        if (status := self.status.get(path, 200)) != 200:
            return web.Response(status=status, headers={"Location": "/elsewhere"} if status < 400 else None)
        if path == "/v1/models":
            return web.json_response({"object": "list", "data": self.models})
        if path == "/metrics":
            return web.Response(text=self._metrics())
        if path == "/v1/completions":
            return await self._complete(request)
        return web.Response(status=200 if path == "/health" else 404)

    def _metrics(self) -> str:
        if self.load is None:
            return "python_info 1.0\n"
        running, waiting, usage = self.load
        labels = '{engine="0",model_name="demo"}'
        return (
            f"vllm:num_requests_running{labels} {running}.0\nvllm:num_requests_waiting{labels} {waiting}.0\n"
            f"vllm:kv_cache_usage_perc{labels} {usage}\n"
        )

    async def _complete(self, request: web.Request) -> web.Response:
        self.completions.append(await request.json())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        await asyncio.sleep(0.02)
        self.at_once -= 1
        numbers = [None, *self.logprobs, *self.chosen_logprobs] if self.echoes else self.chosen_logprobs
        logprobs = {"token_logprobs": numbers} if self.tells else None
        choice = {"text": "", "token_ids": self.chosen, "logprobs": logprobs}
        return web.json_response({"choices": [choice]})


@contextlib.asynccontextmanager
async def running(*engines: FaultyEngine) -> AsyncIterator[None]:
    """Starts them, and stops those that still run."""
    try:
        for engine in engines:
            await engine.start()
        yield
    finally:
        for engine in engines:
            await engine.stop()
