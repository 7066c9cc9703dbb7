"""A gateway that was started before there was a key, and what it finds out before it serves."""

import asyncio
import json
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import uvloop

from serving.gateway.settings import Settings, load
from serving.tenants import bookkeeping
from serving.tenants.announcing import announce_in, make_home
from serving.tenants.bookkeeping import Bookkeeping
from serving.tenants.journal import Journal
from serving.tenants.keeper_config import examine, write_config
from serving.tenants.key_table import KeyTable
from serving.tenants.store import Store, StoreError
from serving.tenants.store_url import URL_VARIABLE
from tests.serving.gateway.doubles import Engine
from tests.serving.gateway.test_workers import gateway, write_settings
from tests.serving.tenants.stores import record
from tests.waiting import eventually


def settings_in(home: Path, **more: Any) -> Settings:
    return Settings.from_engines(["demo=http://127.0.0.1:1"], home=home, **more)


def make_store(home: Path) -> Store:
    make_home(home)
    store = Store(f"sqlite:///{home / 'medassist.db'}")
    store.upgrade()
    return store


@pytest.mark.parametrize("logs", [False, True], ids=["nothing", "a request log"])
def test_a_store_that_is_made_later_is_taken_into_use(
    logs: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bookkeeping, "INTERVAL", 0.02)
    home, folder, said = tmp_path / "home", tmp_path / "accounts", list[str]()
    log = {"requests": True, "file": str(tmp_path / "log.jsonl")} if logs else {}
    settings = settings_in(home, log=log)
    assert not examine(settings).keys
    assert (write_config(settings, folder) is not None) is logs

    async def main() -> None:
        books = Bookkeeping(folder, said.append)
        books.start()
        table = KeyTable(folder)
        assert not table.required
        assert (table.journal is not None) is logs
        journal = None
        if table.journal is not None:
            journal = Journal(table.journal, 2**16)
            journal.append(record(request_id="before").pack())
        watching = asyncio.create_task(books.watch())
        await asyncio.sleep(0.05)
        before, store = table.journal, make_store(home)
        assert await eventually(lambda: (table.refresh(), table.journal != before)[1])
        assert not table.required
        if journal is not None:  # as workers do
            journal.append(record(request_id="meanwhile").pack())
            journal.close()
        assert await eventually(lambda: said)
        assert "it is in use" in said[0]
        key, _ = store.create_key(tenant="acme")
        assert await eventually(lambda: (table.refresh(), table.required)[1])
        assert table.journal is not None
        journal = Journal(table.journal, 2**16)
        journal.append(record(key.id, request_id="after").pack())
        journal.close()
        assert not watching.done()
        watching.cancel()
        await asyncio.to_thread(books.stop, 10)
        assert [(row.key, row.requests) for row in store.usage(by=("key",))] == [(key.id, 1)]
        assert (home / "audit/head").exists()

    asyncio.run(main())
    if logs:
        lines = [json.loads(line)["request_id"] for line in (tmp_path / "log.jsonl").open()]
        assert lines == ["before", "meanwhile", "after"]
    assert list((home / "journal").iterdir()) == []


def test_a_store_that_appears_and_cannot_be_used_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether requests need a key is not known then."""
    monkeypatch.setattr(bookkeeping, "INTERVAL", 0.01)
    monkeypatch.setattr(bookkeeping, "PATIENCE", 0.1)
    write_config(settings_in(tmp_path), tmp_path / "accounts")
    (tmp_path / "medassist.db").write_bytes(b"")
    books = Bookkeeping(tmp_path / "accounts", print)
    books.start()
    reason = asyncio.run(asyncio.wait_for(books.watch(), 30))
    assert "nobody knows whether requests need a key: the store cannot be used: no such table" in reason
    books.stop(1)


def test_the_first_key_closes_a_gateway_that_runs(tmp_path: Path) -> None:
    home = tmp_path / "home"

    async def main() -> None:
        async with Engine().running() as engine:
            config = tmp_path / "gateway.json"
            write_settings(config, engine, home=str(home))
            write_config(load(config), tmp_path / "accounts", config)
            async with gateway(config, 2, "--accounts", str(tmp_path / "accounts")) as running:
                one = aiohttp.TCPConnector(limit=1)
                async with aiohttp.ClientSession() as session, aiohttp.ClientSession(connector=one) as kept:
                    await running.ask(kept)
                    before = running.workers()
                    store = make_store(home)
                    _, secret = store.create_key(tenant="acme")
                    start, refused = time.monotonic(), 0
                    while refused < 10:  # in a row, on new connections and on the one that the request takes below
                        statuses = {await stranger(s, running.root, kept=s is kept) for s in (session, kept)}
                        refused = refused + 1 if statuses == {401} else 0
                        assert time.monotonic() - start < 30
                    kept.headers["Authorization"] = f"Bearer {secret}"
                    await running.ask(kept)
                assert running.workers() == before
                running.process.terminate()
                assert await running.process.wait() == 0
            assert sum(row.requests for row in store.usage() if row.key) == 1

    async def stranger(session: aiohttp.ClientSession, root: str, kept: bool) -> int:
        """Status of an answer to somebody without a key, on a connection of their own or on the session's."""
        async with session.get(root + "/v1/models", headers={} if kept else {"Connection": "close"}) as response:
            await response.read()
            return response.status

    uvloop.run(main())


