"""The keeper: what workers write down is in the ledger and in the audit log once, whatever ends when."""

import contextlib
import json
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serving.gateway.metrics import Metrics
from serving.gateway.settings import Settings, restart_only
from serving.tenants.audit import AuditLog
from serving.tenants.bookkeeping import KeeperFailed
from serving.tenants.journal import Journal
from serving.tenants.keeper import POLL, Keeper, start_keeper
from serving.tenants.keeper_config import examine, write_config
from serving.tenants.key import KeyLimits
from serving.tenants.key_table import KeyTable
from serving.tenants.ledger import FINISHED, Ledger, StoreAway
from serving.tenants.store import Store
from tests.serving.tenants.stores import record
from tests.waiting import until


class Place:
    """A home folder with a store, and gateways' keepers on it."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.home = home
        self.url = f"sqlite:///{home / 'medassist.db'}"
        self.store = Store(self.url)
        self.store.upgrade()
        self.settings = Settings.from_engines(["demo=http://127.0.0.1:1"], home=home, **settings)
        self.said: list[str] = []
        self._count = 0

    @contextlib.contextmanager
    def keeper(self, **settings: Any) -> Iterator[tuple[Keeper, KeyTable]]:
        self._count += 1
        folder = self.home / f"accounts-{self._count}"
        config = write_config(self.settings.model_copy(update=settings), folder)
        assert config is not None
        keeper = start_keeper(folder, self.said.append)
        try:
            yield keeper, KeyTable(folder)
        finally:
            keeper.stop(20)

    def requests(self) -> int:
        return sum(row.requests for row in self.store.usage())

    def tokens(self) -> int:
        return sum(row.prompt_tokens + row.completion_tokens for row in self.store.usage())

    def audited(self) -> list[str]:
        """Ids of the requests in the audit log."""
        lines = [line for path in sorted((self.home / "audit").glob("*.jsonl")) for line in path.open()]
        events = [json.loads(line) for line in lines]
        return [event["request_id"] for event in events if event["event"] == "request"]

    def events(self) -> list[str]:
        lines = [line for path in sorted((self.home / "audit").glob("*.jsonl")) for line in path.open()]
        return [json.loads(line)["event"] for line in lines]

    def digest(self, key: str) -> bytes:
        """Of a key's secret."""
        with contextlib.closing(sqlite3.connect(self.home / "medassist.db")) as database:
            return bytes.fromhex(database.execute("SELECT digest FROM keys WHERE id = ?", (key,)).fetchone()[0])

    def journals(self) -> list[Path]:
        return sorted((self.home / "journal").rglob("*.journal"))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def journal_of(table: KeyTable, size: int = 2**16) -> Journal:
    assert table.journal is not None
    return Journal(table.journal, size)


def test_records_arrive_while_workers_run_and_nothing_is_left_at_the_end(place: Place) -> None:
    key, _ = place.store.create_key(tenant="acme")
    with place.keeper() as (_, table):
        one, two = journal_of(table), journal_of(table)
        for number in range(100):
            one.append(record(key.id, request_id=f"one-{number}").pack())
            two.append(record(key.id, "other", request_id=f"two-{number}", estimated=True).pack())
        assert until(lambda: place.requests() == 200)
        for number in range(100, 400):  # more than a segment
            one.append(record(key.id, request_id=f"one-{number}").pack())
            one.tick()
        one.close()
        two.close()
    rows = place.store.usage()
    assert {row.model: (row.requests, row.estimated) for row in rows} == {"demo": (400, 0), "other": (100, 100)}
    assert place.tokens() == 500 * 5
    assert sorted(place.audited()) == sorted([f"one-{n}" for n in range(400)] + [f"two-{n}" for n in range(100)])
    assert "gateway.started" in place.events()[:2]
    assert place.events()[-1] == "gateway.stopped"
    assert list((place.home / "journal").iterdir()) == []
    assert place.said == []


def test_the_head_of_the_audit_log_is_in_the_store(place: Place) -> None:
    with place.keeper():
        pass
    facts = {row[0]: row[1] for row in sqlite3.connect(place.home / "medassist.db").execute("SELECT * FROM facts")}
    log = AuditLog(place.home / "audit", bytes.fromhex(facts["audit_secret"]), 10)
    row = sqlite3.connect(place.home / "medassist.db").execute("SELECT log, sequence, hash FROM audit_heads").fetchone()
    assert row == (log.log_id, *log.head)


