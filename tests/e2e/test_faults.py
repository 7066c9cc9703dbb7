"""Processes that die, and orderly ends. Each test has a server of its own."""

import contextlib
import http.client
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.server import CHECKPOINT, Server

pytestmark = pytest.mark.engine
LONG = {"max_tokens": 900, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def own_server(tmp_path: Path) -> Iterator[Server]:
    server = Server(CHECKPOINT, tmp_path / "logs").wait_ready()
    yield server
    server.stop()


def open_stream(server: Server, **changes: object) -> http.client.HTTPResponse:
    body = {"model": server.model, "prompt": "Asthma", "stream": True} | LONG | changes
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200
    response.read(100)
    return response


def named(processes: list[psutil.Process], part: str) -> list[psutil.Process]:
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if part in " ".join(process.cmdline()) or part in process.name():
                found.append(process)
    return found


def test_a_killed_engine_ends_streams_with_an_error_and_comes_back(own_server: Server) -> None:
    response = open_stream(own_server)
    core = named(own_server.descendants(), "EngineCore")
    assert core, own_server.log
    killed = time.monotonic()
    core[0].kill()
    events = [line for line in response.read().split(b"\n\n") if line.startswith(b"data: ")]
    errors = [json.loads(event[6:])["error"] for event in events if event.startswith(b'data: {"error"')]
    assert len(errors) == 1, events[-3:]

    answers = []
    while time.monotonic() - killed < 120:
        status, text = own_server.post("/v1/completions", {"model": own_server.model, "prompt": "x", "max_tokens": 1})
        answers.append(status)
        if status == 200:
            break
        assert status == 503, text
        assert json.loads(text)["error"]["code"] == "engine_unavailable"
        assert 1 <= int(own_server.headers["Retry-After"]) <= 120
        time.sleep(0.5)
    assert answers[-1] == 200, own_server.log
    assert own_server.log.count("starting again in") == 1
    assert 'medassist_replica_up{model="medassist-demo",replica="0"} 1.0' in own_server.get("/metrics")[1]


def test_a_killed_gateway_leaves_no_process_behind(own_server: Server) -> None:
    open_stream(own_server)
    left = own_server.descendants()
    assert named(left, "EngineCore")
    os.kill(own_server.process.pid, signal.SIGKILL)
    own_server.process.wait()
    _, alive = psutil.wait_procs(left, timeout=10)
    assert not alive


def test_sigterm_lets_a_running_answer_finish_and_refuses_new_ones(own_server: Server) -> None:
    response = open_stream(own_server, max_tokens=400)
    left = own_server.descendants()
    refused: list[int] = []

    def ask_during_drain() -> None:
        time.sleep(0.3)
        refused.append(own_server.post("/v1/completions", {"model": own_server.model, "prompt": "x"})[0])

    asking = threading.Thread(target=ask_during_drain)
    own_server.process.send_signal(signal.SIGTERM)
    asking.start()
    assert response.read().rstrip().endswith(b"data: [DONE]")
    asking.join()
    assert own_server.process.wait(30) == 0, own_server.log
    assert refused[0] in (503, 0)
    assert not psutil.wait_procs(left, timeout=5)[1]


def test_sigterm_during_the_start_ends_at_once(tmp_path: Path) -> None:
    server = Server(CHECKPOINT, tmp_path / "logs")
    deadline = time.monotonic() + 60
    while not named(server.descendants(), "serving.launch") and time.monotonic() < deadline:
        time.sleep(0.2)
    left = server.descendants()
    assert server.get("/ready")[0] == 503
    assert server.stop() == 0, server.log
    assert not psutil.wait_procs(left, timeout=5)[1]


def test_a_taken_port_is_said_before_anything_is_loaded(own_server: Server, tmp_path: Path) -> None:
    import subprocess
    import sys

    command = [sys.executable, "-m", "clients.cli", "serve", str(CHECKPOINT), "--port", str(own_server.port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "--port" in done.stderr