def test_a_store_that_is_gone_is_not_begun_anew(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.announce = announce_in(tmp_path, 10)
    store.create_key(tenant="acme")
    assert examine(settings_in(tmp_path)).keys
    for path in tmp_path.glob("medassist.db*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"the store is gone: .*Restore .*medassist\.db, .* or move .*audit away"):
        examine(settings_in(tmp_path))


def test_the_variable_names_the_store_of_gateways_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = make_store(tmp_path / "other")
    other.create_key(tenant="acme")
    home = tmp_path / "home"
    monkeypatch.setenv(URL_VARIABLE, f"sqlite:///{other.path}")
    settings = settings_in(home)
    assert settings.keeps_accounts
    assert examine(settings).keys
    config = write_config(settings, tmp_path / "accounts")
    assert config is not None
    assert json.loads(config.read_bytes())["store"]["arguments"]["database"] == str(other.path)
    named = settings_in(home, store={"url": f"sqlite:///{make_store(home).path}"})  # the file's goes before it
    assert not examine(named).keys


def test_home_is_made_for_its_owner_and_others_folders_stay_as_they_are(tmp_path: Path) -> None:
    home = tmp_path / "a/b/home"
    umask = os.umask(0o022)
    try:
        make_home(home)
    finally:
        os.umask(umask)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (home, home.parent)] == [0o700, 0o755]
    make_home(home)
    for mode in (0o755, 0o770, 0o1777, 0o702):
        home.chmod(mode)
        with pytest.raises(ValueError, match=f"home {home} is open to others: chmod 700 it, or name another folder"):
            make_home(home)
        assert stat.S_IMODE(home.stat().st_mode) == mode
    with pytest.raises(StoreError, match="is open to others"):
        announce_in(home, 10)({"event": "x"}, bytes(32), lambda log: None)
    home.chmod(0o711)
    make_home(home)


def test_a_home_that_cannot_be_written_is_told_before_it_serves(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    settings = settings_in(tmp_path / "file", log={"requests": True})
    with pytest.raises(ValueError, match=r"cannot be written \(File exists\): set home or MEDASSIST_HOME"):
        examine(settings)
    make_home(tmp_path / "home")
    (tmp_path / "home/journal").write_text("")
    with pytest.raises(ValueError, match=r"cannot be written \(journal: File exists\): set home or MEDASSIST_HOME"):
        examine(settings_in(tmp_path / "home", log={"requests": True}))
    examine(settings_in(tmp_path / "elsewhere"))
    assert not (tmp_path / "elsewhere").exists(), "nothing is kept"


def test_what_a_worker_finds_out_first_is_told_in_a_line(tmp_path: Path) -> None:
    """An option of Redis' URL that its client does not know."""
    config = tmp_path / "gateway.json"
    content = {"models": {"m": {"engines": [{"url": "http://127.0.0.1:9"}]}}, "home": str(tmp_path / "home")}
    config.write_text(json.dumps(content | {"redis": {"url": "redis://127.0.0.1:1?nonsense=1"}}))
    write_config(load(config), tmp_path / "accounts")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fd = listener.fileno()
        command = [sys.executable, "-m", "serving.gateway.worker", "--fd", str(fd), "--config", str(config)]
        done = subprocess.run(
            [*command, "--accounts", str(tmp_path / "accounts")], pass_fds=(fd,), capture_output=True, text=True
        )
    assert done.returncode == 2
    assert done.stderr.startswith("worker 0: the settings are not valid: redis.url must be ")
    assert done.stderr.count("\n") == 1
