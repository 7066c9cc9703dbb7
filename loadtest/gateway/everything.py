"""The gateway with every feature on, and what it has written down."""

import json
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

import redis
import yaml

from loadtest.gateway.processes import Program, free_port, gateway, program

NAME = "medassist, all of it"
# Limits that are counted, and never reached.
KEY = ("--rpm", "100000000", "--tpm", "1000000000000", "--concurrency", "4096", "--max-tokens", "2000000",
       "--monthly-tokens", "1000000000000000")  # fmt: skip
SETTLE = 15.0  # seconds for the last requests to be in the ledger


@dataclass(frozen=True)
class Services:
    """What the gateway uses.

    Attributes:
        store: URL of a database of its own; None: SQLite.
        redis: URL; None: each worker counts the limits for itself.
    """

    store: str | None = None
    redis: str | None = None

    def __str__(self) -> str:
        store = (self.store or "sqlite").partition(":")[0]
        return f"store: {store}, limits: counted {'in Redis' if self.redis else 'by each worker'}"


class Everything:
    """A gateway that runs: ``target`` knows its key."""

    def __init__(self, target: Program, collector: Program, folder: Path, settings: Path) -> None:
        self.target, self._collector, self._folder, self._settings = target, collector, folder, settings

    def counts(self) -> dict[str, int]:
        """Requests in the ledger, in the request log and in the audit log, and spans at the collector."""
        with build_opener(ProxyHandler({})).open(f"{self._collector.url}/state", timeout=5) as response:
            spans = int(json.load(response)["spans"])
        usage = json.loads(medassist("usage", "--json", "--config", str(self._settings)))
        rows: list[dict[str, Any]] = usage if isinstance(usage, list) else usage["rows"]
        log = self._folder / "requests.jsonl"
        audit = (line for path in (self._folder / "home/audit").glob("*.jsonl") for line in path.open("rb"))
        return {
            "ledger": sum(row["requests"] for row in rows),
            "request log": sum(1 for _ in log.open("rb")) if log.exists() else 0,
            "audit log": sum(b'"request"' in line for line in audit),
            "spans": spans,
        }

    def written(self, sent: int) -> tuple[str, bool]:
        """What it has written down of requests, and whether the ledger has all of them and no more."""
        deadline = time.monotonic() + SETTLE
        while (found := self.counts())["ledger"] < sent and time.monotonic() < deadline:
            time.sleep(0.5)
        what = ", ".join(f"{count:,} {name}" for name, count in found.items())
        return f"{NAME}: of {sent:,} requests it has written down: {what}", found["ledger"] == sent


def medassist(*arguments: str) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    command = [sys.executable, "-m", "clients.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise RuntimeError(f"medassist {' '.join(arguments)}: {done.stderr[-500:]}")
    return done.stdout


@contextmanager
def everything(folder: Path, model: str, engine: Program, workers: int, services: Services) -> Iterator[Everything]:
    """Runs the gateway with keys and all their limits, audit, request log, traces and cache salts.

    Args:
        folder: for all that it keeps; made here.
        services: the store of which must be empty, or have been made by ``medassist store upgrade``.

    Raises:
        RuntimeError: it does not start; the message says why.
    """
    folder.mkdir()
    port = free_port()
    command = [sys.executable, "-m", "loadtest.gateway.collector", "--port", str(port)]
    with program("collector", command, f"http://127.0.0.1:{port}", folder) as collector:
        settings = folder / "settings.yaml"
        content: dict[str, Any] = {
            "models": {model: {"engines": [{"url": engine.url}]}},
            "home": str(folder / "home"),
            "workers": workers,
            "tracing": {"endpoint": collector.url, "sample": 1.0},
            "log": {"requests": True, "file": str(folder / "requests.jsonl")},
        }
        if services.store:
            content["store"] = {"url": services.store}
        prefix = f"loadtest-{secrets.token_hex(8)}"
        if services.redis:
            content["redis"] = {"url": services.redis, "prefix": prefix}
        settings.write_text(yaml.safe_dump(content))
        medassist("store", "upgrade", "--config", str(settings))
        secret = medassist("keys", "create", "--tenant", f"loadtest-{os.getpid()}", *KEY, "--config", str(settings))
        try:
            with gateway(folder, "--config", str(settings), name=NAME) as target:
                yield Everything(replace(target, key=secret.strip()), collector, folder, settings)
        finally:
            if services.redis:
                with redis.Redis.from_url(services.redis) as client:
                    for name in client.scan_iter(match=f"{prefix}*"):
                        client.delete(name)
