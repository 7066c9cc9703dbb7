"""The ledger: everything once, on both databases, whatever the store does meanwhile."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.tenants.ledger import FINISHED, Batch, Ledger, StoreAway, add_up
from serving.tenants.record import MOST_TOKENS
from serving.tenants.store import Store
from tests.serving.tenants.stores import KINDS, ledger_of, record, store_url


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with store_url("postgresql", tmp_path_factory.mktemp("store")) as found:
        Store(found).upgrade()
        yield found


@pytest.fixture(params=KINDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "postgresql":
        found: str = request.getfixturevalue("postgresql")
        import psycopg

        with psycopg.connect(found) as connection:
            connection.execute("TRUNCATE usage, journals, captures, keys, tenants")
        yield found
    else:
        with store_url("sqlite", tmp_path) as found:
            Store(found).upgrade()
            yield found


@pytest.fixture
def ledger(url: str) -> Iterator[Ledger]:
    ledger = ledger_of(url)
    yield ledger
    ledger.close()


def usage(url: str) -> dict[str, tuple[int, int, int]]:
    """Requests and tokens by key."""
    rows = Store(url).usage(by=("key",))
    return {row.key: (row.requests, row.prompt_tokens, row.completion_tokens) for row in rows}


def test_records_are_added_and_positions_move(url: str, ledger: Ledger) -> None:
    assert ledger.positions(["a", "b"]) == {"a": 0, "b": 0}
    batches = [Batch("b", 0, 50, [record("key_a")]), Batch("a", 0, 90, [record("key_a"), record("key_b")])]
    assert ledger.apply(batches) == {"a", "b"}
    assert ledger.positions(["a", "b", "c"]) == {"a": 90, "b": 50, "c": 0}
    assert ledger.apply([Batch("a", 90, 120, [record("key_a", status=500)])]) == {"a"}
    assert usage(url) == {"key_a": (3, 9, 6), "key_b": (1, 3, 2)}
    assert sum(row.failed for row in Store(url).usage()) == 1


def test_a_batch_counts_once(url: str, ledger: Ledger) -> None:
    ledger.positions(["a", "b"])
    batch = Batch("a", 0, 50, [record("key_a")])
    assert ledger.apply([batch]) == {"a"}
    assert ledger.apply([batch, Batch("b", 0, 9, [record("key_b")])]) == {"b"}  # b counts all the same
    assert usage(url) == {"key_a": (1, 3, 2), "key_b": (1, 3, 2)}


@pytest.mark.parametrize("happened", [False, True])
def test_a_commit_without_an_answer_counts_once(url: str, happened: bool) -> None:
    ledger = _Unheard(ledger_of(url), happened)
    ledger.ledger.positions(["a"])
    batch = Batch("a", 0, 50, [record("key_a")])
    with pytest.raises(StoreAway):
        ledger.apply(batch)
    assert ledger.ledger.positions(["a"]) == {"a": 50 if happened else 0}
    assert ledger.ledger.apply([batch]) == (set() if happened else {"a"})
    assert usage(url) == {"key_a": (1, 3, 2)}
    ledger.ledger.close()


class _Unheard:
    """A ledger whose connection is lost at the commit: before the server has heard of it, or after."""

    def __init__(self, ledger: Ledger, happened: bool) -> None:
        self.ledger, self._happened = ledger, happened

    def apply(self, batch: Batch) -> None:
        statements = dict(self.ledger._sql)
        if not self._happened:
            statements["commit"] = statements["rollback"]
        whole, self.ledger._sql = self.ledger._sql, statements
        try:
            self.ledger.apply([batch])
        finally:
            self.ledger._sql = whole
            self.ledger.close()
        raise StoreAway("the connection was lost")


WRONG = [
    {"key": None},  # what the table does not take
    {"prompt_tokens": "many"},  # what cannot be added
    {"time": 1e18},  # no day
]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: next(iter(wrong)))
def test_a_record_that_cannot_be_booked_is_left_out_and_stops_no_other(
    url: str, ledger: Ledger, wrong: dict[str, Any]
) -> None:
    ledger.positions(["a", "b"])
    records = [record("key_a") for _ in range(9)]
    records.insert(5, record(**{"key": "key_a"} | wrong))
    assert ledger.apply([Batch("a", 0, 50, records), Batch("b", 0, 9, [record("key_b")])]) == {"a", "b"}
    assert ledger.refused == 1
    assert ledger.positions(["a", "b"]) == {"a": 50, "b": 9}
    assert usage(url) == {"key_a": (9, 27, 18), "key_b": (1, 3, 2)}
    assert ledger.apply([Batch("a", 50, 60, [record("key_a")])]) == {"a"}
    assert ledger.refused == 1


def test_huge_counts_are_bounded(url: str, ledger: Ledger) -> None:
    ledger.positions(["a"])
    records = [record("key_a", prompt_tokens=2**63 - 1, completion_tokens=2**64 - 1) for _ in range(9)]
    assert ledger.apply([Batch("a", 0, 50, records)]) == {"a"}
    assert usage(url) == {"key_a": (9, 9 * MOST_TOKENS, 9 * MOST_TOKENS)}
    assert not ledger.refused


def test_a_row_that_is_full_takes_no_more_and_stops_no_other(url: str, ledger: Ledger) -> None:
    if url.startswith("sqlite"):
        pytest.skip("SQLite goes on in floating point")
    ledger.positions(["a"])
    ledger.apply([Batch("a", 0, 1, [record("key_a")])])
    with ledger._transaction():
        ledger._connection.execute("UPDATE usage SET prompt_tokens = 9223372036854775807")
    assert ledger.apply([Batch("a", 1, 2, [record("key_a"), record("key_b")])]) == {"a"}
    assert ledger.refused == 1
    assert usage(url)["key_b"] == (1, 3, 2)


def test_records_are_not_left_out_while_the_store_is_away(url: str, ledger: Ledger) -> None:
    ledger.positions(["a"])
    batch = Batch("a", 0, 50, [record("key_a"), record("key_a", prompt_tokens="many")])
    ledger._sql = ledger._sql | {"advance": "SELECT no_such_column FROM journals"}
    with pytest.raises(StoreAway):
        ledger.apply([batch])
    assert not ledger.refused


def test_a_finished_journal_never_counts_again_and_is_forgotten_late(url: str, ledger: Ledger) -> None:
    ledger.positions(["a", "b"])
    ledger.apply([Batch("a", 0, 50, [record("key_a")]), Batch("b", 0, 7, [])])
    assert ledger.apply([Batch("a", 50, FINISHED, [])]) == {"a"}
    assert ledger.apply([Batch("a", 0, 50, [record("key_a")])]) == set()
    assert ledger.positions(["a"]) == {"a": FINISHED}
    ledger.forget_journals(time.time() - 100)
    assert ledger.positions(["a"]) == {"a": FINISHED}
    ledger.forget_journals(time.time() + 100)
    assert ledger.positions(["a", "b"]) == {"a": 0, "b": 7}  # what is not finished is remembered for ever


def test_keys_come_with_their_version(url: str, ledger: Ledger) -> None:
    before, keys, captures = ledger.keys()
    assert (keys, captures) == ([], [])
    key, _ = Store(url).create_key(tenant="acme")
    assert ledger.version() != before
    version, keys, _ = ledger.keys()
    assert version == ledger.version()
    assert [(row["id"], row["tenant"], row["revoked"]) for row in keys] == [(key.id, "acme", None)]
    assert keys[0]["cache_salt"]


def test_what_a_month_has_cost_is_told_of_keys_with_a_budget(url: str, ledger: Ledger) -> None:
    from serving.tenants.key import KeyLimits

    limited, _ = Store(url).create_key(tenant="acme", limits=KeyLimits(tokens_per_month=100))
    free, _ = Store(url).create_key(tenant="acme")
    ledger.positions(["a"])
    new_year = 1_767_225_600  # 2026-01-01, 00:00 UTC
    records = [record(key.id, time=new_year + offset) for key in (limited, free) for offset in (-0.01, 0.0, 86_400.0)]
    ledger.apply([Batch("a", 0, 1, records)])
    assert ledger.spent("2026-01") == {limited.id: 10}
    assert ledger.spent("2025-12") == {limited.id: 15}
    assert ledger.spent("2026-02") == {}


def test_days_are_those_of_the_records_in_utc() -> None:
    midnight = 1_767_225_600
    rows = add_up(iter([record(time=midnight - 0.001), record(time=midnight), record(time=midnight - 86_400.5)]))
    assert [(row["day"], row["requests"]) for row in rows] == [("2025-12-30", 1), ("2025-12-31", 1), ("2026-01-01", 1)]


def test_rows_have_one_order_whoever_writes_them() -> None:
    rows = add_up(iter([record(key, model) for key in ("key_b", "", "key_a") for model in ("m2", "", "m1")]))
    order = [(row["day"], row["key"], row["model"]) for row in rows]
    assert order == sorted(order)
    assert len(order) == 9


def test_a_missing_store_is_away_and_is_not_made(tmp_path: Path) -> None:
    ledger = ledger_of(f"sqlite:///{tmp_path / 'missing.db'}")
    with pytest.raises(StoreAway, match="there is no"):
        ledger.version()
    assert not (tmp_path / "missing.db").exists()


def test_a_password_is_in_no_message(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    for url in (
        "postgresql://postgres:hunter2secret@127.0.0.1:1/x",
        "postgresql://postgres:hunter2secret@no.such.host.invalid/x",
        "postgresql://postgres@127.0.0.1:1/x?sslpassword=hunter2secret",
    ):
        with pytest.raises(StoreAway) as caught:
            ledger_of(url).version()
        assert "hunter2secret" not in str(caught.value)
        assert str(caught.value)
        assert caught.value.__cause__ is None
        assert caught.value.__suppress_context__


def test_a_locked_database_is_an_outage_and_no_hang(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.tenants.ledger.STATEMENT_LIMIT", 0.3)
    monkeypatch.setattr("serving.tenants.ledger.LOCK_LIMIT", 0.2)
    ledger, other = ledger_of(url), ledger_of(url)
    if url.startswith("sqlite"):
        ledger._arguments["timeout"] = 0.2
    ledger.positions(["a"])
    with other._transaction() as execute:
        execute("advance", id="a", old=0, new=1, now=1)  # holds the row
        start = time.monotonic()
        with pytest.raises(StoreAway):
            ledger.apply([Batch("a", 0, 5, [record("key_a")])])
        assert time.monotonic() - start < 30
    assert ledger.positions(["a"]) == {"a": 1}
    assert usage(url) == {}
    ledger.close()
    other.close()


def test_no_descriptor_is_left(url: str, ledger: Ledger) -> None:
    ledger.version()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        ledger.version()
        ledger.close()
        ledger.version()
    assert len(os.listdir("/proc/self/fd")) == before
