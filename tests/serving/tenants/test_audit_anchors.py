"""What ties the audit log to its place and its time: an older copy of it, another one or none does not go unseen."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.tenants import audit_verify
from serving.tenants.audit import AuditLog
from serving.tenants.audit_files import LOG_ID
from serving.tenants.audit_verify import events, log_id
from serving.tenants.intake import News
from serving.tenants.ledger import Ledger
from serving.tenants.sinks import Sinks
from serving.tenants.statements import compile_statements, connect_arguments
from serving.tenants.store import Store
from tests.serving.tenants.stores import record
from tests.serving.tenants.test_audit import SECRET, Clock, check, files, request, three_days


@pytest.fixture
def clock() -> Iterator[Clock]:
    with pytest.MonkeyPatch.context() as patch:
        yield Clock(patch)


@pytest.fixture
def folder(tmp_path: Path, clock: Clock) -> Path:
    return tmp_path / "home" / "audit"


def put_back(copy: Path, folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(copy, folder)


def damages(folder: Path) -> list[str]:
    return [event["what"] for event in events(folder) if event["event"] == "audit.damaged"]


def test_an_older_copy_is_noticed_by_the_process_that_appends(folder: Path, tmp_path: Path) -> None:
    log = AuditLog(folder, SECRET, 365)
    log.append([request(1)])
    shutil.copytree(folder, tmp_path / "copy")
    log.append([request(2), request(3)])
    put_back(tmp_path / "copy", folder)
    assert check(folder).ok, "it is whole by itself"
    log.append([request(4)])
    assert damages(folder) == ["the line with number 4, that was the last one, is not in it"]
    assert not check(folder).ok
    assert log.positions == {"worker-0": 400}
    log.append([request(5)])
    assert len(damages(folder)) == 1
    # As long as before, or longer, and other lines.
    for more in (1, 3):
        shutil.rmtree(tmp_path / "copy")
        shutil.copytree(folder, tmp_path / "copy")
        log.append([request(6)])
        put_back(tmp_path / "copy", folder)
        AuditLog(folder, SECRET, 365).append([request(7 + number) for number in range(more)])
        log.append([request(20)])
        assert len(damages(folder)) == (2 if more == 1 else 3)


def test_other_processes_that_append_are_no_damage(folder: Path, clock: Clock) -> None:
    one, other = AuditLog(folder, SECRET, 2), AuditLog(folder, SECRET, 2)
    for number in range(12):
        (one, other)[number % 2].append([request(number)])
        assert one.compare(other.head)
        if number % 3 == 0:
            clock.next_day()
    stored = one.head
    clock.next_day(9)
    for _ in range(2):
        other.append([request(99)])
    assert one.compare(stored), "retention has removed that line"
    assert one.compare(None)
    assert damages(folder) == []
    assert check(folder, stored).ok


def test_an_older_copy_that_a_start_finds_does_not_become_the_store_s(folder: Path, tmp_path: Path) -> None:
    log = AuditLog(folder, SECRET, 365)
    log.append([request(1)])
    shutil.copytree(folder, tmp_path / "copy")
    log.append([request(2)])
    stored = log.head
    put_back(tmp_path / "copy", folder)
    again = AuditLog(folder, SECRET, 365)
    assert not again.compare(stored)
    assert damages(folder) == ["the line with number 3, that the store knows, is not in it"]
    again.append([request(3), request(4)])
    for log in (again, AuditLog(folder, SECRET, 365)):
        assert not log.compare(stored)
    assert len(damages(folder)) == 1, "it is told once"
    assert "is not the line that the store knows: the log was written anew" in [
        problem.text for problem in check(folder, stored).problems
    ]


def test_a_log_that_is_removed_or_another_s_is_found(folder: Path, tmp_path: Path) -> None:
    log = AuditLog(folder, SECRET, 365)
    log.append([request(n) for n in range(5)])
    own, stored = log.log_id, log.head
    assert (folder.parent / LOG_ID).read_text() == f"{own}\n"

    shutil.rmtree(folder)
    assert log_id(folder, SECRET) == own
    assert "there is no log" in check(folder, stored).problems[0].text
    again = AuditLog(folder, SECRET, 365)
    assert again.log_id == own
    assert not again.compare(stored)
    assert damages(folder)
    assert not check(folder, stored).ok
    assert log.compare(None)
    assert len(damages(folder)) == 2, "the process that has written the old one says so, too"

    other = AuditLog(tmp_path / "other/audit", SECRET, 365)
    other.append([request(n) for n in range(9)])
    put_back(tmp_path / "other/audit", folder)
    assert [p.text for p in check(folder, stored).problems][:1] == [
        f"it is of log {other.log_id}, in the place of this home's, {own}"
    ]
    again = AuditLog(folder, SECRET, 365)
    assert again.log_id == own
    assert damages(folder) == [f"log {other.log_id} is in the place of log {own}"]

    put_back(tmp_path / "other/audit", folder)
    (folder.parent / LOG_ID).unlink()
    assert check(folder).problems[0].file == LOG_ID
    AuditLog(folder, SECRET, 365)
    assert len(damages(folder)) == 1
    assert not check(folder).ok


def test_verifying_holds_up_nobody(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = AuditLog(folder, SECRET, 365)
    log.append([request(1)])
    run, reports = audit_verify._Verifier.run, []

    def meanwhile(verifier: Any, known: Any) -> None:
        AuditLog(folder, SECRET, 365, patience=0.0).append([request(2)])
        run(verifier, known)
        reports.append(verifier.report)

    monkeypatch.setattr(audit_verify._Verifier, "run", meanwhile)
    report = check(folder, log.head)
    assert (report.ok, report.last, len(reports)) == (True, 2, 1)


def test_retention_under_a_verification_is_no_problem(
    folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    three_days(folder, clock)
    run, reports = audit_verify._Verifier.run, []

    def meanwhile(verifier: Any, known: Any) -> None:
        reports.append(verifier.report)
        if len(reports) == 1:
            clock.next_day(9)
            AuditLog(folder, SECRET, 10)
        run(verifier, known)

    monkeypatch.setattr(audit_verify._Verifier, "run", meanwhile)
    report = check(folder)
    assert (report.ok, report.first, len(reports)) == (True, 6, 2)


@pytest.mark.parametrize("day", ["2020-01-01", "2026-09-24", "2099-01-01"])
def test_a_file_that_is_nobody_s_stops_nothing(folder: Path, clock: Clock, day: str) -> None:
    three_days(folder, clock)
    junk = folder / f"audit-{day}.jsonl"
    content = files(folder)[0].read_bytes()
    junk.write_bytes(content)
    for days in (9, 30):
        clock.next_day(days)
        log = AuditLog(folder, SECRET, 10)
        log.append([request(7)])
    (kept,) = [path for path in files(folder) if path != junk]
    assert junk.read_bytes() == content
    assert not check(folder).ok
    left_out: list[int] = []
    shown = list(events(folder, secret=SECRET, left_out=lambda: left_out.append(1)))
    assert len(shown) == len(kept.read_bytes().splitlines())
    assert len(left_out) == (0 if day < "2026-11" else 5), "none of a removed day"


def test_the_store_gets_the_last_line_only_of_a_log_that_has_the_one_before(folder: Path, tmp_path: Path) -> None:
    folder.parent.mkdir()
    url = f"sqlite:///{folder.parent}/medassist.db"
    with Store(url) as store:
        store.upgrade()
        ledger = Ledger({**connect_arguments(url), "statements": compile_statements(url)})
        config = {"audit": {"folder": str(folder), "secret": SECRET.hex(), "requests": True, "retention_days": 365}}
        sinks = Sinks({**config, "log": None, "tracing": None}, "g", print)
        sinks.anchor(ledger)
        assert store.audit_heads() == {}
        sinks.event("gateway.started")
        sinks.anchor(ledger)
        log = AuditLog(folder, SECRET, 365)
        assert store.audit_heads() == {log.log_id: log.head}
        shutil.copytree(folder, tmp_path / "copy")
        sinks.event("settings.changed")
        sinks.anchor(ledger)
        assert sinks.audit([News("journal", [record("key_a", seconds=0.1234567890123)], [100], 100)])
        assert b'"seconds":0.123457,' in files(folder)[0].read_bytes()
        sinks.anchor(ledger)
        stored = store.audit_heads()
        put_back(tmp_path / "copy", folder)
        sinks = Sinks({**config, "log": None, "tracing": None}, "g", print)
        for _ in range(3):
            sinks.anchor(ledger)
            sinks.event("settings.changed")
        assert store.audit_heads() == stored
        assert len(damages(folder)) == 1
        ledger.close()
