"""The OpenAI SDK, both of its last two major versions, against the gateway."""

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from loadtest.gateway.processes import free_port
from tests.e2e.server import Server
from tests.waiting import until

pytestmark = pytest.mark.engine
PREVIOUS_MAJOR = Path(sys.prefix) / "openai-2"  # requirements/install.sh


@pytest.fixture(scope="module")
def narrow(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Another gateway in front of the same engine, which has room for one request and no queue."""
    directory, port = tmp_path_factory.mktemp("narrow"), free_port()
    engine = {"url": f"unix:{server.engine['socket']}"}
    model = {"engines": [engine], "max_concurrency": 1, "max_queue": 0}
    (directory / "gateway.yaml").write_text(json.dumps({"models": {server.model: model}}))
    command = [sys.executable, "-m", "clients.cli", "gateway", "--config", "gateway.yaml", "--port", str(port)]
    with (directory / "gateway.log").open("w") as log:
        process = subprocess.Popen(command, cwd=directory, stdout=log, stderr=log)
    root = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            with urllib.request.urlopen(f"{root}/ready", timeout=5) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    try:
        assert until(ready, 30), (directory / "gateway.log").read_text()
        yield f"{root}/v1"
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module", params=["3", "2"])
def seen(request: pytest.FixtureRequest, server: Server, narrow: str) -> dict:
    """What an application using that major version of the SDK saw."""
    env = dict(os.environ)
    if request.param == "2":
        assert PREVIOUS_MAJOR.is_dir(), f"{PREVIOUS_MAJOR} is missing: make install"
        env["PYTHONPATH"] = str(PREVIOUS_MAJOR)
    script = Path(__file__).with_name("sdk_session.py")
    command = [sys.executable, str(script), server.base_url, server.model, narrow]
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


def test_the_model_has_a_card(seen: dict, server: Server) -> None:
    assert seen["retrieved"] == server.model


def test_request_ids_are_the_clients_or_ours(seen: dict) -> None:
    theirs, parsed, ours = seen["request_ids"]
    assert theirs == parsed == "visit-17"
    assert ours
    assert ours != theirs
    assert seen["raw_usage"] == 2


def test_responses_give_the_same_answer_whole_and_streamed(seen: dict) -> None:
    status, text, tokens = seen["response"]
    assert [status, text] == ["completed", seen["answer"]]
    assert seen["response_streamed"] == ["response.completed", text, tokens]
    assert not seen["response_stored"]


def test_errors_become_the_sdks_exceptions(seen: dict) -> None:
    errors = seen["errors"]
    assert {name: [error["class"], error["status"]] for name, error in errors.items()} == {
        "no such model": ["NotFoundError", 404],
        "no such card": ["NotFoundError", 404],
        "too long": ["BadRequestError", 400],
        "wrong type": ["BadRequestError", 400],
        "closed off": ["BadRequestError", 400],
        "too large": ["APIStatusError", 413],
        "too much": ["BadRequestError", 400],
        "stream of no such model": ["NotFoundError", 404],
        "response of no such model": ["NotFoundError", 404],
    }
    assert {name: error["param"] for name, error in errors.items() if error["status"] == 400} == {
        "too long": "input_tokens",
        "wrong type": "max_tokens",
        "closed off": "chat_template",
        "too much": "n",
    }
    assert errors["no such model"]["code"] == "model_not_found"
    assert errors["too long"]["code"] == "context_length_exceeded"
    assert all(error["request_id"] for error in errors.values())


def test_too_many_requests_are_tried_again_when_the_gateway_said(seen: dict) -> None:
    code, retry_after = seen["limited"]
    assert code == "overloaded"
    assert retry_after >= 1
    assert seen["retried"] == seen["answer"]
    assert seen["retried_after"] > retry_after
