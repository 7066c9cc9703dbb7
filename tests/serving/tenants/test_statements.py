"""The SQL that the keeper executes, through the drivers themselves, on SQLite and PostgreSQL."""

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from serving.tenants import schema
from serving.tenants.key import KeyLimits
from serving.tenants.statements import compile_statements, connect_arguments
from serving.tenants.store import Store


class Raw:
    """A connection of the driver's, and the statements by name."""

    def __init__(self, url: str) -> None:
        how = connect_arguments(url)
        self.statements = compile_statements(url)
        if how["driver"] == "sqlite":
            self.connection: Any = sqlite3.connect(**how["arguments"])
        else:
            import psycopg

            self.connection = psycopg.connect(**how["arguments"])

    def __call__(self, name: str, /, **parameters: Any) -> Any:
        cursor = self.connection.cursor()
        cursor.execute(self.statements[name], parameters)
        return cursor

    def rows(self, name: str, /, **parameters: Any) -> list[dict[str, Any]]:
        cursor = self(name, **parameters)
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


@pytest.fixture
def raw(store: Store, store_url: str) -> Iterator[Raw]:
    found = Raw(store_url)
    with contextlib.closing(found.connection):
        yield found


USAGE = {"day": "2026-11-25", "tenant": "ward", "model": "m", "requests": 2, "failed": 1, "prompt_tokens": 2**33,
         "completion_tokens": 5, "estimated": 1}  # fmt: skip


def test_facts_and_revision(store: Store, raw: Raw) -> None:
    assert raw("revision").fetchone() == (schema.REVISION,)
    (version,) = raw("version").fetchone()
    store.create_key(tenant="ward")
    assert raw("version").fetchone() == (str(int(version) + 1),)
    assert raw("fact", name="audit_secret").fetchone() == (store.audit_secret().hex(),)
    assert raw("fact", name="nothing").fetchone() is None


def test_keys_come_with_all_columns_and_the_salt(store: Store, raw: Raw) -> None:
    key, _ = store.create_key(tenant="ward", models=["a"], limits=KeyLimits(requests_per_minute=5), share=0.5)
    same, _ = store.create_key(tenant="ward")
    other, _ = store.create_key(tenant="ops", admin=True)
    store.revoke(other.id)
    rows = {row["id"]: row for row in raw.rows("keys")}
    assert set(rows) == {key.id, same.id, other.id}
    assert set(rows[key.id]) == {*schema.keys.columns.keys(), "cache_salt"}
    assert rows[key.id]["models"] == '["a"]'
    assert (rows[key.id]["requests_per_minute"], rows[key.id]["share"], rows[key.id]["metrics"]) == (5, 0.5, 0)
    assert rows[other.id]["revoked"] >= other.created
    salts = [rows[each.id]["cache_salt"] for each in (key, same, other)]
    assert salts[0] == salts[1] != salts[2]
    assert len(salts[0]) == 43


def test_captures_are_those_that_are_active(store: Store, raw: Raw) -> None:
    key, _ = store.create_key(tenant="ward")
    order: dict[str, Any] = {"key": key.id, "recipient": "00" * 32, "reason": "r", "created_by": "me"}
    store.end_capture(store.start_capture(**order, seconds=60).id)
    first = store.start_capture(**order, seconds=60)
    assert [row["id"] for row in raw.rows("captures", now=first.created)] == [first.id]
    assert set(raw.rows("captures", now=first.created)[0]) == set(schema.captures.columns.keys())
    assert raw.rows("captures", now=first.expires) == []


def test_usage_adds_up(store: Store, raw: Raw) -> None:
    raw("begin")
    raw("add_usage", key="", **USAGE)
    raw("add_usage", key="", **USAGE)
    raw("add_usage", key="", **{**USAGE, "model": ""})
    raw("rollback")
    assert store.usage() == []
    raw("begin")
    for _ in range(3):
        raw("add_usage", key="", **USAGE)
    raw("commit")
    (row,) = store.usage()
    assert (row.requests, row.failed, row.prompt_tokens, row.completion_tokens, row.estimated) == (
        6,
        3,
        3 * 2**33,
        15,
        3,
    )


def test_a_journal_moves_on_from_where_it_is_only(store: Store, raw: Raw) -> None:
    raw("begin_journal", id="j", now=1)
    assert raw("position", id="j").fetchone() == (0,)
    assert raw("advance", id="j", old=0, new=2**40, now=2).rowcount == 1
    assert raw("advance", id="j", old=0, new=7, now=3).rowcount == 0
    raw("begin_journal", id="j", now=4)
    assert raw("position", id="j").fetchone() == (2**40,)
    raw("begin_journal", id="other", now=1)
    raw("advance", id="other", old=0, new=-1, now=10)
    raw("forget_journals", before=10)
    assert raw("position", id="other").fetchone() == (-1,)
    raw("forget_journals", before=11)
    assert raw("position", id="other").fetchone() is None
    assert raw("position", id="j").fetchone() == (2**40,)  # not finished: it would be counted again


def test_the_head_never_goes_back(store: Store, raw: Raw) -> None:
    for sequence, digest in ((5, "e"), (9, "i"), (7, "g")):
        raw("head", log="l", sequence=sequence, hash=digest, now=1)
    assert store.audit_heads() == {"l": (9, "i")}
    assert raw("stored_head", log="l").fetchone() == (9, "i")
    assert raw("stored_head", log="k").fetchone() is None


def test_a_month_is_spent_by_a_key_and_those_before_it_together(store: Store, raw: Raw) -> None:
    budget = KeyLimits(tokens_per_month=100)
    first, _ = store.create_key(tenant="ward", limits=budget)
    free, _ = store.create_key(tenant="ward")
    other, _ = store.create_key(tenant="ward", limits=budget)
    tokens = {"prompt_tokens": 10, "completion_tokens": 1}
    for key in (first, free):
        raw("add_usage", key=key.id, **{**USAGE, **tokens})
        raw("add_usage", key=key.id, **{**USAGE, **tokens, "day": "2026-10-31"})
    second, _ = store.rotate(first.id, 3600)
    third, _ = store.rotate(second.id, 3600)
    raw("add_usage", key=third.id, **{**USAGE, **tokens, "model": "n"})
    found = dict(raw("spent", month="2026-11-01").fetchall())
    assert found == {first.id: 22, second.id: 22, third.id: 22}
    assert all(type(value) is int for value in found.values())
    raw("add_usage", key=other.id, **{**USAGE, **tokens})
    assert dict(raw("spent", month="2026-11-01").fetchall())[other.id] == 11
    assert replace(third, id="", created=0) == replace(first, id="", created=0)
