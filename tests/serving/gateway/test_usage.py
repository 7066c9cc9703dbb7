"""What counts as the usage of an answer: what the engine tells in its own place, and nothing that a client wrote."""

import asyncio
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from serving.gateway.relay import KEY, Request
from serving.gateway.stream import Events
from serving.gateway.usage import Usage
from serving.tenants.key import NOBODY
from serving.tenants.record import MOST_TOKENS
from tests.serving.gateway.doubles import CHAT, DONE, USAGE_EVENT, Engine, gateway_for
from tests.serving.gateway.keeping import (
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    PROMPT,
    RESPONSES,
    Keeping,
    bearer,
    records,
    serving,
    usage,
)
from tests.waiting import eventually


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


@pytest.fixture
def keeping(tmp_path: Path) -> Keeping:
    return Keeping(tmp_path)


def packed(content: Any) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode()


def event(content: Any, name: str = "") -> bytes:
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + packed(content) + b"\n\n"


# What clients write.

FREE = {"input_tokens": 0, "output_tokens": 0, "prompt_tokens": 0, "completion_tokens": 0}
DEAR = dict.fromkeys(FREE, 2**63)
TOLD = {"input_tokens": 4, "output_tokens": 9}
SCHEMA = {"type": "object", "properties": {"usage": {"type": "object", "enum": [{"usage": FREE}, {"usage": DEAR}]}}}


async def echoes(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """As vLLM's /v1/responses: the request's tools are in its first event and in its last. It hangs between them, if it
    is asked for one token."""
    begun = {"id": "x", "tools": body["tools"], "text": body.get("text"), "usage": None}
    ended = {"id": "x", "usage": TOLD, "output": [], "tools": body["tools"], "text": body.get("text")}
    if not body.get("stream"):
        return web.json_response(ended, dumps=lambda content: packed(content).decode())
    response = await engine.begin(request)
    await response.write(event({"type": "response.created", "response": begun}, "response.created"))
    await response.write(event({"type": "response.output_text.delta", "delta": "a"}, "response.output_text.delta"))
    if body["max_output_tokens"] == 1:
        await asyncio.sleep(30)
    await response.write(event({"type": "response.completed", "response": ended}, "response.completed"))
    return response


@pytest.mark.parametrize("way", ["plain", "stream", "left"])
def test_tools_that_are_echoed_are_not_taken_for_the_usage(keeping: Keeping, way: str) -> None:
    async def test() -> None:
        _, secret = keeping.key()
        body = {
            "model": "m",
            "input": PROMPT,
            "stream": way != "plain",
            "max_output_tokens": 1 if way == "left" else 9,
            "tools": [{"type": "function", "name": "usage", "parameters": SCHEMA}],
            "text": {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA}},
        }
        async with Engine(echoes, RESPONSES).running() as engine, serving(keeping, engine) as client:
            async with client.session.post(client.root + RESPONSES, json=body, headers=bearer(secret)) as response:
                assert response.status == 200, await response.text()
                data = b""
                while b"delta" not in data and way == "left":
                    data += await response.content.readany()
                if way != "left":
                    data = await response.read()
                response.close()
            assert b'"usage":{"input_tokens":0,' in data.replace(b" ", b""), "the client did get its own back"
            (record,) = await records(keeping, 1)
            if way == "left":
                assert record.estimated
                assert record.prompt_tokens >= 26
                assert 1 <= record.completion_tokens <= 2, "events"
            else:
                assert (record.prompt_tokens, record.completion_tokens, record.estimated) == (4, 9, False)

    run(test())


