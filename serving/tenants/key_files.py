"""The files by which the keeper tells the workers of keys; :mod:`serving.tenants.key_table` reads them."""

import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson

from serving.tenants.key_table import (
    AFTER,
    BEFORE,
    BETWEEN_BLOCKS,
    BETWEEN_ROWS,
    BLOCKS,
    CONTACT,
    KEYS,
    SPENT,
    STATE,
)


class KeyFiles:
    """Written so that a reader finds the old content or the new, whatever happens meanwhile.

    Args:
        folder: private to this gateway.
        journal: folder that the workers shall write their journals to.
    """

    def __init__(self, folder: Path, journal: Path | None) -> None:
        self._folder, self._journal = folder, journal
        self._required = False

    def put_keys(self, version: str, keys: Sequence[Mapping[str, Any]], captures: Sequence[Mapping[str, Any]]) -> None:
        """Rows of the store; revoked keys are left out, but they count: from the first key on, one is required, even if
        somebody empties the store.

        Raises:
            OSError: it cannot be written.
        """
        self._required |= bool(keys)
        content = {
            "version": version,
            "required": self._required,
            "journal": str(self._journal) if self._journal else None,
            "captures": [{name: row[name] for name in ("id", "key", "recipient", "expires")} for row in captures],
        }
        blocks: list[list[bytes]] = [[] for _ in range(BLOCKS)]
        for row in sorted(keys, key=lambda row: row["id"]):
            if row["revoked"] is None:
                blocks[zlib.crc32(row["id"].encode()) % BLOCKS].append(orjson.dumps(row))
        texts = (b"[" + BETWEEN_ROWS.join(rows) + b"]" for rows in blocks)
        self._write(KEYS, orjson.dumps(content)[:-1] + BEFORE + BETWEEN_BLOCKS.join(texts) + AFTER)

    def put_spent(self, month: str, tokens: Mapping[str, int]) -> None:
        """Tokens of a month ("2026-11") by key. Raises OSError."""
        self._put(SPENT, {"month": month, "tokens": tokens})

    def put_state(self, state: Mapping[str, float]) -> None:
        """Numbers of the keeper, for the metrics. Raises OSError."""
        self._put(STATE, state)

    def touch(self) -> None:
        """The store has just said that the keys are as they are. Raises OSError."""
        fd = os.open(self._folder / CONTACT, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            now = time.time_ns()
            os.utime(fd, ns=(now, now))
        finally:
            os.close(fd)

    def _put(self, name: str, content: Mapping[str, Any]) -> None:
        self._write(name, orjson.dumps(content))

    def _write(self, name: str, content: bytes) -> None:
        new = self._folder / f"{name}.new"
        fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        new.replace(self._folder / name)
