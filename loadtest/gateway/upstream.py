"""A double of an engine: answers at once or at a set pace, and remembers what reached it.

    python -m loadtest.gateway.upstream --port PORT [--chunks 32] [--delay 0.002] [--model mock]

Chat completions and completions are as long as ``max_tokens`` says, else ``--chunks`` tokens; a stream is one event a
token, ``--delay`` seconds apart (0: many at a time), and a plain answer takes as long as the stream would.
``GET /state`` tells how many requests were answered and how many clients left, which cases of
:mod:`loadtest.gateway.hostile` arrived, and every request that :mod:`loadtest.gateway.judge` finds fault with.
"""

import argparse
import asyncio
import gc
import re
from typing import Any

import orjson
import uvloop
from aiohttp import web

from loadtest.gateway.judge import PROBES, violation

CASE = re.compile(rb"case-(\d+)-")
LONGEST = 1_000_000  # tokens
WITHOUT_PAUSE = 64  # events at a time where there is no pause between them
PROMPT = 8  # tokens, of every prompt


class Upstream:
    """The double's answers and its memory. ``delay`` is seconds between two tokens."""

    def __init__(self, chunks: int = 32, delay: float = 0.002, model: str = "mock", judging: bool = False) -> None:
        self.chunks, self.delay, self.model, self.judging = chunks, delay, model, judging
        self.answered = self.left = self.active = 0
        self.cases: set[int] = set()
        self.violations: list[dict[str, Any]] = []

    def application(self) -> web.Application:
        app = web.Application(client_max_size=2**30)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_post("/v1/completions", self.complete)
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/state", self.state)
        app.router.add_route("*", "/{rest:.*}", self.rest)
        return app

    async def state(self, request: web.Request) -> web.Response:
        found = {"answered": self.answered, "left": self.left, "active": self.active}
        return _json(found | {"cases": sorted(self.cases), "violations": self.violations})

    async def models(self, request: web.Request) -> web.Response:
        card = {"id": self.model, "object": "model", "created": 1, "owned_by": "loadtest", "max_model_len": 2**20}
        return _json({"object": "list", "data": [card]})

    async def metrics(self, request: web.Request) -> web.Response:
        values = {"num_requests_running": self.active, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
        text = "".join(f'vllm:{name}{{model_name="{self.model}"}} {value}\n' for name, value in values.items())
        return web.Response(text=text)

    async def rest(self, request: web.Request) -> web.Response:
        """Every other route: embeddings and the like get an answer of little meaning, what is no route 404."""
        body = await self._arrived(request)
        if request.method == "GET" and request.path in PROBES:
            return _json({"status": "ok", "version": "0"})
        if request.path == "/tokenize":
            return _json({"count": 1, "max_model_len": 2**20, "tokens": [1], "token_strs": None})
        if request.path in ("/v1/embeddings", "/v1/responses", "/v1/messages"):
            return _json({"id": "x", "object": "list", "model": body.get("model"), "data": [], "usage": _usage(1, 0)})
        return _json({"error": {"message": "no such route", "type": "not_found", "param": None, "code": 404}}, 404)

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await self._arrived(request)
        asked = body.get("max_completion_tokens", body.get("max_tokens"))
        count = min(asked if isinstance(asked, int) and asked > 0 else self.chunks, LONGEST)
        chat = request.path.endswith("chat/completions")
        self.active += 1
        try:
            if body.get("stream") is True:
                response: web.StreamResponse = await self._stream(request, body, chat, count)
            else:
                if self.delay:
                    await asyncio.sleep(self.delay * count)
                response = _json(self._whole(chat, count, body))
            self.answered += 1
            return response
        except (ConnectionResetError, asyncio.CancelledError):
            self.left += 1
            raise
        finally:
            self.active -= 1

    def _whole(self, chat: bool, count: int, body: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": 0, "finish_reason": "length", "logprobs": None}
        if chat:
            choice["message"] = {"role": "assistant", "content": " word" * count}
        else:
            choice["text"] = " word" * count
            if body.get("logprobs") is not None:  # the same for the same prompt, as a canary expects
                told = ([None] + [-0.5] * (PROMPT - 1) if body.get("echo") else []) + [-0.5] * count
                choice["logprobs"] = {"tokens": [" word"] * len(told), "token_logprobs": told}
        return _shell(chat, self.model, "") | {"choices": [choice], "usage": _usage(PROMPT, count)}

    async def _stream(self, request: web.Request, body: dict[str, Any], chat: bool, count: int) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        shell = _shell(chat, self.model, ".chunk" if chat else "")
        options = body.get("stream_options") or {}
        told = options.get("include_usage") is True and options.get("continuous_usage_stats") is True

        def event(choice: dict[str, Any], done: int) -> bytes:
            return _event(shell | {"choices": [choice]} | ({"usage": _usage(PROMPT, done)} if told else {}))

        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": None}
        piece = {"delta": {"content": " word"}} if chat else {"text": " word"}
        if chat:
            opening = choice | {"delta": {"role": "assistant", "content": ""}}
            await response.write(event(opening, 0))
        word = choice | piece
        same = event(word, 0)  # if they do not tell how many they are
        together = 1 if self.delay else WITHOUT_PAUSE
        for done in range(0, count - 1, together):
            now = min(together, count - 1 - done)
            await response.write(b"".join(event(word, done + i + 1) for i in range(now)) if told else same * now)
            await asyncio.sleep(self.delay)
        last = event(word | {"finish_reason": "length"}, count)
        if options.get("include_usage"):
            last += _event(shell | {"choices": [], "usage": _usage(PROMPT, count)})
        await response.write(last + b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    async def _arrived(self, request: web.Request) -> dict[str, Any]:
        raw = await request.read()
        if self.judging:
            cases = [int(number) for number in CASE.findall(raw)]
            self.cases.update(cases)
            if fault := violation(request.method, request.raw_path, raw, self.model):
                self.violations.append({"cases": cases, "route": request.raw_path[:80], "fault": fault})
        try:
            body = orjson.loads(raw)
        except orjson.JSONDecodeError:
            return {}
        return body if isinstance(body, dict) else {}


def _shell(chat: bool, model: str, suffix: str) -> dict[str, Any]:
    kind = "chat.completion" if chat else "text_completion"
    return {"id": "cmpl-0", "object": kind + suffix, "created": 1, "model": model}


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


def _json(content: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(content), status=status, content_type="application/json")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=32, help="tokens of an answer that names no max_tokens")
    parser.add_argument("--delay", type=float, default=0.002, help="seconds between two tokens")
    parser.add_argument("--model", default="mock", help="the model's name")
    parser.add_argument("--judge", action="store_true", help="look for faults in what arrives")
    given = parser.parse_args(arguments)
    upstream = Upstream(given.chunks, given.delay, given.model, given.judge)
    gc.freeze()
    uvloop.install()
    web.run_app(
        upstream.application(), host="127.0.0.1", port=given.port, print=None, access_log=None,
        handler_cancellation=True, keepalive_timeout=75,
    )  # fmt: skip


if __name__ == "__main__":
    main()
