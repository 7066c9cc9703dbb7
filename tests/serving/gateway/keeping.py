"""What a keeper does for a worker's accounts, by hand: tells it of keys, and reads what it writes down."""

import time
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

from aiohttp import web

from serving.tenants.journal import JournalFile, segments
from serving.tenants.key_files import KeyFiles
from serving.tenants.record import Record
from serving.tenants.secrets import digest, new_key
from tests.serving.gateway.doubles import Client, Engine, gateway_for
from tests.waiting import eventually

COMPLETIONS, EMBEDDINGS, MESSAGES, TOKENIZE = "/v1/completions", "/v1/embeddings", "/v1/messages", "/tokenize"
RESPONSES = "/v1/responses"
PROMPT = [{"role": "user", "content": "a" * 100}]  # 26 tokens by the estimate, its role included
OPENAI = {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}

_COLUMNS = (
    "models", "requests_per_minute", "tokens_per_minute", "concurrency", "max_tokens", "tokens_per_month", "expires",
    "revoked",
)  # fmt: skip


class Keeping:
    """Keys in ``folder/accounts``, journals in ``folder/journal``."""

    def __init__(self, folder: Path) -> None:
        self.accounts, self.journal = folder / "accounts", folder / "journal"
        self.accounts.mkdir()
        self.journal.mkdir()
        self.files = KeyFiles(self.accounts, self.journal)
        self.rows: list[dict[str, Any]] = []
        self.captures: list[dict[str, Any]] = []
        self.tell()

    def tell(self) -> None:
        self.files.put_keys(str(time.time_ns()), self.rows, self.captures)

    def key(self, tenant: str = "clinic", **columns: Any) -> tuple[dict[str, Any], str]:
        """A new key that the worker is told of: its row, and its secret."""
        key_id, secret = new_key()
        row = dict.fromkeys(_COLUMNS) | {
            "id": key_id,
            "tenant": tenant,
            "name": "",
            "digest": digest(secret.encode()).hex(),
            "admin": 0,
            "metrics": 0,
            "share": 1.0,
            "cache_salt": digest(tenant.encode()).hex(),
        }
        self.rows.append(row | columns)
        self.tell()
        return self.rows[-1], secret

    def records(self) -> list[Record]:
        """Of all requests so far."""
        found = []
        for path in segments(self.journal):
            with JournalFile(path) as file:
                found += [Record.unpack(line) for line in file.read(0)[0]]
        return found


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def serving(keeping: Keeping, *engines: Engine, **more: Any) -> AbstractAsyncContextManager[Client]:
    return gateway_for(*engines, accounts=keeping.accounts, home=str(keeping.accounts.parent), **more)


async def records(keeping: Keeping, count: int) -> list[Record]:
    assert await eventually(lambda: len(keeping.records()) >= count)
    found = keeping.records()
    assert len(found) == count, "a request is written down once"
    return found


def usage(**counts: int) -> Any:
    async def behaves(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"object": "x", "usage": counts} if counts else {"object": "x", "text": "a" * 100})

    return behaves
