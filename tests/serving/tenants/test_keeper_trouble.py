"""The keeper while something that it needs is gone, locked or full: what does not need that goes on."""

import os
import shutil
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from serving.tenants import audit, intake, keeper, sinks
from serving.tenants.audit import AuditLog
from serving.tenants.audit_files import locked
from serving.tenants.intake import Intake, News
from serving.tenants.journal import Journal
from serving.tenants.key_table import KeyTable
from serving.tenants.ledger import Ledger, StoreAway
from serving.tenants.record import Record
from tests.serving.tenants.stores import ledger_of, record
from tests.serving.tenants.test_keeper import Place, journal_of
from tests.waiting import until

SECRET = b"s" * 32


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(sinks, "PATIENCE", 0.05)
    monkeypatch.setattr(sinks, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(sinks, "LONGEST_PAUSE", 0.2)
    return Place(tmp_path)


def keys_go_on(place: Place, table: KeyTable) -> bool:
    """Whether a new key arrives, and its revocation."""
    key, _ = place.store.create_key(tenant="acme")
    digest = place.digest(key.id)
    arrived = until(lambda: (table.refresh(), table.find(digest))[1])
    place.store.revoke(key.id)
    return arrived and until(lambda: (table.refresh(), table.find(digest) is None)[1])


def test_who_holds_the_audit_logs_lock_holds_up_nobody_else(place: Place) -> None:
    with place.keeper():
        pass
    with locked(place.home / "audit", exclusive=False), place.keeper() as (_, table):  # such as a verifier
        journal = journal_of(table)
        journal.append(record("key_a", request_id="a").pack())
        assert until(lambda: place.requests() == 1)
        assert keys_go_on(place, table)
        assert place.audited() == []
        journal.close()
    with place.keeper():
        assert until(lambda: place.audited() == ["a"])
    assert "the audit log cannot be written (another process has its lock)" in place.said[0]


def test_a_log_that_is_locked_for_a_while_gets_all(place: Place) -> None:
    with place.keeper() as (_, table):
        journal = journal_of(table)
        with locked(place.home / "audit"):
            for number in range(20):
                journal.append(record("key_a", request_id=f"{number}").pack())
            assert until(lambda: place.requests() == 20)
        assert until(lambda: len(place.audited()) == 20)
        journal.close()
    assert place.audited() == [str(number) for number in range(20)]
    assert place.said[-1] == "the audit log is written again"


def test_what_a_gateway_has_to_say_of_itself_waits_for_the_log(place: Place) -> None:
    config = {"folder": str(place.home / "audit"), "secret": SECRET.hex(), "requests": True, "retention_days": 30}
    found = sinks.Sinks({"audit": config, "log": None, "tracing": None}, "gateway", place.said.append)
    with locked(place.home / "audit"):
        found.event("gateway.started")
        assert place.said
    found.event("gateway.stopped")
    assert place.events()[1:] == ["gateway.started", "gateway.stopped"]


def test_a_journal_folder_that_is_removed_is_made_again_and_nothing_is_lost(place: Place) -> None:
    with place.keeper() as (_, table):
        journal = journal_of(table)
        journal.append(record("key_a", request_id="before").pack())
        assert until(lambda: place.requests() == 1 and place.audited() == ["before"])
        assert table.journal is not None
        shutil.rmtree(table.journal)
        journal.append(record("key_a", request_id="meanwhile").pack())
        assert keys_go_on(place, table)
        assert until(lambda: (journal.tick(), place.requests() == 2)[1])
        journal.append(record("key_a", request_id="after").pack())
        assert until(lambda: place.requests() == 3)
        journal.close()
    assert place.requests() == 3
    assert place.audited() == ["before", "meanwhile", "after"]
    assert [line for line in place.said if "made again" in line] == place.said


def test_an_adopted_folder_that_is_deleted_costs_only_itself(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.keeper() as (_, table):
        left = table.journal
    assert left is not None
    left.mkdir()
    held = Journal(left)  # its worker lives still
    with place.keeper() as (kept, table):
        assert until(lambda: [folder.path for folder in kept._adopted] == [left])
        shutil.rmtree(left)
        assert until(lambda: not kept._adopted)
        journal = journal_of(table)
        journal.append(record("key_a").pack())
        assert until(lambda: place.requests() == 1)
        assert keys_go_on(place, table)
        journal.close()
    held.close()


def test_a_folder_that_cannot_be_read_costs_only_itself(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.keeper() as (_, table):
        left = table.journal
    assert left is not None
    left.mkdir()
    held = Journal(left)
    original, broken = intake.segments, [True]

    def segments(folder: Path) -> list[Path]:
        if folder == left and broken:
            raise PermissionError(13, "Permission denied")
        return original(folder)

    monkeypatch.setattr(intake, "segments", segments)
    held.append(record("key_a").pack())
    with place.keeper() as (_, table):
        assert until(lambda: bool(place.said))
        assert keys_go_on(place, table)
        journal = journal_of(table)
        journal.append(record("key_a").pack())
        assert until(lambda: place.requests() == 1)
        broken.clear()
        assert until(lambda: place.requests() == 2)
        journal.close()
        held.close()
    assert [line for line in place.said if str(left) in line] == place.said
    assert len(place.said) == 1


def test_a_journal_that_cannot_be_deleted_holds_up_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched, place.keeper() as (_, table):

        def refuse(path: Path) -> None:
            raise PermissionError(1, "Operation not permitted")

        patched.setattr(intake, "remove", refuse)
        first = journal_of(table)
        first.append(record("key_a").pack())
        first.close()
        assert until(lambda: place.requests() == 1 and bool(place.said))
        for _ in range(4):
            other = journal_of(table)
            other.append(record("key_a").pack())
            other.close()
        assert until(lambda: place.requests() == 5)
        assert keys_go_on(place, table)
    assert len(place.said) == len({line.split()[0] for line in place.said})  # once for each
    with place.keeper():
        assert until(lambda: not place.journals())
    assert place.requests() == 5


def test_an_audit_folder_that_is_gone_holds_up_nothing(place: Place) -> None:
    home = place.home
    with place.keeper() as (_, table):
        first = journal_of(table)
        first.append(record("key_a", request_id="a").pack())
        assert until(lambda: place.audited() == ["a"])
        (home / "audit").rename(home / "elsewhere")
        (home / "audit").write_text("in its place")
        second = journal_of(table)
        second.append(record("key_a", request_id="b").pack())
        assert until(lambda: place.requests() == 2)
        assert keys_go_on(place, table)
        (home / "audit").unlink()
        (home / "elsewhere").rename(home / "audit")
        assert until(lambda: place.audited() == ["a", "b"])
        first.close()
        second.close()
    assert place.audited() == ["a", "b"]


class Away:
    """Readers whose audit log cannot be written."""

    audits = True
    ready = True

    def __init__(self) -> None:
        self.told = 0

    def audited(self) -> Mapping[str, int]:
        return {}

    def audit(self, news: Sequence[News]) -> bool:
        return False

    def tell(self, records: Sequence[Record]) -> None:
        self.told += len(records)

    def forget(self, journal: str) -> None:
        pass


@pytest.mark.parametrize("ready", [True, False])
def test_an_audit_log_that_stays_behind_slows_nobody_down(tmp_path: Path, ready: bool) -> None:
    journal, number = Journal(tmp_path, 2**21), 0
    while journal._position < 3 * intake.BUDGET:
        journal.append(record("key_a").pack())
        number += 1
    readers = Away()
    readers.ready = ready
    reader = Intake(readers, lambda line: None)
    reader.look(tmp_path, own=True)
    name = next(iter(reader.sources))
    reader.place(name, 0)
    booked, rounds = 0, 0
    while booked < number:
        batches, _ = reader.collect(ledger=True)
        for batch in batches:
            booked += len(batch.records)
            reader.place(name, batch.new)
        rounds += 1
        assert rounds <= 5
    assert readers.told == number
    assert reader.collect(ledger=True) == ([], False)  # it does not try again at once
    journal.close()
    assert reader.collect(ledger=True) == ([], False)
    assert not reader.sources[name].finished


def test_revocations_arrive_while_the_ledger_waits(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when somebody has locked its table."""

    def locked_table(*arguments: Any) -> set[str]:
        raise StoreAway("canceling statement due to lock timeout")

    monkeypatch.setattr(keeper, "FIRST_PAUSE", 600.0)
    monkeypatch.setattr(keeper, "LONGEST_PAUSE", 600.0)
    with place.keeper() as (_, table):
        monkeypatch.setattr(Ledger, "apply", locked_table)
        journal = journal_of(table)
        journal.append(record("key_a").pack())
        assert until(lambda: bool(place.said))
        assert keys_go_on(place, table)
        journal.close()


def test_a_database_that_is_put_into_the_place_of_another_is_used(place: Place) -> None:
    database = place.home / "medassist.db"
    ledger = ledger_of(place.url)
    place.store.create_key(tenant="acme")
    copy = place.home / "copy.db"
    with sqlite3.connect(database) as source, sqlite3.connect(copy) as target:
        source.backup(target)
    target.close()
    source.close()
    place.store.create_key(tenant="acme")
    assert len(ledger.keys()[1]) == 2
    os.replace(copy, database)
    assert len(ledger.keys()[1]) == 1
    database.unlink()
    with pytest.raises(StoreAway, match="there is no"):
        ledger.version()
    ledger.close()


def test_positions_are_kept_of_journals_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def event(journal: str) -> dict[str, Any]:
        return {"event": "request", "journal": journal, "offset": 100}

    monkeypatch.setattr(audit, "CHECKPOINT", 10)
    living = {"one"}
    log = AuditLog(tmp_path / "audit", SECRET, 365, living=lambda: living)
    other = AuditLog(tmp_path / "audit", SECRET, 365)
    for number in range(30):
        other.append([event(f"other-{number}")])
    log.append([event("one"), event("two")])
    assert len(log.positions) == 32
    for _ in range(11):
        log.append([event("one")])
    assert log.positions == {"one": 100}
    assert AuditLog(tmp_path / "audit", SECRET, 365).positions == {"one": 100}


def test_gateways_of_one_home_forget_each_others_journals(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "CHECKPOINT", 1)
    with place.keeper() as (first, table), place.keeper() as (_, other):
        for number in range(4):
            journal = journal_of(other)
            journal.append(record("key_a").pack())
            journal.close()
            assert until(lambda number=number: place.requests() == number + 1 and not place.journals())
        journal = journal_of(table)
        for number in range(3):
            journal.append(record("key_a", request_id=f"mine-{number}").pack())
            assert until(lambda number=number: f"mine-{number}" in place.audited())
        log = first._sinks._audit
        assert log is not None
        assert set(log.positions) <= {path.name for path in place.journals()}
        journal.close()