def test_a_revoked_key_is_gone_within_five_seconds(place: Place) -> None:
    key, _ = place.store.create_key(tenant="acme")
    with place.keeper() as (_, table):
        digest = next(iter(table._by_digest))
        as_of = table.as_of
        place.store.revoke(key.id)
        assert until(lambda: (table.refresh(), table.find(digest) is None)[1])
        assert POLL <= 2  # the rest of the five seconds is for a busy machine
        assert table.required
        assert until(lambda: (table.refresh(), table.as_of > as_of)[1])


def test_spending_is_told_of_keys_with_a_budget(place: Place) -> None:
    key, _ = place.store.create_key(tenant="acme", limits=KeyLimits(tokens_per_month=100))
    with place.keeper() as (_, table):
        journal = journal_of(table)
        journal.append(record(key.id).pack())
        assert until(lambda: (table.refresh(), table.spent(key.id) == 5)[1])
        journal.close()


def test_what_a_dead_gateway_has_left_is_taken_over(place: Place) -> None:
    with place.keeper() as (_, table):
        folder = table.journal
    assert folder is not None
    folder.mkdir()  # as if it had been killed
    journal = Journal(folder)
    for number in range(10):
        journal.append(record("key_a", request_id=f"left-{number}").pack())
    journal.close()
    with place.keeper():
        assert until(lambda: place.requests() == 10)
    assert place.audited() == [f"left-{n}" for n in range(10)]
    assert not folder.exists()


def test_gateways_of_one_home_share_it(place: Place) -> None:
    with place.keeper() as (_, first), place.keeper() as (_, second):
        assert first.journal != second.journal
        journals = [journal_of(first), journal_of(second)]
        for number in range(100):
            journals[number % 2].append(record("key_a", request_id=f"{number}").pack())
        assert until(lambda: place.requests() == 100)
        for journal in journals:
            journal.close()
    assert place.requests() == 100
    assert sorted(place.audited(), key=int) == [str(number) for number in range(100)]


def test_a_journal_that_was_finished_does_not_count_when_it_comes_back(place: Place) -> None:
    with place.keeper() as (_, table):
        journal = journal_of(table)
        journal.append(record("key_a").pack())
        path = place.journals()[0]
        content = path.read_bytes()
        journal.close()
    left = path.parent
    left.mkdir()
    path.write_bytes(content)  # as a restored disk has it
    with place.keeper():
        assert until(lambda: not path.exists())
    assert place.requests() == 1


def test_a_key_that_is_made_later_is_required_at_once(place: Place) -> None:
    with place.keeper() as (_, table):
        assert not table.required
        place.store.create_key(tenant="acme")
        assert until(lambda: (table.refresh(), table.required)[1])


def test_a_record_of_another_version_stops_nothing(place: Place) -> None:
    with place.keeper() as (_, table):
        journal = journal_of(table)
        journal.append(b'["of another version"]')
        journal.append(record("key_a").pack())
        journal.append(b"not even JSON")
        journal.close()
    assert place.requests() == 1
    assert place.journals() == []
    assert any("2 records" in line for line in place.said)


def test_a_record_that_the_store_does_not_take_is_told_and_stops_nothing(place: Place) -> None:
    with place.keeper() as (_, table):
        journal = journal_of(table)
        for line in (record("key_a"), record("key_a", tenant=None), record("key_b", model=None), record("key_a")):
            journal.append(line.pack())
        journal.close()
    assert place.requests() == 2
    assert place.journals() == []
    assert any("2 records were left out" in line for line in place.said)
    assert not any("away" in line for line in place.said)


