"""The gateway's routes, its errors, and what it does when a client leaves."""

import http.client
import json
import re
import time
from collections.abc import Callable

import pytest

from tests.e2e.server import Server

pytestmark = pytest.mark.engine
CHAT = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


def error_of(body: str) -> dict:
    """The error object, checked to be of OpenAI's shape."""
    error: dict = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("POST", CHAT, b'{"model": ', JSON, 400, "invalid_json"),
        ("POST", CHAT, b"[1, 2]", JSON, 400, "invalid_json"),
        ("POST", CHAT, b"\xff\xfe", JSON, 400, "invalid_json"),
        ("POST", CHAT, b"", JSON, 400, "invalid_json"),
        ("POST", CHAT, b"[" * 100_000, JSON, 400, "invalid_json"),
        ("POST", CHAT, b'{"messages": []}', JSON, 400, "missing_model"),
        ("POST", CHAT, b'{"model": 7}', JSON, 400, "missing_model"),
        ("POST", CHAT, b'{"model": "gpt-4"}', JSON, 404, "model_not_found"),
        ("POST", CHAT, b"{}", {"Content-Type": "text/plain"}, 415, "unsupported_media_type"),
        ("POST", CHAT, b" " * (9 * 2**20), JSON, 413, "request_too_large"),
        ("GET", CHAT, None, {}, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", None, {}, 405, "method_not_allowed"),
        ("GET", "/v1/nothing", None, {}, 404, "not_found"),
        ("GET", "/v1/models/none", None, {}, 404, "model_not_found"),
    ],
)
def test_errors_have_openais_shape(
    server: Server, method: str, path: str, body: bytes | None, headers: dict, status: int, code: str
) -> None:
    actual, text = server.request(method, path, body, headers)
    assert actual == status, text
    assert error_of(text)["code"] == code


def test_a_wrong_field_is_the_clients_error(server: Server) -> None:
    status, text = server.post(CHAT, {"model": server.model, "messages": [{"role": "user", "content": "x"}], "n": -1})
    assert status == 400
    assert error_of(text)["type"] == "invalid_request_error"


def test_a_message_without_messages_is_the_clients_error(server: Server) -> None:
    status, text = server.post(CHAT, {"model": server.model})
    assert status in (400, 422)
    assert error_of(text)["type"] == "invalid_request_error"


def test_a_request_that_does_not_fit_says_so(server: Server) -> None:
    status, text = server.post("/v1/completions", {"model": server.model, "prompt": "a " * 5000})
    assert status == 400
    assert error_of(text)["code"] == "context_length_exceeded"


def test_health_ready_models_and_metrics(server: Server) -> None:
    assert json.loads(server.get("/health")[1])["engines"] == {server.model: "ready"}
    assert server.get("/ready")[0] == 200
    model = json.loads(server.get("/v1/models")[1])["data"][0]
    assert model["id"] == server.model
    assert model["object"] == "model"
    before = _counter(server, "/v1/completions", 200)
    server.post("/v1/completions", {"model": server.model, "prompt": "Asthma", "max_tokens": 1})
    assert _counter(server, "/v1/completions", 200) == before + 1
    assert f'medassist_replica_up{{model="{server.model}",replica="0"}} 1.0' in server.get("/metrics")[1]


def _counter(server: Server, route: str, code: int) -> float:
    line = rf'medassist_requests_total{{code="{code}",model="{server.model}",route="{route}"}} ([\d.]+)'
    found = re.search(line, server.get("/metrics")[1])
    return float(found[1]) if found else 0.0


def _stream(server: Server, **changes: object) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    body = {"model": server.model, "messages": [{"role": "user", "content": "What is asthma?"}], "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", CHAT, json.dumps(body | changes), JSON)
    return connection, connection.getresponse()


def _running(server: Server) -> float:
    return server.engine_metric("num_requests_running") + server.engine_metric("num_requests_waiting")


def _until(condition: Callable[[], bool], seconds: float = 20) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_a_stream_is_the_engines_own_bytes(server: Server) -> None:
    connection, response = _stream(server, temperature=0)
    assert response.status == 200
    assert response.getheader("Content-Type", "").startswith("text/event-stream")
    events = [line for line in response.read().split(b"\n\n") if line]
    connection.close()
    assert all(event.startswith(b"data: ") for event in events)
    assert events[-1] == b"data: [DONE]"


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_a_client_that_leaves_stops_the_generation(server: Server, stream: bool) -> None:
    """Eight answers of 900 tokens take far longer than the test waits, unless they are stopped."""
    body = {"model": server.model, "prompt": "Asthma", "max_tokens": 900, "ignore_eos": True, "n": 8, "stream": stream}
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    if stream:
        connection.getresponse().read(200)
    assert _until(lambda: _running(server) > 0), "it never began"
    generated = server.engine_metric("generation_tokens_total")
    connection.sock.close() if connection.sock else connection.close()
    connection.close()
    assert _until(lambda: _running(server) == 0)
    assert server.engine_metric("generation_tokens_total") - generated < 8 * 900 * 0.9


def test_what_people_write_is_in_no_log_and_no_metric(server: Server) -> None:
    secret = "Zebediah Quillfeather"
    body = {"model": server.model, "messages": [{"role": "user", "content": f"I am {secret}. What is asthma?"}]}
    assert server.post(CHAT, body)[0] == 200
    server.post(CHAT, body | {"temperature": secret})
    server.request("POST", CHAT, f'{{"model": "{secret}", '.encode(), JSON)
    server.post(CHAT, body | {"model": secret})
    written = server.get("/metrics")[1] + "".join(p.read_text() for p in server.log_dir.iterdir() if p.is_file())
    assert "Quillfeather" not in written
