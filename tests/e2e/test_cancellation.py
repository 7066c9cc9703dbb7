"""A client that leaves in any phase frees the engine at once, by the engine's own count; and is counted."""

import contextlib
import http.client
import http.server
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from loadtest.gateway.processes import free_port
from tests.e2e.server import Server
from tests.waiting import until

pytestmark = pytest.mark.engine

LONG = {"prompt": "Asthma", "max_tokens": 900, "ignore_eos": True}


class Stuck:
    """A server that is healthy until :meth:`hang`, from when on connecting to it takes for ever."""

    def __init__(self) -> None:
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Healthy)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self._waiting: list[socket.socket] = []

    def hang(self) -> None:
        """Accepts no more, and fills the queue of those that wait to be accepted."""
        self._server.shutdown()
        self._thread.join()
        self._server.socket.listen(0)
        for _ in range(4):
            waiting = socket.socket()
            waiting.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                waiting.connect(("127.0.0.1", self.port))
            self._waiting.append(waiting)

    def close(self) -> None:
        for waiting in self._waiting:
            waiting.close()
        self._server.server_close()


class _Healthy(http.server.BaseHTTPRequestHandler):
    """HTTP/1.0, so that no connection stays open for later requests."""

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": "stuck", "object": "model"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        pass


class Gateway:
    """A second gateway before the session's engine, which it gives one request at a time; ``stuck`` beside it."""

    def __init__(self, server: Server, stuck: Stuck, folder: Path) -> None:
        self.server, self.stuck, self.port = server, stuck, free_port()
        path = folder / "gateway.yaml"
        engine = {"engines": [{"url": f"unix:{server.engine['socket']}"}], "max_concurrency": 1}
        hanging = {"engines": [{"url": f"http://127.0.0.1:{stuck.port}"}], "timeouts": {"connect": 60}}
        probes = {"interval": 600, "canary_interval": 0}  # after the first look, no probe finds `stuck` out
        models = {server.model: engine, "stuck": hanging}
        path.write_text(yaml.safe_dump({"models": models, "probes": probes}))
        command = [sys.executable, "-m", "clients.cli", "gateway", "--config", str(path), "--port", str(self.port)]
        self.log = folder / "gateway.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)

    def get(self, path: str) -> tuple[int, str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        except OSError:
            return 0, ""
        finally:
            connection.close()

    def ask(self, **fields: object) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = {"model": self.server.model} | LONG | fields
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        return connection

    def metric(self, line: str) -> float:
        found = re.search(rf"^medassist_{re.escape(line)} ([\d.e+]+)$", self.get("/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else 0.0

    def left(self, phase: str) -> float:
        return self.metric(f'cancellations_total{{phase="{phase}"}}')

    @property
    def at_engine(self) -> float:
        """Requests that the engine works on or will, by its own metrics."""
        return sum(self.server.engine_metric(f"num_requests_{state}") for state in ("running", "waiting"))

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module")
def gateway(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    stuck = Stuck()
    gateway = Gateway(server, stuck, tmp_path_factory.mktemp("cancellation"))
    try:
        assert until(lambda: gateway.get("/ready")[0] == 200), gateway.log.read_text()
        yield gateway
    finally:
        gateway.stop()
        stuck.close()


def leave(gateway: Gateway, phase: str, *connections: http.client.HTTPConnection) -> float:
    """Closes the connections, and returns the seconds until the engine had nothing to do; checks the count."""
    before = gateway.left(phase)
    start = time.monotonic()
    for connection in connections:
        connection.close()
    assert until(lambda: gateway.at_engine == 0, 10), "it still works for clients that left"
    seconds = time.monotonic() - start
    assert until(lambda: gateway.left(phase) == before + 1, 5), gateway.get("/metrics")[1]
    return seconds


def test_while_streaming(gateway: Gateway) -> None:
    connection = gateway.ask(stream=True)
    response = connection.getresponse()
    assert response.read(50)
    assert gateway.at_engine == 1
    response.close()  # which holds the connection, too
    assert leave(gateway, "streaming", connection) < 3


def test_while_waiting_for_the_first_byte(gateway: Gateway) -> None:
    connection = gateway.ask()
    assert until(lambda: gateway.at_engine == 1, 10), "it never began"
    assert leave(gateway, "waiting", connection) < 3


def test_while_queued(gateway: Gateway) -> None:
    """The one that waited never gets to the engine, where the other's place is free at once."""
    first = gateway.ask()
    assert until(lambda: gateway.at_engine == 1, 10), "it never began"
    second = gateway.ask()
    assert until(lambda: gateway.metric(f'queue_length{{model="{gateway.server.model}"}}') == 1, 5)
    before = gateway.left("queued")
    second.close()
    assert until(lambda: gateway.left("queued") == before + 1, 5), gateway.get("/metrics")[1]
    assert gateway.at_engine == 1
    assert leave(gateway, "waiting", first) < 3
    done = gateway.ask(max_tokens=1, ignore_eos=False)
    assert done.getresponse().status == 200


def test_while_connecting(gateway: Gateway) -> None:
    gateway.stuck.hang()
    connection = gateway.ask(model="stuck")
    time.sleep(0.3)
    assert gateway.left("connecting") == 0
    start = time.monotonic()
    connection.close()
    assert until(lambda: gateway.left("connecting") == 1, 5), gateway.get("/metrics")[1]
    assert time.monotonic() - start < 3
    assert gateway.metric('replica_outstanding{model="stuck",replica="0"}') == 0