def test_the_ledger_waits_while_the_store_is_locked_and_the_audit_log_does_not(place: Place) -> None:
    with place.keeper() as (keeper, table):
        assert keeper._ledger is not None
        keeper._ledger._arguments["timeout"] = 0.1
        keeper._ledger.close()  # the next one has it
        locker = sqlite3.connect(place.home / "medassist.db", isolation_level=None)
        locker.execute("BEGIN IMMEDIATE")
        journal = journal_of(table)
        journal.append(record("key_a", request_id="meanwhile").pack())
        assert until(lambda: place.audited() == ["meanwhile"])
        assert until(lambda: bool(place.said))
        state = place.home / "accounts-1" / "keeper.json"
        assert until(lambda: json.loads(state.read_text())["store_up"] == 0)
        assert json.loads(state.read_text())["lag_bytes"] > 0
        locker.execute("ROLLBACK")
        assert until(lambda: place.requests() == 1)
        journal.close()
    assert len(place.said) == 2
    assert "the store is away" in place.said[0]
    assert "the store is back" in place.said[1]


def test_a_store_that_can_only_be_read_is_away_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with place.keeper() as (_, table):
        with monkeypatch.context() as patched:
            tries = []

            def read_only(*arguments: Any) -> set[str]:
                tries.append(1)
                raise StoreAway("cannot execute UPDATE in a read-only transaction")

            patched.setattr(Ledger, "apply", read_only)
            journal = journal_of(table)
            journal.append(record("key_a").pack())
            assert until(lambda: len(tries) >= 3)
        assert until(lambda: place.requests() == 1)
        assert until(lambda: len(place.said) == 2)
        journal.close()
    assert "read-only" in place.said[0]
    assert "is back" in place.said[1]


