"""A real ``medassist serve`` in a process of its own, for tests."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import psutil

from loadtest.gateway.processes import free_port

CHECKPOINT = Path(__file__).parents[2] / "training/checkpoints/medassist-demo"
START_LIMIT = 240  # seconds; generous, since tests may share two slow cores


class Server:
    """Starts at once; ``wait_ready`` before use; ``stop`` at the end. Without a checkpoint, ``arguments`` say what."""

    def __init__(
        self, checkpoint: Path | None, log_dir: Path, *arguments: str, env: dict[str, str] | None = None
    ) -> None:
        self.port, self.log_dir = free_port(), log_dir
        log_dir.mkdir(parents=True, exist_ok=True)
        self.output = log_dir / "serve.log"
        command = [sys.executable, "-m", "clients.cli", "serve", "--port", str(self.port)]
        command += [str(checkpoint)] if checkpoint else []
        command += ["--log-dir", str(log_dir), *arguments]
        with self.output.open("w") as f:
            # Away from the repository: the package that is tested is the installed one.
            self.process = subprocess.Popen(command, cwd=log_dir, stdout=f, stderr=f, env=os.environ | (env or {}))
        self.root = f"http://127.0.0.1:{self.port}"
        self.base_url = f"{self.root}/v1"
        self.model = checkpoint.name if checkpoint else ""

    @property
    def log(self) -> str:
        return self.output.read_text()

    def wait_ready(self) -> "Server":
        deadline = time.monotonic() + START_LIMIT
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log
            if self.get("/ready")[0] == 200:
                return self
            time.sleep(0.2)
        raise AssertionError(f"not ready after {START_LIMIT} s:\n{self.log}")

    def get(self, path: str) -> tuple[int, str]:
        return self.request("GET", path)

    def post(self, path: str, body: object) -> tuple[int, str]:
        return self.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        """Status and body; (0, "") when nothing listens."""
        request = urllib.request.Request(self.root + path, body, headers or {}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as e:
            self.headers = e.headers
            return e.code, e.read().decode()
        except OSError:
            return 0, ""

    @property
    def state(self) -> dict[str, Any]:
        """``pid``, ``workers`` (their process ids) and ``engines`` (``model``, ``pid``, ``socket``, ``state``)."""
        state: dict[str, Any] = json.loads((self.log_dir / "engines.json").read_text())
        return state

    @property
    def engine(self) -> dict[str, Any]:
        """The first engine."""
        engine: dict[str, Any] = self.state["engines"][0]
        return engine

    def engine_metric(self, name: str) -> float:
        """Sum of one of vLLM's own metrics, asked of the engine itself."""
        with socket.socket(socket.AF_UNIX) as s:
            s.connect(str(self.engine["socket"]))
            s.sendall(b"GET /metrics HTTP/1.0\r\nHost: engine\r\n\r\n")
            text = b"".join(iter(lambda: s.recv(65536), b"")).decode()
        values = re.findall(rf"^vllm:{name}{{[^}}]*}} ([\d.e+]+)", text, re.MULTILINE)
        assert values, name
        return sum(map(float, values))

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()