def test_the_arguments_of_a_call_are_not_taken_for_the_usage() -> None:
    for arguments in ({"usage": FREE}, {"usage": DEAR}):
        answer = {
            "content": [{"type": "tool_use", "name": "f", "input": arguments}],
            "usage": TOLD,
            "more": {"usage": FREE},
        }
        plain = Usage()
        plain.read_answer(MESSAGES, packed(answer))
        assert (plain.prompt_tokens, plain.completion_tokens) == (4, 9)
        stream = Usage()
        events = Events(MESSAGES, False, stream)
        begin = {"type": "message_start", "message": {"content": [], "usage": {"input_tokens": 4, "output_tokens": 1}}}
        call = {"type": "content_block_start", "content_block": {"type": "tool_use", "name": "f", "input": arguments}}
        pieces = [
            event(begin, "message_start"),
            event(call, "content_block_start"),
            event({"delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 9}}, "message_delta"),
            event(call, "content_block_start"),
            event({}, "message_stop"),
        ]
        assert b"".join(map(events.feed, pieces)) == b"".join(pieces)
        assert (stream.prompt_tokens, stream.completion_tokens) == (4, 9)


@pytest.mark.parametrize("by_chunk", [True, False])
def test_what_older_routes_hold_of_clients_is_in_strings(by_chunk: bool) -> None:
    """Arguments of calls, reasoning, echoed prompts, and log-probabilities by the text of a token."""
    told = {"prompt_tokens": 7, "completion_tokens": 2}
    free = packed({"usage": FREE, "choices": []}).decode()
    deltas: list[dict[str, Any]] = [
        {"delta": {"tool_calls": [{"function": {"name": "usage", "arguments": free}}]}},
        {"delta": {"reasoning": free, "content": free}},
        {"text": free, "logprobs": {"tokens": ["usage", free], "top_logprobs": [{"usage": 0.0, free: 0.0}]}},
    ]
    for delta in deltas:
        choice = {"index": 0} | delta
        chunks = [{"choices": [choice]} | ({"usage": told} if by_chunk else {}) for _ in range(2)]
        counted = Usage()
        events = Events(CHAT, True, counted, drop_chunk_usage=by_chunk)
        out = b"".join(events.feed(event(chunk)) for chunk in chunks)
        assert out == b"".join(event({"choices": [choice]}) for _ in chunks), "every byte of theirs is passed on"
        counted.close()
        assert (counted.prompt_tokens, counted.completion_tokens) == ((7, 2) if by_chunk else (None, None))
        whole = Usage()
        whole.read_answer(CHAT, packed({"choices": [choice], "usage": told, "prompt_logprobs": [{"5": {"u": free}}]}))
        assert (whole.prompt_tokens, whole.completion_tokens) == (7, 2)


@pytest.mark.parametrize("count", [str(MOST_TOKENS + 1), str(2**64), "9" * 5000, "-1", "1.5", '"9"', "true", "null"])
def test_counts_that_cannot_be_were_not_told(count: str) -> None:
    for route in (CHAT, RESPONSES):
        told = Usage()
        told.read_answer(route, b'{"usage":{"output_tokens":%s,"input_tokens":1}}' % count.encode())
        assert told.prompt_tokens in (1, None), "some are no JSON at all"
        assert told.completion_tokens is None


def test_a_request_whose_engine_tells_nonsense_is_estimated(keeping: Keeping) -> None:
    async def test() -> None:
        _, secret = keeping.key()
        huge = usage(prompt_tokens=2**63, completion_tokens=2**64, total_tokens=0)
        async with Engine(huge).running() as engine, serving(keeping, engine) as client:
            async with client.post(headers=bearer(secret), messages=PROMPT) as response:
                assert response.status == 200
            (record,) = await records(keeping, 1)
            assert (record.prompt_tokens, record.estimated) == (26, True)
            assert record.completion_tokens < 100

    run(test())


def test_the_usage_of_a_large_answer_is_found_at_its_end() -> None:
    data = {"data": [{"embedding": [0.5] * 200_000}], "usage": {"prompt_tokens": 4, "total_tokens": 4}}
    told = Usage()
    told.read_answer(EMBEDDINGS, packed(data))
    assert (told.prompt_tokens, told.completion_tokens) == (4, None)


# What clients asked for.


@pytest.mark.parametrize("end", [b"", b"\n"], ids=["whole", "cut"])
@pytest.mark.parametrize("per_chunk", [True, False], ids=["every chunk", "the last chunk"])
def test_a_client_that_asked_for_the_usage_gets_it_from_any_engine(per_chunk: bool, end: bytes) -> None:
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    last = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    plain = [event(head | {"choices": [{"index": 0, "delta": {"content": text}}]}) for text in "ab"]
    first = {"usage": last | {"completion_tokens": 1}} if per_chunk else {}
    told = [
        event(head | {"choices": [{"index": 0, "delta": {"content": "a"}}]} | first),
        event(head | {"choices": [{"index": 0, "delta": {"content": "b"}}], "usage": last}),
    ]
    data = b"".join(told) + (DONE[:-1] if end else DONE)
    expected = b"".join(plain) + event(head | {"choices": [], "usage": last}) + DONE
    for cut in range(1, len(data), 7):
        counted = Usage()
        events = Events(CHAT, False, counted, drop_chunk_usage=True)
        out = b"".join(events.feed(data[a:b]) for a, b in itertools.pairwise((0, cut, len(data)))) + events.rest()
        assert out.rstrip() == expected.rstrip()
        counted.close()
        assert (counted.prompt_tokens, counted.completion_tokens) == (3, 2)
    unasked = Events(CHAT, True, Usage(), drop_chunk_usage=True)
    assert unasked.feed(b"".join(told) + DONE) == b"".join(plain) + DONE
    vllm = Events(COMPLETIONS, False, Usage(), drop_chunk_usage=True)
    assert vllm.feed(b"".join(told)) + vllm.feed(USAGE_EVENT + DONE) == b"".join(plain) + USAGE_EVENT + DONE


# What is put down.


@pytest.mark.parametrize("reason", ["left", "shutdown"])
@pytest.mark.parametrize(("content_type", "code"), [(b"application/json", "504"), (b"text/plain", "415")])
def test_an_error_that_is_cut_short_keeps_its_status(content_type: bytes, code: str, reason: str) -> None:
    async def hangs(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(30)
        raise AssertionError("nobody waits that long")

    async def test() -> None:
        sending = asyncio.Event()

        async def receive() -> Any:
            return {"type": "http.request", "body": packed({"model": "m", "messages": PROMPT}), "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sending.set()
                await asyncio.sleep(30)

        async with Engine(hangs).running() as engine, gateway_for(engine) as client:
            pool = client.gateway.pool
            scope = {"headers": [(b"x-request-timeout", b"0.1"), (b"content-type", content_type)], KEY: NOBODY}
            request = Request(pool, CHAT, scope, receive, send)
            task = asyncio.create_task(request.answer())
            assert await eventually(sending.is_set)
            request.abort(reason)
            await task
            assert await client.metric("requests_total", code=code) == 1
            assert await client.metric("requests_total") == 1

    run(test())


def test_refusals_take_no_memory_while_there_is_no_room(keeping: Keeping) -> None:
    async def test() -> None:
        _, secret = keeping.key(metrics=1)
        async with Engine().running() as engine, serving(keeping, engine) as client:
            client.session.headers.update(bearer(secret))
            journal = client.gateway.accounts._journal
            assert journal is not None
            journal.room = False
            async with client.post() as response:
                assert response.status == 503
            async with client.post(model="nosuch") as response:
                assert response.status == 404
            assert not keeping.records()
            assert await client.metric("records_dropped_total") == 2
            assert await eventually(lambda: journal.tick() or journal.room)
            async with client.post() as response:
                assert response.status == 200
            await records(keeping, 1)
            assert await client.metric("records_dropped_total") == 2

    run(test())


def test_a_request_that_ends_after_the_gateway_is_written_down(keeping: Keeping) -> None:
    async def hangs(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(30)
        raise AssertionError("nobody waits that long")

    async def test() -> None:
        _, secret = keeping.key()
        async with Engine(hangs).running() as engine, serving(keeping, engine) as client:
            task = asyncio.create_task(client.post(headers=bearer(secret)).__aenter__())
            assert await eventually(lambda: any(r.phase == "waiting" for r in client.gateway.pool.requests))
            await client.gateway.accounts.stop()
            task.cancel()
            (record,) = await records(keeping, 1)
            assert record.status == 499

    run(test())
