"""What is written down of requests: tokens to the last chunk, once, whatever happens to them."""

import asyncio
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from serving.gateway.accounts import MOST_FAILURES
from serving.gateway.edge import create_server
from serving.tenants import limits
from tests.serving.gateway.doubles import CHAT, DONE, Client, Engine, answers
from tests.serving.gateway.keeping import (
    COMPLETIONS,
    EMBEDDINGS,
    MESSAGES,
    OPENAI,
    PROMPT,
    RESPONSES,
    TOKENIZE,
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


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content, separators=(",", ":")).encode() + b"\n\n"


def told(text: str, completion: int, index: int = 0) -> bytes:
    usage = {"prompt_tokens": 20, "total_tokens": 20 + completion, "completion_tokens": completion}
    return event({"choices": [{"index": index, "delta": {"content": text}}], "usage": usage})


async def tells(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    """As vLLM: the usage with every chunk, if it is asked to. Then it hangs, if the client named a ``user``."""
    if not body.get("stream"):
        return await answers(engine, request, body)
    options = body.get("stream_options", {})
    response = await engine.begin(request)
    pieces = [told("", 0), told("a", 1), told("b", 4)]
    if not options.get("continuous_usage_stats"):
        pieces = [event({"choices": json.loads(piece[6:])["choices"]}) for piece in pieces]
    for piece in pieces:
        await response.write(piece)
    if body["max_tokens"] == 99:
        await asyncio.sleep(30)
    final = {"prompt_tokens": 20, "total_tokens": 25, "completion_tokens": 5}
    await response.write(event({"choices": [], "usage": final}) + DONE)
    return response


async def hangs(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(30)
    raise AssertionError("nobody waits that long")


async def leave_after(client: Client, seen: bytes, headers: dict[str, str], **fields: Any) -> bytes:
    """Leaves a stream when ``seen`` has come."""
    data = b""
    async with client.post(True, headers=headers, **fields) as response:
        while seen not in data:
            data += await response.content.readany()
        response.close()
    return data


@pytest.mark.parametrize("wanted", [None, {"include_usage": True}, {"continuous_usage_stats": True}])
def test_clients_do_not_see_that_every_chunk_is_counted(keeping: Keeping, wanted: Any) -> None:
    async def test() -> None:
        _, secret = keeping.key()
        async with Engine(tells).running() as engine, serving(keeping, engine) as client:
            async with client.post(True, headers=bearer(secret), max_tokens=9, stream_options=wanted) as response:
                data = await response.read()
            assert engine.received[0]["stream_options"]["continuous_usage_stats"] is True
            assert data.count(b'"usage"') == (1 if (wanted or {}).get("include_usage") else 0)
            assert data.startswith(event({"choices": [{"index": 0, "delta": {"content": ""}}]}))
            both = {"include_usage": True, "continuous_usage_stats": True}
            async with client.post(True, headers=bearer(secret), max_tokens=9, stream_options=both) as response:
                assert (await response.read()).count(b'"usage"') == 4
            for record in await records(keeping, 2):
                assert (record.prompt_tokens, record.completion_tokens, record.estimated) == (20, 5, False)
                assert (record.status, record.code, record.stream, record.model) == (200, "", True, "m")

    run(test())


def test_a_stream_that_is_left_is_counted_to_its_last_chunk(keeping: Keeping) -> None:
    async def test() -> None:
        row, secret = keeping.key(metrics=1)
        async with Engine(tells).running() as engine, serving(keeping, engine) as client:
            client.session.headers.update(bearer(secret))
            data = await leave_after(client, b'"b"', bearer(secret), max_tokens=99)
            assert b"usage" not in data
            (record,) = await records(keeping, 1)
            assert (record.prompt_tokens, record.completion_tokens, record.estimated) == (20, 4, False)
            assert (record.status, record.code, record.phase) == (499, "client_left", "streaming")
            assert (record.key, record.tenant, record.attempts, record.replica) == (row["id"], "clinic", 1, "0")
            assert 0 <= record.first_token <= record.seconds
            assert 0 < record.upstream <= record.seconds
            assert await client.metric("tokens_total", kind="completion") == 4
            assert await client.metric("key_tokens_total", kind="completion") == 4

    run(test())


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "ignored"])
def test_engines_that_tell_no_usage_with_chunks_are_counted_by_them(keeping: Keeping, refuses: bool) -> None:
    async def plain(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if refuses and "continuous_usage_stats" in body.get("stream_options", {}):
            error = {"error": {"message": "unknown field stream_options.continuous_usage_stats", "code": 400}}
            return web.json_response(error, status=400)
        body.get("stream_options", {}).pop("continuous_usage_stats", None)
        return await tells(engine, request, body)

    async def test() -> None:
        _, secret = keeping.key(metrics=1)
        async with Engine(plain).running() as engine, serving(keeping, engine) as client:
            client.session.headers.update(bearer(secret))
            for _ in range(2):
                async with client.post(True, headers=bearer(secret), max_tokens=9) as response:
                    assert (await response.read()).endswith(DONE)
            await leave_after(client, b'"b"', bearer(secret), max_tokens=99, messages=PROMPT)
            assert len(engine.received) == 3 + refuses, "it is asked once, and then no more"
            whole, _, left = await records(keeping, 3)
            assert (whole.prompt_tokens, whole.completion_tokens, whole.estimated) == (20, 5, False)
            assert (left.prompt_tokens, left.completion_tokens, left.estimated) == (26, 3, True)
            assert whole.attempts == 1
            assert await client.metric("replica_failures_total") == 0
            assert await client.metric("requests_total", code="200") == 2

    run(test())


def test_a_request_that_had_no_answer_counts_with_its_prompt(keeping: Keeping) -> None:
    async def test() -> None:
        _, secret = keeping.key()
        model = {"timeouts": {"first_byte": 5}, "max_concurrency": 1}
        async with Engine(hangs).running() as engine, serving(keeping, engine, model=model) as client:
            running = client.gateway.pool.requests
            waiting = asyncio.create_task(client.post(headers=bearer(secret), messages=PROMPT).__aenter__())
            assert await eventually(lambda: any(r.phase == "waiting" for r in running))
            queueing = asyncio.create_task(client.post(headers=bearer(secret), messages=PROMPT).__aenter__())
            assert await eventually(lambda: any(r.phase == "queued" for r in running))
            queueing.cancel()
            assert await eventually(lambda: len(running) == 1)
            waiting.cancel()
            assert await eventually(lambda: not running)
            late = {**bearer(secret), "X-Request-Timeout": "0.1"}
            async with client.post(headers=late, messages=PROMPT) as response:
                assert response.status == 504
            queued, left, overdue = await records(keeping, 3)
            assert (queued.status, queued.phase, queued.prompt_tokens, queued.estimated) == (499, "queued", 0, False)
            assert (left.status, left.phase, left.prompt_tokens, left.completion_tokens) == (499, "waiting", 26, 0)
            assert left.estimated
            assert (overdue.status, overdue.code, overdue.prompt_tokens) == (504, "deadline_exceeded", 26)

    run(test())


def test_a_request_counts_once_however_often_it_was_tried(keeping: Keeping) -> None:
    async def fails(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(status=502, text="Traceback: the patient said")

    async def test() -> None:
        _, secret = keeping.key()
        async with (
            Engine(fails).running() as bad,
            Engine().running() as good,
            serving(keeping, bad, good) as client,
        ):
            for _ in range(2):
                async with client.post(headers=bearer(secret)) as response:
                    assert response.status == 200
            found = await records(keeping, 2)
            assert sorted(record.attempts for record in found) == [1, 2]
            assert all((r.prompt_tokens, r.completion_tokens, r.status) == (3, 2, 200) for r in found)
            good.behaviour = fails
            async with client.post(headers=bearer(secret)) as response:
                assert response.status == 503
            failed = (await records(keeping, 3))[2]
            assert (failed.status, failed.code, failed.prompt_tokens) == (503, "engine_unavailable", 0)

    run(test())


@pytest.mark.parametrize(
    ("route", "fields", "said", "expected"),
    [
        (CHAT, {"n": 3}, OPENAI, (4, 9, False)),
        (COMPLETIONS, {"prompt": ["a", "b"], "n": 2}, OPENAI, (4, 9, False)),
        (RESPONSES, {"input": "hi"}, {"input_tokens": 4, "output_tokens": 9}, (4, 9, False)),
        (MESSAGES, {"max_tokens": 9}, {"input_tokens": 4, "output_tokens": 9}, (4, 9, False)),
        (EMBEDDINGS, {"input": ["a", "b"]}, {"prompt_tokens": 4, "total_tokens": 4}, (4, 0, False)),
        (EMBEDDINGS, {"input": "a" * 80}, {}, (20, 0, True)),
        (TOKENIZE, {"prompt": "a" * 80}, {}, (0, 0, False)),
        (COMPLETIONS, {"prompt": "a" * 80}, {}, (20, 31, True)),
    ],
)
def test_every_route_has_its_own_way_to_tell(
    keeping: Keeping, route: str, fields: dict[str, Any], said: dict[str, int], expected: tuple[int, int, bool]
) -> None:
    async def test() -> None:
        _, secret = keeping.key()
        body = {"model": "m", "messages": PROMPT} if route in (CHAT, MESSAGES) else {"model": "m"}
        async with Engine(usage(**said), route).running() as engine, serving(keeping, engine) as client:
            url = client.root + route
            async with client.session.post(url, json=body | fields, headers=bearer(secret)) as response:
                assert response.status == 200
            (record,) = await records(keeping, 1)
            assert (record.prompt_tokens, record.completion_tokens, record.estimated) == expected
            assert record.route == route

    run(test())


def test_the_answers_of_a_stream_that_is_left_are_added_up(keeping: Keeping) -> None:
    async def several(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await engine.begin(request)
        await response.write(told("a", 3, 0) + told("b", 4, 1) + told("c", 5, 0))
        await asyncio.sleep(30)
        return response

    async def test() -> None:
        _, secret = keeping.key()
        async with Engine(several).running() as engine, serving(keeping, engine) as client:
            await leave_after(client, b'"c"', bearer(secret), n=2)
            (record,) = await records(keeping, 1)
            assert (record.prompt_tokens, record.completion_tokens, record.estimated) == (20, 9, False)

    run(test())


@pytest.mark.parametrize("by", ["engine", "shutdown"])
def test_a_stream_that_breaks_off_is_counted_to_its_last_chunk(keeping: Keeping, by: str) -> None:
    async def breaks(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await engine.begin(request)
        await response.write(told("a", 1) + told("b", 4))
        await broken.wait()
        assert request.transport is not None
        request.transport.abort()
        return response

    broken = asyncio.Event()

    async def test() -> None:
        _, secret = keeping.key()
        async with Engine(breaks).running() as engine, serving(keeping, engine) as client:
            async with client.post(True, headers=bearer(secret)) as response:
                data = await response.content.readany()
                if by == "engine":
                    broken.set()
                else:
                    await client.gateway.drain(0)
                data += await response.read()
            assert data.count(b'"error"') == 1
            (record,) = await records(keeping, 1)
            assert (record.status, record.phase) == (503, "streaming")
            assert record.code == ("engine_unavailable" if by == "engine" else "shutting_down")
            assert (record.prompt_tokens, record.completion_tokens, record.estimated) == (20, 4, False)

    run(test())


# Every way out.


def test_leave_is_given_back_once_whatever_happens(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    given_back: list[int] = []
    done = limits.Grant.done

    def counted(grant: limits.Grant, tokens: int) -> None:
        given_back.append(tokens)
        done(grant, tokens)

    monkeypatch.setattr(limits.Grant, "done", counted)

    async def busy(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "wrong"}}, status=400)

    async def test() -> None:
        _, secret = keeping.key(concurrency=1, requests_per_minute=100, tokens_per_minute=100_000)
        async with Engine(tells).running() as engine, serving(keeping, engine) as client:
            own = bearer(secret)
            async with client.post(headers=own) as response:
                assert response.headers["x-ratelimit-limit-requests"] == "100"
                await response.read()
            async with client.post(True, headers=own, max_tokens=9) as response:
                assert "x-ratelimit-remaining-tokens" in response.headers
                await response.read()
            await leave_after(client, b'"b"', own, max_tokens=99)
            assert await eventually(lambda: len(given_back) == 3)
            assert given_back == [5, 25, 24]

            engine.behaviour = hangs
            task = asyncio.create_task(client.post(headers=own).__aenter__())
            assert await eventually(lambda: client.gateway.running == 1)
            async with client.post(headers=own) as response:
                assert response.status == 429
                assert response.headers["Retry-After"]
            task.cancel()
            assert await eventually(lambda: len(given_back) == 4)

            engine.behaviour = busy
            async with client.post(headers=own) as response:
                assert response.status == 400
            engine.behaviour = hangs
            task = asyncio.create_task(client.post(headers=own).__aenter__())
            assert await eventually(lambda: client.gateway.running == 1)
            await client.gateway.drain(0)
            response = await task
            assert (response.status, (await response.json())["error"]["code"]) == (503, "shutting_down")
            response.release()
            assert len(given_back) == 6
            statuses = [record.status for record in await records(keeping, 7)]
            assert statuses == [200, 200, 499, 429, 499, 400, 503]

    run(test())


def test_without_room_for_records_nothing_new_is_taken(keeping: Keeping) -> None:
    async def test() -> None:
        _, secret = keeping.key()
        async with Engine().running() as engine, serving(keeping, engine) as client:
            journal = client.gateway.accounts._journal
            assert journal is not None
            journal.room = False
            async with client.post(headers=bearer(secret)) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "accounting_unavailable")
                assert response.headers["Retry-After"]
            assert not engine.received
            journal.room = True
            async with client.post(headers=bearer(secret)) as response:
                assert response.status == 200

    run(test())


def test_a_gateway_that_cannot_begin_to_write_down_takes_requests_as_soon_as_it_can(keeping: Keeping) -> None:
    async def test() -> None:
        _, secret = keeping.key()
        keeping.journal.rmdir()
        async with Engine().running() as engine, serving(keeping, engine) as client:
            async with client.post(headers=bearer(secret)) as response:
                assert (response.status, (await response.json())["error"]["code"]) == (503, "accounting_unavailable")
            keeping.journal.mkdir()
            assert await eventually(lambda: any(keeping.journal.iterdir()))
            async with client.post(headers=bearer(secret)) as response:
                assert response.status == 200
            assert [record.status for record in await records(keeping, 1)] == [200]

    run(test())


def test_guessing_keys_does_not_fill_the_disk(keeping: Keeping) -> None:
    async def test() -> None:
        keeping.key()
        async with Engine().running() as engine, serving(keeping, engine) as client:
            accounts = client.gateway.accounts
            accounts._failures, accounts._failures_since = 4, time.monotonic() - 20  # half a minute for all of these
            for i in range(30):
                async with client.post(headers=bearer(f"ma_{i}")) as response:
                    assert response.status == 401
                    assert response.headers["WWW-Authenticate"] == "Bearer"
                    assert response.headers["X-Request-Id"]
                    assert (await response.json())["error"]["type"] == "authentication_error"
            found = keeping.records()
            assert len(found) == MOST_FAILURES - 4
            told = client.gateway.metrics.auth_failures.labels("unknown")._value.get()
            assert told == 30
            assert {(record.status, record.code, record.key) for record in found} == {(401, "invalid_api_key", "")}
            assert not engine.received

    run(test())


def test_strangers_at_the_admin_listener_do_not_fill_the_disk(keeping: Keeping) -> None:
    async def test() -> None:
        keeping.key()
        admin = {"port": 0}
        async with Engine().running() as engine, serving(keeping, engine, admin=admin) as client:
            client.gateway.accounts._failures_since = time.monotonic() + 100
            server = create_server(client.gateway, client.gateway.pool.settings.http, admit=client.gateway.admit)
            with socket.create_server(("127.0.0.1", 0)) as listener:
                await server.start([], [listener])
                for _ in range(30):
                    root = f"http://127.0.0.1:{listener.getsockname()[1]}"
                    async with client.session.post(root + CHAT, json={}) as response:
                        assert response.status == 404
                await server.stop()
            assert len(keeping.records()) == MOST_FAILURES

    run(test())
