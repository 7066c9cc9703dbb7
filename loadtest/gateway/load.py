"""Requests of the measuring programs: a closed loop, bodies, and the parsing of what comes back."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeVar

import aiohttp
import orjson

from loadtest.benchmark import PROMPTS

Item = TypeVar("Item")
CHAT = "/v1/chat/completions"
DONE = b"data: [DONE]"


def chat(model: str, number: int = 0, **fields: Any) -> bytes:
    """A chat request; ``number`` chooses the question."""
    messages = [{"role": "user", "content": PROMPTS[number % len(PROMPTS)]}]
    return orjson.dumps({"model": model, "messages": messages, **fields})


async def closed_loop(items: Iterable[Item], concurrency: int, send: Callable[[Item], Awaitable[None]]) -> None:
    """Sends ``concurrency`` at a time: a new one starts when one has ended."""
    queue = iter(items)

    async def worker() -> None:
        for item in queue:
            await send(item)

    await asyncio.gather(*[worker() for _ in range(concurrency)])


def session(url: str, unix: str = "", timeout: float | None = 60, key: str = "") -> aiohttp.ClientSession:
    """A client of the server at ``url``, over the socket ``unix`` if one is given. ``timeout``: seconds in all."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    connector = aiohttp.UnixConnector(unix, limit=0) if unix else aiohttp.TCPConnector(limit=0)
    return aiohttp.ClientSession(
        url, connector=connector, headers=headers, timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=None)
    )
