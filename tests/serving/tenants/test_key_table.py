"""The keys that a worker knows: from the keeper's files, and closed where there are none."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from serving.tenants import key_table
from serving.tenants.key import KeyLimits
from serving.tenants.key_files import KeyFiles
from serving.tenants.key_table import CONTACT, KEYS, SPENT, KeyTable, key_of

DIGEST = hashlib.sha256(b"ma_secret").digest()


def row(**changes: Any) -> dict[str, Any]:
    return {
        "id": "key_a", "tenant": "acme", "name": "of a test", "digest": DIGEST.hex(), "models": None, "admin": 0,
        "metrics": 1, "requests_per_minute": 60, "tokens_per_minute": None, "concurrency": 2, "max_tokens": None,
        "tokens_per_month": 1000, "share": 2.0, "created": 1, "expires": 4_000_000_000, "revoked": None,
        "origin": "key_a", "cache_salt": "salt",
    } | changes  # fmt: skip


def test_without_files_nobody_is_let_in(tmp_path: Path) -> None:
    table = KeyTable(tmp_path)
    assert table.required
    assert table.find(DIGEST) is None
    assert table.journal is None
    assert table.as_of == 0.0
    assert not KeyTable(tmp_path / "missing").refresh()


def test_a_key_is_found_with_all_that_it_may(tmp_path: Path) -> None:
    KeyFiles(tmp_path, tmp_path / "journal").put_keys("1", [row(models='["demo"]')], [])
    table = KeyTable(tmp_path)
    key = table.find(DIGEST)
    assert key is not None
    assert (key.id, key.tenant, key.models, key.admin, key.metrics) == ("key_a", "acme", {"demo"}, False, True)
    assert key.limits == KeyLimits(requests_per_minute=60, concurrency=2, tokens_per_month=1000)
    assert (key.share, key.expires, key.cache_salt, key.digest) == (2.0, 4_000_000_000, "salt", DIGEST)
    assert table.find(hashlib.sha256(b"ma_other").digest()) is None
    assert table.journal == tmp_path / "journal"


def test_changes_are_seen_and_only_changes(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path, None)
    files.put_keys("1", [row()], [])
    table = KeyTable(tmp_path)
    assert not table.refresh()
    files.touch()
    assert not table.refresh()
    assert abs(table.as_of - time.time()) < 10
    files.put_keys("2", [row(revoked=5)], [])
    assert table.refresh()
    assert table.find(DIGEST) is None
    assert table.required  # for a key that was revoked, too


def test_a_store_that_was_emptied_opens_nothing(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path, None)
    files.put_keys("1", [row()], [])
    files.put_keys("0", [], [])
    assert KeyTable(tmp_path).required


def test_no_key_at_all_needs_none(tmp_path: Path) -> None:
    KeyFiles(tmp_path, None).put_keys("0", [], [])
    assert not KeyTable(tmp_path).required


@pytest.mark.parametrize("broken", [b"", b'{"version": "2", "requ', b"\xff"])
def test_a_broken_file_changes_nothing(tmp_path: Path, broken: bytes) -> None:
    KeyFiles(tmp_path, None).put_keys("1", [row()], [])
    table = KeyTable(tmp_path)
    (tmp_path / KEYS).write_bytes(broken)
    assert not table.refresh()
    assert table.find(DIGEST) is not None
    (tmp_path / KEYS).unlink()
    assert not table.refresh()
    assert table.find(DIGEST) is not None
    assert KeyTable(tmp_path).required


@pytest.mark.parametrize("damage", [{"digest": "no hex"}, {"models": "no JSON"}, {"models": "5"}, {"share": None}])
def test_a_damaged_row_costs_its_own_key_only(
    tmp_path: Path, damage: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    other = row(id="key_b", digest=hashlib.sha256(b"ma_other").hexdigest())
    KeyFiles(tmp_path, None).put_keys("1", [row(**damage), other], [])
    table = KeyTable(tmp_path)
    assert table.find(DIGEST) is None
    assert table.find(hashlib.sha256(b"ma_other").digest()) is not None
    assert "key_a" in caplog.text
    assert not table.refresh()


def test_what_was_spent_is_of_the_present_month(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path, None)
    table = KeyTable(tmp_path)
    assert table.spent("key_a") == 0
    files.put_spent(time.strftime("%Y-%m", time.gmtime()), {"key_a": 7})
    table.refresh()
    assert table.spent("key_a") == 7
    assert table.spent("key_b") == 0
    files.put_spent("2001-01", {"key_a": 7})
    table.refresh()
    assert table.spent("key_a") == 0


def test_captures_are_known_by_their_key(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path, None)
    order = {"id": "cap_1", "key": "key_a", "recipient": "age", "expires": 4_000_000_000, "reason": "never told"}
    files.put_keys("1", [row()], [order])
    table = KeyTable(tmp_path)
    running = table.captures["key_a"]
    assert (running.id, running.open) == ("cap_1", True)
    assert "never told" not in (tmp_path / KEYS).read_text()
    files.put_keys("2", [row(), row(id="key_b", digest="00" * 32)], [order])
    assert table.refresh()
    assert table.captures["key_a"] is running
    assert running.open
    files.put_keys("3", [row()], [])
    assert table.refresh()
    assert table.captures == {}
    assert not running.open, "what records now must end, too"


def test_another_capture_ends_the_one_before(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path, None)
    order = {"id": "cap_1", "key": "key_a", "recipient": "x", "expires": 4_000_000_000}
    files.put_keys("1", [row()], [order])
    table = KeyTable(tmp_path)
    running = table.captures["key_a"]
    files.put_keys("2", [row()], [order | {"id": "cap_2"}])
    assert table.refresh()
    assert (running.open, table.captures["key_a"].id, table.captures["key_a"].open) == (False, "cap_2", True)


def test_files_are_private_and_replaced_whole(tmp_path: Path) -> None:
    files = KeyFiles(tmp_path, None)
    files.put_keys("1", [row()], [])
    files.put_spent("2026-11", {})
    files.touch()
    before = os.stat(tmp_path / KEYS).st_ino
    with (tmp_path / KEYS).open() as reader:
        files.put_keys("2", [], [])
        assert json.loads(reader.read())["version"] == "1"
    assert os.stat(tmp_path / KEYS).st_ino != before
    for name in (KEYS, SPENT, CONTACT):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o600


def test_a_change_costs_the_rows_that_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = KeyFiles(tmp_path, None)
    digests = [hashlib.sha256(b"%d" % number).digest() for number in range(1000)]
    rows = [row(id=f"key_{number}", digest=digest.hex()) for number, digest in enumerate(digests)]
    files.put_keys("1", rows, [])
    table = KeyTable(tmp_path)
    known = [table.find(digest) for digest in digests]
    parsed: list[str] = []
    monkeypatch.setattr(key_table, "key_of", lambda row: (parsed.append(row["id"]), key_of(row))[1])
    rows[3] |= {"name": 'with },{ ],\n\n "keys":[ in it'}
    rows[5] |= {"revoked": 7}
    rows[6] |= {"digest": digests[7].hex()}
    rows[7] |= {"digest": digests[6].hex()}
    files.put_keys("2", [*reversed(rows), row(id="key_new")], [])
    assert table.refresh()
    assert sorted(parsed) == ["key_3", "key_6", "key_7", "key_new"]
    found = [table.find(digest) for digest in digests]
    assert [number for number in range(1000) if found[number] is not known[number]] == [3, 5, 6, 7]
    assert found[3] is not None
    assert found[3].name == rows[3]["name"]
    assert found[5] is None
    assert [key and key.id for key in found[6:8]] == ["key_7", "key_6"]
    assert table.find(DIGEST) is not None
    files.put_keys("3", [], [])
    assert table.refresh()
    assert table.required
    assert not any(table.find(digest) for digest in [DIGEST, *digests])
