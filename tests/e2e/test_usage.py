"""Tokens as a real engine counts them, whether or not its streams are read to their end."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.server import Server
from tests.e2e.tenants import tenants
from tests.serving.gateway.keeping import bearer, records

pytestmark = pytest.mark.engine

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "What helps against a cough?"}]}
PROMPT: dict[str, Any] = {"prompt": "A cough"}
PROMPTS: dict[str, Any] = {"prompt": ["A cough", "Some fever"]}
SAME = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "stream": True}


def told(stream: str) -> tuple[dict[int, str], set[str], list[Any]]:
    """The texts of a stream, the forms of its chunks, and what it says was used. The engine puts the tokens into one
    chunk that it could not send in time, so that not even the same stream has always the same chunks."""
    texts: dict[int, str] = {}
    forms, used = set(), []
    for line in stream.splitlines():
        if line.startswith("data: {"):
            chunk = json.loads(line[6:])
            forms.add(",".join(chunk))
            used += [chunk["usage"]] if "usage" in chunk else []
            for choice in chunk["choices"]:
                text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                texts[choice["index"]] = texts.get(choice["index"], "") + text
    return texts, forms, used


@pytest.mark.parametrize("usage", [None, {"include_usage": True}], ids=["no usage", "usage"])
@pytest.mark.parametrize(
    ("path", "fields"), [("/v1/chat/completions", CHAT), ("/v1/completions", {"prompt": ["A cough", "Some fever"]})]
)
def test_counting_every_chunk_changes_nothing_for_the_client(
    server: Server, tmp_path: Path, path: str, fields: dict[str, Any], usage: Any
) -> None:
    async def test() -> None:
        async with tenants(server, tmp_path, cache_salts=False) as (client, keeping, (key, _)):
            body = {"model": server.model, "stream_options": usage, **fields, **SAME}
            async with client.session.post(client.root + path, json=body, headers=bearer(key)) as response:
                counted = await response.text()
            async with client.session.post(server.root + path, json=body) as response:
                plain = await response.text()
            assert told(counted) == told(plain)
            assert counted.count('"usage"') == (usage is not None)
            (record,) = await records(keeping, 1)
            assert record.completion_tokens == 12 * (2 if "prompt" in fields else 1)
            assert not record.estimated

    asyncio.run(asyncio.wait_for(test(), 120))


@pytest.mark.parametrize(("path", "fields"), [("/v1/chat/completions", CHAT), ("/v1/completions", PROMPT)])
def test_a_stream_that_is_left_is_counted_as_far_as_it_was_sent(
    server: Server, tmp_path: Path, path: str, fields: dict[str, Any]
) -> None:
    async def test() -> None:
        async with tenants(server, tmp_path) as (client, keeping, (key, _)):
            body = {"model": server.model, **fields, **SAME, "max_tokens": 900}
            seen = b""
            async with client.session.post(client.root + path, json=body, headers=bearer(key)) as response:
                while seen.count(b"data: ") < 20:
                    seen += await response.content.readany()
                response.close()
            (record,) = await records(keeping, 1)
            assert (record.status, record.estimated) == (499, False)
            # What was on its way to the client is counted as well; some chunks have no text of their own.
            assert 18 <= record.completion_tokens < 900
            whole = {"model": server.model, **fields, "max_tokens": 1}
            async with client.session.post(client.root + path, json=whole, headers=bearer(key)) as response:
                told = json.loads(await response.text())["usage"]
            assert record.prompt_tokens == told["prompt_tokens"]

    asyncio.run(asyncio.wait_for(test(), 120))
