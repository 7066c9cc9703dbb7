"""Stores for tests: a new database of SQLite, or of the PostgreSQL that runs here."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving.tenants.ledger import Ledger
from serving.tenants.record import Record
from serving.tenants.statements import compile_statements, connect_arguments
from tests.databases import postgresql_database

KINDS = ("sqlite", "postgresql")


@contextlib.contextmanager
def store_url(kind: str, folder: Path) -> Iterator[str]:
    """The URL of an empty database, which is dropped at the end. Skips where there is no PostgreSQL."""
    if kind == "sqlite":
        yield f"sqlite:///{folder / 'medassist.db'}"
        return
    with postgresql_database() as url:
        yield url


def ledger_of(url: str) -> Ledger:
    return Ledger({**connect_arguments(url), "statements": compile_statements(url)})


def record(key: str = "", model: str = "demo", **changes: Any) -> Record:
    """A request that went well, and used 3 and 2 tokens."""
    given = {
        "time": time.time(), "request_id": "req-1", "key": key, "tenant": "acme" if key else "",
        "route": "/v1/chat/completions", "model": model, "status": 200, "code": "", "phase": "ending", "stream": False,
        "prompt_tokens": 3, "completion_tokens": 2, "estimated": False, "seconds": 0.5, "queued": 0.0, "upstream": 0.4,
        "first_token": 0.1, "replica": "demo/0", "attempts": 1,
    } | changes  # fmt: skip
    return Record(**given)
