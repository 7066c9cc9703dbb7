"""The keys that a worker knows, from the files that the keeper writes into its folder.

``keys.json`` is replaced when keys or captures change, ``spent.json`` when usage does; the time of ``contact`` is that
of the keeper's last talk with the store.

The keys' rows are in blocks, always the same of them in each, one row a line. So a change costs a comparison of the
blocks' texts, and as much parsing as there are new rows: a worker answers nobody meanwhile.
"""

import hmac
import logging
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from serving.tenants.key import Key, KeyLimits

if TYPE_CHECKING:
    from serving.tenants.capture import CaptureOrder

logger = logging.getLogger("medassist.keys")

KEYS, SPENT, CONTACT, STATE = "keys.json", "spent.json", "contact", "keeper.json"
BLOCKS = 256
# In JSON, none of these can be within a row or a string.
BEFORE, BETWEEN_BLOCKS, BETWEEN_ROWS, AFTER = b',"keys":[\n\n', b",\n\n", b",\n", b"\n\n]}"
_Stamp = tuple[int, int, int]


class _Block:
    """Rows as they stand in the file, and the key of each; None: it is damaged."""

    __slots__ = ("keys", "text")

    def __init__(self) -> None:
        self.text = b"[]"
        self.keys: list[Key | None] = []

    def lines(self) -> list[bytes]:
        return self.text[1:-1].split(BETWEEN_ROWS) if len(self.text) > 2 else []


class KeyTable:
    """See above. Until there is a ``keys.json`` a key is required, and none is known.

    Attributes:
        required: whether requests need a key.
        journal: folder for the worker's journal; None: nothing is to be written down.
        captures: orders to capture bodies, by the id of the key; they may have expired.
        as_of: seconds since the epoch: how old what is known may be at most. 0: there is no store.
    """

    def __init__(self, folder: Path) -> None:
        self._keys_file, self._spent_file, self._contact = (str(folder / name) for name in (KEYS, SPENT, CONTACT))
        self._keys_stamp: _Stamp | None = None
        self._spent_stamp: _Stamp | None = None
        self._by_digest: dict[bytes, Key] = {}
        self._blocks = [_Block() for _ in range(BLOCKS)]
        self._spent: dict[str, int] = {}
        self._month = self._spent_month = ""
        self.required = True
        self.journal: Path | None = None
        self.captures: dict[str, CaptureOrder] = {}
        self.as_of = 0.0
        self.refresh()

    def refresh(self) -> bool:
        """Reads what has changed; returns whether keys or captures have. To be called a few times a second."""
        changed = False
        if (stamp := _stamp(self._keys_file)) != self._keys_stamp and (keys := _read_keys(self._keys_file)) is not None:
            self._take(*keys)
            self._keys_stamp, changed = stamp, True
        if (stamp := _stamp(self._spent_file)) != self._spent_stamp and (content := _read(self._spent_file)):
            self._spent_month, self._spent, self._spent_stamp = content["month"], content["tokens"], stamp
        if (contact := _stamp(self._contact)) is not None:
            self.as_of = contact[1] / 1e9
        self._month = time.strftime("%Y-%m", time.gmtime())
        return changed

    def find(self, digest: bytes) -> Key | None:
        """The key of a secret with this SHA-256 digest, unless it was revoked. It may have expired."""
        key = self._by_digest.get(digest)
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    def spent(self, key_id: str) -> int:
        """Tokens that the ledger has for the present month, in UTC; 0 for keys without a monthly budget."""
        return self._spent.get(key_id, 0) if self._spent_month == self._month else 0

    def _take(self, content: Mapping[str, Any], blocks: Sequence[bytes]) -> None:
        changed = [(block, text) for block, text in zip(self._blocks, blocks, strict=True) if block.text != text]
        gone: list[Key | None] = []
        for block, text in changed:
            known = dict(zip(block.lines(), block.keys, strict=True))
            gone += block.keys
            block.text = text
            block.keys = [known[line] if line in known else _parse(line) for line in block.lines()]
        for key in gone:
            if key is not None:
                self._by_digest.pop(key.digest, None)
        for block, _ in changed:
            self._by_digest.update((key.digest, key) for key in block.keys if key is not None)
        self.required = content["required"]
        self.journal = Path(content["journal"]) if content["journal"] else None
        if content["captures"] or self.captures:
            self._take_captures(content["captures"])

    def _take_captures(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """An order that stays is the same object, and one that has gone is ended: recorders hold them."""
        from serving.tenants.capture import CaptureOrder

        known = {order.id: order for order in self.captures.values()}
        self.captures = {}
        for row in rows:
            order = CaptureOrder(id=row["id"], key=row["key"], recipient=row["recipient"], expires=row["expires"])
            self.captures[order.key] = known[order.id] if known.get(order.id) == order else order
        for order in known.values():
            order.ended = self.captures.get(order.key) is not order


def key_of(row: Mapping[str, Any]) -> Key:
    """A key from its row of the store, where ``models`` is JSON and ``digest`` is hexadecimal."""
    models = row["models"]
    return Key(
        id=row["id"],
        tenant=row["tenant"],
        name=row["name"],
        digest=bytes.fromhex(row["digest"]),
        models=None if models is None else frozenset(orjson.loads(models)),
        admin=bool(row["admin"]),
        metrics=bool(row["metrics"]),
        limits=KeyLimits(
            requests_per_minute=row["requests_per_minute"],
            tokens_per_minute=row["tokens_per_minute"],
            concurrency=row["concurrency"],
            max_tokens=row["max_tokens"],
            tokens_per_month=row["tokens_per_month"],
        ),
        share=float(row["share"]),
        expires=row["expires"],
        cache_salt=row["cache_salt"],
    )


def _parse(line: bytes) -> Key | None:
    row = orjson.loads(line)
    try:
        return key_of(row)
    except (KeyError, TypeError, ValueError) as e:  # the others are good all the same
        what = type(e).__name__
        logger.error("the key %s is not accepted: its row in the store is damaged (%s)", row.get("id"), what)
        return None


def _stamp(path: str) -> _Stamp | None:
    try:
        about = os.stat(path)
    except OSError:
        return None
    return about.st_ino, about.st_mtime_ns, about.st_size


def _read_keys(path: str) -> tuple[Any, list[bytes]] | None:
    """The content without the keys, and the blocks of those; None as of :func:`_read`."""
    try:
        with open(path, "rb") as file:
            before, found, rest = file.read().partition(BEFORE)
        if not found or not rest.endswith(AFTER):
            return None
        blocks = rest[: -len(AFTER)].split(BETWEEN_BLOCKS)
        return (orjson.loads(before + b"}"), blocks) if len(blocks) == BLOCKS else None
    except (OSError, orjson.JSONDecodeError):
        return None


def _read(path: str) -> Any:
    """The content; None: it is not there, or broken, and what was known stays."""
    try:
        with open(path, "rb") as file:
            return orjson.loads(file.read())
    except (OSError, orjson.JSONDecodeError):
        return None
