"""What keys change about requests: whether they are taken, what engines are told, and who reads along."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from serving.gateway import relay, settlement
from tests.serving.gateway import raw_client
from tests.serving.gateway.doubles import CHAT, DONE, USAGE_EVENT, Client, Engine, answers, chunk, gateway_for
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


# Keys.


def test_a_key_that_is_revoked_ends_no_stream_and_begins_none(keeping: Keeping) -> None:
    async def slow(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        response = await engine.begin(request)
        await response.write(chunk("a"))
        await engine_may_end.wait()
        await response.write(chunk("b") + USAGE_EVENT + DONE)
        return response

    engine_may_end = asyncio.Event()

    async def test() -> None:
        row, secret = keeping.key()
        async with Engine(slow).running() as engine, serving(keeping, engine) as client:
            async with client.post(True, headers=bearer(secret)) as response:
                await response.content.readany()
                row["revoked"] = int(time.time())
                keeping.tell()

                async def status() -> int:
                    async with client.session.get(client.root + "/v1/models", headers=bearer(secret)) as answer:
                        return answer.status

                for _ in range(50):
                    if await status() == 401:
                        break
                    await asyncio.sleep(0.1)
                assert await status() == 401
                async with client.post(headers=bearer(secret)) as refused:
                    assert refused.status == 401
                engine_may_end.set()
                assert (await response.read()).endswith(DONE)
            assert [record.status for record in await records(keeping, 2)] == [401, 200]

    run(test())


def head(path: str, secret: str, size: int) -> bytes:
    lines = (f"POST {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {secret}", f"Content-Length: {size}")
    return ("\r\n".join((*lines, "Content-Type: application/json")) + "\r\n\r\n").encode()


@pytest.mark.parametrize(
    ("path", "changes", "refusal"),
    [
        (CHAT, {"revoked": 5}, (401, "invalid_api_key")),
        (CHAT, {"expires": 5}, (401, "invalid_api_key")),
        (CHAT, {"models": '["other"]'}, (403, "model_not_allowed")),
        ("/admin/keys", {"revoked": 5}, (401, "invalid_api_key")),
        ("/admin/keys", {"admin": 0}, (403, "insufficient_scope")),
    ],
)
def test_a_slow_body_is_answered_by_what_the_key_may_at_its_end(
    keeping: Keeping, path: str, changes: dict[str, Any], refusal: tuple[int, str]
) -> None:
    body = json.dumps({"model": "m", "messages": PROMPT}).encode()

    async def test() -> None:
        row, secret = keeping.key(admin=1)
        async with Engine().running() as engine, serving(keeping, engine) as client:
            port = int(client.root.rsplit(":", 1)[1])
            raw = raw_client.Client(*await asyncio.open_connection("127.0.0.1", port))
            raw.send(head(path, secret, len(body)) + body[:5])
            assert await eventually(lambda: client.server.buffered == 5)  # it was let in
            row |= changes
            keeping.tell()
            assert client.gateway.accounts._keys is not None
            client.gateway.accounts._keys.refresh()
            raw.send(body[5:])
            status, _, answer = await raw.response()
            assert (status, json.loads(answer)["error"]["code"]) == refusal
            raw.writer.close()
            assert not engine.received
            if path == CHAT:
                assert [(r.status, r.code, r.key) for r in await records(keeping, 1)] == [(*refusal, row["id"])]

    run(test())


@pytest.mark.parametrize("pipelined", [True, False], ids=["pipelined", "queued"])
def test_requests_that_wait_end_with_their_key(keeping: Keeping, pipelined: bool) -> None:
    async def held(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        await may_end.wait()
        return await answers(engine, request, body)

    may_end = asyncio.Event()
    body = json.dumps({"model": "m", "messages": PROMPT}).encode()

    async def test() -> None:
        row, secret = keeping.key()
        _, other = keeping.key()
        model = {"max_concurrency": 1}
        async with Engine(held).running() as engine, serving(keeping, engine, model=model) as client:
            port = int(client.root.rsplit(":", 1)[1])
            first = raw_client.Client(*await asyncio.open_connection("127.0.0.1", port))
            second = first if pipelined else raw_client.Client(*await asyncio.open_connection("127.0.0.1", port))
            first.send(head(CHAT, secret, len(body)) + body)
            assert await eventually(lambda: len(engine.received) == 1)
            second.send(head(CHAT, secret, len(body)) + body)
            scheduler = client.gateway.pool.models["m"].scheduler
            assert await eventually(lambda: client.server.buffered > 0 if pipelined else len(scheduler.waiting) == 1)
            row["revoked"] = 5
            keeping.tell()
            assert client.gateway.accounts._keys is not None
            client.gateway.accounts._keys.refresh()
            may_end.set()
            assert (await first.response())[0] == 200
            status, _, answer = await second.response()
            assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")
            async with client.post(headers=bearer(other)) as response:  # its place is free
                assert response.status == 200
            assert len(engine.received) == 2
            for raw in {first, second}:
                raw.writer.close()

    run(test())


def test_a_key_may_use_the_models_that_it_names(keeping: Keeping) -> None:
    async def test() -> None:
        _, secret = keeping.key(models='["m","nick"]')
        _, both = keeping.key(models='["m","other"]')
        async with Engine().running() as engine, gateway_for(
            accounts=keeping.accounts,
            models={"m": {"engines": [{"url": engine.url}]}, "other": {"engines": [{"url": engine.url + "/v1/"}]}},
            aliases={"nick": "other", "mixed": {"m": 1, "other": 1}, "hidden": "other"},
        ) as client:  # fmt: skip

            async def ask(key: str, model: str) -> tuple[int, str | None]:
                async with client.post(headers=bearer(key), model=model) as response:
                    content = await response.json()
                    return response.status, content.get("error", {}).get("code")

            async def listed(key: str) -> set[str]:
                async with client.session.get(client.root + "/v1/models", headers=bearer(key)) as response:
                    return {card["id"] for card in (await response.json())["data"]}

            assert await ask(secret, "m") == (200, None)
            assert await ask(secret, "nick") == (200, None), "an alias that is named needs nothing else"
            for model in ("other", "hidden", "mixed"):
                assert await ask(secret, model) == (403, "model_not_allowed")
            assert await ask(secret, "nosuch") == (404, "model_not_found")
            assert await listed(secret) == {"m", "nick"}
            for _ in range(8):
                assert await ask(both, "mixed") == (200, None), "it may use all that the alias stands for"
            assert await listed(both) == {"m", "other", "nick", "mixed", "hidden"}
            async with client.session.get(client.root + "/v1/models/other", headers=bearer(secret)) as response:
                assert response.status == 404

    run(test())


def test_metrics_by_key_are_bounded(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settlement, "MOST_KEYS", 2)

    async def test() -> None:
        keys = [keeping.key(metrics=1) for _ in range(4)]
        async with Engine().running() as engine, serving(keeping, engine) as client:
            for _, secret in keys:
                async with client.post(headers=bearer(secret)) as response:
                    await response.read()
            client.session.headers.update(bearer(keys[0][1]))
            assert await client.metric("key_requests_total", status="2xx") == 4
            assert await client.metric("key_requests_total", key="other") == 2
            assert await client.metric("key_tokens_total", key="other", kind="prompt") == 6
            async with client.session.get(client.root + "/metrics") as response:
                text = await response.text()
            assert not any(row["id"] in text for row, _ in keys)

    run(test())


# Salts.


async def salts(client: Client, engine: Engine, key: str, route: str = CHAT, **fields: Any) -> str | None:
    body = {"model": "m", "messages": PROMPT} if route in (CHAT, MESSAGES) else {"model": "m"}
    async with client.session.post(client.root + route, json=body | fields, headers=bearer(key)) as response:
        assert response.status == 200, await response.text()
    salt: str | None = engine.received[-1].get("cache_salt")
    return salt


def test_prompts_are_salted_by_tenant(keeping: Keeping) -> None:
    async def test() -> None:
        secrets = [keeping.key(tenant)[1] for tenant in ("one", "one", "two")]
        model = {"limits": {"allow": ["cache_salt"]}}
        asked: list[tuple[str, dict[str, Any]]] = [
            (CHAT, {}),
            (COMPLETIONS, {"prompt": "a"}),
            (RESPONSES, {"input": "a"}),
            (MESSAGES, {"max_tokens": 9}),
            (EMBEDDINGS, {"input": "a"}),
        ]
        routes = [route for route, _ in asked[1:]]
        engine = Engine(usage(**OPENAI), *routes, TOKENIZE)
        async with engine.running(), serving(keeping, engine, model=model) as client:
            for route, fields in asked:
                first, same, other = [await salts(client, engine, secret, route, **fields) for secret in secrets]
                assert first
                assert first == same != other
            theirs = await salts(client, engine, secrets[2])
            chosen = await salts(client, engine, secrets[0], cache_salt=theirs)
            assert chosen not in (theirs, first), "nobody can choose another tenant's salt"
            assert chosen == await salts(client, engine, secrets[1], cache_salt=theirs)
            row = keeping.rows[2]
            assert await salts(client, engine, secrets[0], cache_salt=row["cache_salt"]) != theirs
            assert await salts(client, engine, secrets[0], TOKENIZE, prompt="a") is None

    run(test())


@pytest.mark.parametrize("where", ["gateway", "model"])
def test_salts_can_be_left_out(keeping: Keeping, where: str) -> None:
    async def test() -> None:
        _, secret = keeping.key()
        off: dict[str, Any] = {"cache_salts": False} if where == "gateway" else {"model": {"cache_salts": False}}
        async with Engine().running() as engine, serving(keeping, engine, **off) as client:
            assert await salts(client, engine, secret) is None

    run(test())


def test_an_engine_that_takes_no_salts_says_what_to_set(keeping: Keeping) -> None:
    async def strict(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "extra field: cache_salt"}}, status=422)

    async def test() -> None:
        _, secret = keeping.key()
        async with (
            Engine(strict).running() as engine,
            serving(keeping, engine) as client,
            client.post(headers=bearer(secret)) as response,
        ):
            assert response.status == 502
            assert "models.m.cache_salts" in (await response.json())["error"]["message"]

    run(test())


def test_prefixes_of_tenants_do_not_mix_in_routing(keeping: Keeping, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, ...]] = []
    job = relay.Job

    def watched(**fields: Any) -> Any:
        seen.append(fields["prefixes"])
        return job(**fields)

    monkeypatch.setattr(relay, "Job", watched)

    async def test() -> None:
        secrets = [keeping.key(tenant)[1] for tenant in ("one", "one", "two")]
        async with Engine().running() as engine, serving(keeping, engine) as client:
            for secret in secrets:
                async with client.post(headers=bearer(secret), messages=PROMPT) as response:
                    await response.read()

    run(test())
    assert seen[0]
    assert seen[0] == seen[1]
    assert not set(seen[0]) & set(seen[2])


# Captures.


@pytest.mark.parametrize(("left", "captured"), [(100, True), (-1, False)], ids=["open", "expired"])
def test_bodies_are_captured_while_there_is_an_order(keeping: Keeping, left: int, captured: bool) -> None:
    async def test() -> None:
        row, secret = keeping.key()
        _, uncaptured = keeping.key()
        order = {"id": "cap_1", "key": row["id"], "recipient": "09" + "00" * 31, "expires": time.time() + left}
        keeping.captures.append(order)
        keeping.tell()
        folder = keeping.accounts.parent / "captures"
        async with Engine().running() as engine, serving(keeping, engine) as client:
            for key in (secret, uncaptured):
                for stream in (False, True):
                    async with client.post(stream, headers=bearer(key)) as response:
                        await response.read()
            found = await records(keeping, 4)
            assert [record.captured for record in found] == [captured, captured, False, False]
            assert await eventually(lambda: len([f for f in folder.rglob("*") if f.is_file()]) == 2 * captured)

    run(test())