def test_an_audit_log_that_cannot_be_written_holds_up_nobody_else(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.keeper() as (_, table):
        journal = journal_of(table)
        with monkeypatch.context() as patched:

            def full(*arguments: Any) -> None:
                raise OSError(28, "No space left on device")

            patched.setattr(AuditLog, "append", full)
            journal.append(record("key_a", request_id="a").pack())
            assert until(lambda: place.requests() == 1)
            assert place.audited() == []
            assert until(lambda: len(place.said) == 1)
        assert until(lambda: place.audited() == ["a"])
        journal.close()
    assert place.audited() == ["a"]
    assert "No space left" in place.said[0]
    assert len(place.said) == 2


def test_without_a_store_there_is_a_request_log(tmp_path: Path) -> None:
    settings = Settings.from_engines(
        ["demo=http://127.0.0.1:1"], home=tmp_path, log={"requests": True, "file": str(tmp_path / "log.jsonl")}
    )
    config = write_config(settings, tmp_path / "accounts")
    assert config is not None
    keeper = start_keeper(tmp_path / "accounts", print)
    table = KeyTable(tmp_path / "accounts")
    assert not table.required
    assert table.as_of == 0.0
    journal = journal_of(table)
    for number in range(1000):
        journal.append(record(request_id=f"r{number}").pack())
        journal.tick()
    journal.close()
    keeper.stop(10)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    assert len(lines) == 1000
    assert list((tmp_path / "journal").iterdir()) == []


def test_nothing_to_keep_needs_no_keeper(tmp_path: Path) -> None:
    settings = Settings.from_engines(["demo=http://127.0.0.1:1"], home=tmp_path)
    assert write_config(settings, tmp_path / "accounts") is None
    assert not examine(settings).keys


def test_the_configuration_is_private_and_does_not_stay(place: Place) -> None:
    path = write_config(place.settings, place.home / "accounts")
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    start_keeper(path.parent, print).stop(5)
    assert not path.exists()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.5", "example.org"])
def test_others_are_served_only_with_keys(place: Place, host: str) -> None:
    settings = place.settings.model_copy(update={"host": host})
    with pytest.raises(ValueError, match="medassist keys create"):
        examine(settings)
    place.store.create_key(tenant="acme")
    assert examine(settings).keys


def test_this_machine_is_served_without_keys(place: Place) -> None:
    for host in ("127.0.0.1", "::1", "localhost", "127.8.0.1"):
        assert not examine(place.settings.model_copy(update={"host": host})).keys


def test_a_store_that_is_away_at_the_start_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    store = {"url": "postgresql://postgres@127.0.0.1:1/medassist"}
    settings = Settings.from_engines(["demo=http://127.0.0.1:1"], home=tmp_path, store=store)
    with pytest.raises(ValueError, match="nobody knows whether requests need a key"):
        examine(settings)


def test_a_store_that_goes_before_the_keeper_starts_is_an_error(place: Place) -> None:
    write_config(place.settings, place.home / "accounts")
    (place.home / "medassist.db").unlink()
    with pytest.raises(KeeperFailed, match="the store cannot be used"):
        start_keeper(place.home / "accounts", print)
    assert list((place.home / "journal").iterdir()) == []


def test_an_older_store_says_which_command_helps(place: Place) -> None:
    from serving.tenants.database import revisions

    place.store.downgrade(revisions()[0])
    with pytest.raises(ValueError, match="medassist store upgrade"):
        examine(place.settings)


def test_a_change_of_the_settings_is_audited(place: Place) -> None:
    file = place.home / "gateway.json"
    file.write_text("{}")
    write_config(place.settings, place.home / "accounts", file)
    keeper = start_keeper(place.home / "accounts", print)
    file.write_text('{"changed": true}')
    assert until(lambda: "settings.changed" in place.events())
    keeper.stop(10)


def test_metrics_tell_how_the_keeper_does(place: Place) -> None:
    with place.keeper() as (_, table):
        journal = journal_of(table)
        journal.append(record("key_a").pack())
        assert until(lambda: place.requests() == 1)
        metrics = Metrics()
        metrics.keeper_folder = place.home / "accounts-1"

        def shown() -> dict[str, float]:
            lines = metrics.render()[0].decode().splitlines()
            return {line.split()[0]: float(line.split()[1]) for line in lines if not line.startswith("#")}

        assert until(lambda: shown()["medassist_ledger_batches"] >= 1)
        found = shown()
        journal.close()
    assert found["medassist_store_up"] == 1
    assert found["medassist_store_outages"] == 0
    assert found["medassist_ledger_lag_bytes"] == 0
    assert 0 <= found["medassist_keys_age_seconds"] < 10


def test_what_a_reload_does_not_change_is_known(place: Place) -> None:
    old = place.settings
    new = old.model_copy(update={"port": 9, "drain": 1.0, "store": type(old.store)(url="sqlite:///other.db")})
    assert restart_only(old, new) == ["port", "store"]
    assert restart_only(old, old) == []


GATEWAY = """
import os, sys, time
from pathlib import Path
from serving.tenants.journal import Journal
from serving.tenants.keeper import start_keeper
from serving.tenants.key_table import KeyTable
from tests.serving.tenants.stores import record
accounts, run = Path(sys.argv[1]), sys.argv[2]
keeper = start_keeper(accounts, print)
journal, number = Journal(KeyTable(accounts).journal, 65536), 0
while True:
    line = record("key_a", request_id=f"{run}-{number}").pack()
    journal.append(line)
    number += 1
    journal.tick()
    os.write(1, b"%d %d\\n" % (number, len(journal._waiting)))
    time.sleep(0.0005)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_kills_at_any_moment_lose_nothing_and_count_nothing_twice(place: Place, kills: int) -> None:
    """Keeper and worker in one process, which is killed again and again."""
    chance = random.Random(7)
    expected: dict[int, tuple[int, int]] = {}
    for run in range(kills):
        folder = place.home / f"run-{run}"
        write_config(place.settings, folder)
        command = [sys.executable, "-c", GATEWAY, folder, str(run)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(chance.uniform(0.3, 1.6))  # the keeper looks every half second
            process.send_signal(signal.SIGKILL)
            said = process.stdout.read().split(b"\n")
        number, waiting = map(int, said[-2].split())
        expected[run] = (number - waiting, number + 1)
    with place.keeper():
        assert until(lambda: not place.journals(), 30)
    audited = place.audited()
    assert len(audited) == len(set(audited))
    assert place.requests() == len(audited)
    for run, (least, most) in expected.items():
        numbers = sorted(int(name.partition("-")[2]) for name in audited if name.startswith(f"{run}-"))
        assert numbers == list(range(len(numbers)))
        assert least <= len(numbers) <= most
    positions = sqlite3.connect(place.home / "medassist.db").execute("SELECT DISTINCT position FROM journals")
    assert positions.fetchall() == [(FINISHED,)]
    assert place.journals() == []
