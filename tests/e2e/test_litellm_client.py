"""LiteLLM's library as a client of the gateway: it can stand in front of us."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import suites
from tests.e2e.server import Server

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def seen(server: Server) -> dict[str, Any]:
    """What an application that uses LiteLLM saw."""
    done = suites.run(Path(__file__).with_name("litellm_session.py"), server.base_url, server.model)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def test_answers_agree_whole_streamed_and_asynchronous(seen: dict[str, Any]) -> None:
    assert "asthma" in seen["answer"].lower()
    assert seen["finish_reason"] == "stop"
    assert [seen["streamed"], *seen["async"]] == [seen["answer"]] * 3
    assert seen["chunks"] > 5
    assert seen["completion"]
    assert seen["completion_streamed"] == seen["completion"]


def test_usage_is_the_engines_count(seen: dict[str, Any]) -> None:
    prompt, completion, total = seen["usage"]
    assert prompt > 0
    assert prompt + completion == total
    assert seen["stream_usage"] == seen["usage"]


def test_logprobs_and_schemas_get_through(seen: dict[str, Any]) -> None:
    assert seen["logprobs"] == [2] * 5
    assert isinstance(json.loads(seen["json"])["urgent"], bool)


def test_refusals_become_litellms_exceptions(seen: dict[str, Any]) -> None:
    assert seen["errors"] == {
        "no such model": ["NotFoundError", 404],
        "stream of no such model": ["NotFoundError", 404],
        "too long": ["ContextWindowExceededError", 400],
        "wrong type": ["BadRequestError", 400],
    }


def test_it_talks_to_nobody_else(seen: dict[str, Any]) -> None:
    assert seen["elsewhere"] == []
