"""The OpenAI SDK, both of its last two major versions, against the gateway."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.server import Server

pytestmark = pytest.mark.engine
PREVIOUS_MAJOR = Path(sys.prefix) / "openai-2"  # requirements/install.sh


@pytest.fixture(scope="module", params=["3", "2"])
def seen(request: pytest.FixtureRequest, server: Server) -> dict:
    """What an application using that major version of the SDK saw."""
    env = dict(os.environ)
    if request.param == "2":
        assert PREVIOUS_MAJOR.is_dir(), f"{PREVIOUS_MAJOR} is missing: make install"
        env["PYTHONPATH"] = str(PREVIOUS_MAJOR)
    script = Path(__file__).with_name("sdk_session.py")
    command = [sys.executable, str(script), server.base_url, server.model]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    result: dict = json.loads(done.stdout)
    assert result["version"].startswith(request.param + ".")
    return result


def test_lists_the_model(seen: dict, server: Server) -> None:
    assert seen["models"] == [server.model]


def test_chat_answers_and_stops_by_itself(seen: dict) -> None:
    assert "asthma" in seen["answer"].lower()
    assert seen["finish_reason"] == "stop"
    assert seen["usage_adds_up"]


def test_a_stream_gives_the_same_answer_and_usage(seen: dict) -> None:
    assert seen["streamed"] == seen["answer"]
    assert seen["stream_usage_equal"]
    assert seen["chunks"] > 5


def test_sync_and_async_agree(seen: dict) -> None:
    assert seen["async"] == [seen["answer"]] * 3


def test_logprobs_and_max_tokens(seen: dict) -> None:
    assert seen["max_tokens"] == [5, "length"]
    assert len(seen["logprobs"]) == 5
    assert all(logprob <= 0 and alternatives == 2 for logprob, alternatives in seen["logprobs"])


def test_stop_cuts_the_answer_before_the_stop_string(seen: dict) -> None:
    assert seen["answer"].startswith(seen["stopped"])
    assert " and" in seen["answer"]
    assert " and" not in seen["stopped"]


def test_seed_repeats_a_sample(seen: dict) -> None:
    first, again, other = seen["seeded"]
    assert first == again
    assert first != other


def test_n_gives_that_many_choices(seen: dict) -> None:
    assert seen["n"] == [0, 1, 2]


def test_json_schema_is_followed_and_ends(seen: dict) -> None:
    value = json.loads(seen["json"])
    assert set(value) == {"topic", "urgent", "score"}
    assert isinstance(value["urgent"], bool)


def test_completions_plain_and_streamed(seen: dict) -> None:
    text, logprobs = seen["completion"]
    assert text
    assert logprobs == 6
    assert seen["completion_streamed"] == text


def test_errors_become_the_sdks_exceptions(seen: dict) -> None:
    assert seen["not_found"] == "model_not_found"
    assert seen["too_long"] == "context_length_exceeded"
