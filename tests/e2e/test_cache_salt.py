"""A prefix cache tells no tenant what another has sent: by a real engine's own count of hits."""

import asyncio
import itertools
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import Server
from tests.e2e.tenants import tenants
from tests.serving.gateway.doubles import Client
from tests.serving.gateway.keeping import bearer

pytestmark = pytest.mark.engine

WORDS = ["asthma", "cough", "fever", "dose", "knee", "blood", "heart", "sleep", "pain", "lung", "skin", "bone"]


def long_text(seed: int) -> str:
    """A prompt of several of the engine's blocks that nobody has sent yet."""
    chance = random.Random(f"salt {seed}")
    return " ".join(chance.choices(WORDS, k=250))


ROUTES: dict[str, Callable[[str], dict[str, Any]]] = {
    "/v1/chat/completions": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
    "/v1/completions": lambda text: {"prompt": text, "max_tokens": 1},
    "/v1/responses": lambda text: {"input": text, "max_output_tokens": 1},
    "/v1/messages": lambda text: {"messages": [{"role": "user", "content": text}], "max_tokens": 1},
}


@pytest.fixture
def hits(server: Server) -> Callable[[], float]:
    return lambda: server.engine_metric("prefix_cache_hits_total")


@pytest.fixture
def seeds() -> Iterator[int]:
    return itertools.count(random.SystemRandom().randrange(2**32))


async def send(client: Client, key: str, route: str, body: dict[str, Any]) -> None:
    async with client.session.post(client.root + route, json=body, headers=bearer(key)) as response:
        assert response.status == 200, await response.text()
        await response.read()


@pytest.mark.parametrize("route", ROUTES)
def test_another_tenants_prompt_is_no_hit_and_ones_own_is(
    server: Server, hits: Callable[[], float], seeds: Iterator[int], tmp_path: Path, route: str
) -> None:
    async def test() -> None:
        async with tenants(server, tmp_path) as (client, _, (one, two)):
            body = {"model": server.model, **ROUTES[route](long_text(next(seeds)))}
            await send(client, one, route, body)
            before = hits()
            await send(client, two, route, body)
            assert hits() == before, "a second tenant can tell that a first has sent the same"
            await send(client, one, route, body)
            assert hits() >= before + 64, "a tenant's own prompt is computed again"
            between = hits()
            await send(client, two, route, body)
            assert hits() >= between + 64

    asyncio.run(asyncio.wait_for(test(), 120))


def test_without_salts_another_tenants_prompt_is_a_hit(
    server: Server, hits: Callable[[], float], seeds: Iterator[int], tmp_path: Path
) -> None:
    async def test() -> None:
        async with tenants(server, tmp_path, cache_salts=False) as (client, _, (one, two)):
            route = "/v1/completions"
            body = {"model": server.model, **ROUTES[route](long_text(next(seeds)))}
            await send(client, one, route, body)
            before = hits()
            await send(client, two, route, body)
            assert hits() >= before + 64

    asyncio.run(asyncio.wait_for(test(), 120))
