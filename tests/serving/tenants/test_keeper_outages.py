"""The keeper while PostgreSQL dies, hangs and comes back; and the whole gateway while it is killed."""

import asyncio
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from clients import cli
from loadtest.gateway.databases import Postgres
from loadtest.gateway.ledger import Place as Gateways
from loadtest.gateway.ledger import disagreements, kills
from loadtest.gateway.processes import upstream
from serving.gateway.settings import Settings
from serving.tenants import ledger
from serving.tenants.journal import Journal
from serving.tenants.keeper import start_keeper
from serving.tenants.keeper_config import write_config
from serving.tenants.key_table import KeyTable
from serving.tenants.store import Store
from tests.serving.tenants.stores import record
from tests.waiting import until


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    pytest.importorskip("psycopg")
    with tempfile.TemporaryDirectory(prefix="ma-") as folder:
        Path(folder).chmod(0o711)  # it may run as another user
        try:
            server = Postgres(Path(folder) / "pg")
        except RuntimeError as e:
            pytest.skip(str(e))
        with server:
            yield server


def test_usage_waits_for_a_database_that_dies_hangs_and_is_back(
    postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "TRANSACTION_LIMIT", 1.0)
    store = Store(postgres.url)
    store.upgrade()
    key, _ = store.create_key(tenant="acme")
    settings = Settings.from_engines(["m=http://127.0.0.1:1"], home=tmp_path, store={"url": postgres.url})
    write_config(settings, tmp_path / "accounts")
    said: list[str] = []
    keeper = start_keeper(tmp_path / "accounts", said.append)
    table = KeyTable(tmp_path / "accounts")
    assert table.journal is not None
    journal, count = Journal(table.journal, 2**16), 0

    def write(seconds: float) -> None:
        nonlocal count
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            journal.append(record(key.id).pack())
            journal.tick()
            count += 1
            time.sleep(0.001)

    def requests() -> int:
        return sum(row.requests for row in store.usage())

    write(1.0)
    postgres.kill()
    write(1.0)
    assert until(lambda: len(said) == 1)
    assert "the store is away" in said[0]
    postgres.start()
    write(0.5)
    assert until(lambda: requests() == count)
    assert len(said) == 2
    postgres.pause()  # connections stay, and nobody answers
    write(1.0)
    assert until(lambda: len(said) == 3)
    postgres.go_on()
    assert until(lambda: requests() == count)
    postgres.kill()
    write(0.5)
    journal.close()
    keeper.stop(3)  # it gives up, and the next gateway has the rest
    assert list((tmp_path / "journal").rglob("*.journal"))
    postgres.start()
    assert requests() < count
    write_config(settings, tmp_path / "again")
    keeper = start_keeper(tmp_path / "again", said.append)
    assert until(lambda: requests() == count)
    keeper.stop(10)
    assert sum(row.prompt_tokens + row.completion_tokens for row in store.usage()) == 5 * count
    assert list((tmp_path / "journal").iterdir()) == []


def printed(*arguments: str) -> str:
    """What a command prints, in this process."""
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as end:
        cli.main(list(arguments))
    assert end.value.code == 0
    return out.getvalue()


@pytest.mark.skipif(sys.platform != "linux", reason="workers outlive their supervisor there")
@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
def test_kills_of_the_gateway_under_load_lose_nothing_and_count_nothing_twice(
    tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.gateway.ledger.medassist", printed)  # a process for each takes its time
    with upstream(tmp_path, "--delay", "0.005") as engine:
        place = Gateways(tmp_path / "gateway", engine.url, workers=1)
        truth, killed = asyncio.run(kills(place, count, concurrency=4, seed=3, longest=0.5 * count))
        with place.gateway():
            written = place.settled(truth)
    assert disagreements(truth, written) == []
    assert killed["all processes"] == count
    assert truth.statuses[200] > 10 * count
    assert list((tmp_path / "gateway" / "home" / "journal").rglob("*.journal")) == []
