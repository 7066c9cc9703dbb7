"""Limits as clients meet them: requests to a gateway, OpenAI's own client among them."""

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from aiohttp import web

from serving.tenants.windows import SPAN
from tests.serving.gateway.doubles import Engine, answers
from tests.serving.gateway.keeping import Keeping, bearer, records, serving


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


async def slowly(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    await asyncio.sleep(0.2)
    return await answers(engine, request, body)


@pytest.fixture
def keeping(tmp_path: Path) -> Keeping:
    return Keeping(tmp_path)


@pytest.mark.parametrize("stream", [False, True])
def test_every_answer_says_how_the_key_stands(keeping: Keeping, stream: bool) -> None:
    async def test() -> None:
        _, secret = keeping.key(requests_per_minute=2, tokens_per_minute=1000)
        async with Engine().running() as engine, serving(keeping, engine) as client:
            for left in (1, 0):
                async with client.post(stream, headers=bearer(secret), max_tokens=100) as response:
                    await response.read()
                    assert response.status == 200
                    assert response.headers["x-ratelimit-limit-requests"] == "2"
                    assert response.headers["x-ratelimit-remaining-requests"] == str(left)
                    assert response.headers["x-ratelimit-reset-requests"].startswith("1m")
                    assert response.headers["x-ratelimit-limit-tokens"] == "1000"
                    # Of those before, what was used: 5 tokens each.
                    assert 1000 - 150 < int(response.headers["x-ratelimit-remaining-tokens"]) + 5 * (1 - left) < 900
            async with client.post(stream, headers=bearer(secret), max_tokens=100) as response:
                error = (await response.json())["error"]
                assert response.status == 429
                assert (error["type"], error["code"], error["param"]) == (
                    "rate_limit_error", "rate_limit_exceeded", None,
                )  # fmt: skip
                assert 0 < int(response.headers["Retry-After"]) <= SPAN
                assert 0 < int(response.headers["retry-after-ms"]) <= SPAN * 1000
                assert response.headers["x-ratelimit-remaining-requests"] == "0"
                assert response.headers["x-ratelimit-remaining-tokens"] == "990"
            assert len(engine.received) == 2
            assert [r.code for r in await records(keeping, 3)] == ["", "", "rate_limit_exceeded"]

    run(test())


def test_what_fails_gives_its_tokens_back(keeping: Keeping) -> None:
    async def test() -> None:
        _, secret = keeping.key(tokens_per_minute=1000, concurrency=1)
        async with serving(keeping, models={"m": {"engines": [{"url": "http://127.0.0.1:1"}]}}) as client:
            for _ in range(3):
                async with client.post(headers=bearer(secret), max_tokens=900) as response:
                    assert response.status == 503

    run(test())


def test_a_client_of_openais_does_not_come_again_in_vain(keeping: Keeping) -> None:
    async def test() -> None:
        _, small = keeping.key(tokens_per_minute=100)
        _, spent = keeping.key(tokens_per_month=0)
        async with Engine().running() as engine, serving(keeping, engine) as client:
            for secret, code in ((small, "request_too_large"), (spent, "insufficient_quota")):
                async with openai.AsyncOpenAI(api_key=secret, base_url=f"{client.root}/v1", max_retries=3) as theirs:
                    with pytest.raises(openai.RateLimitError) as caught:
                        await theirs.chat.completions.create(
                            model="m", messages=[{"role": "user", "content": "a"}], max_tokens=500
                        )
                    assert caught.value.code == code
            assert caught.value.type == "insufficient_quota"
            assert not engine.received
            assert [r.status for r in await records(keeping, 2)] == [429, 429]

    run(test())


def test_a_client_of_openais_comes_again_when_there_is_room(keeping: Keeping) -> None:
    async def test() -> None:
        _, secret = keeping.key(concurrency=1)
        async with Engine(slowly).running() as engine, serving(keeping, engine) as client:
            async with openai.AsyncOpenAI(api_key=secret, base_url=f"{client.root}/v1", max_retries=8) as theirs:
                got = await asyncio.gather(
                    *[
                        theirs.chat.completions.create(model="m", messages=[{"role": "user", "content": "a"}])
                        for _ in range(4)
                    ]
                )
            assert len(got) == len(engine.received) == 4
            assert 429 in [record.status for record in keeping.records()]

    run(test())
