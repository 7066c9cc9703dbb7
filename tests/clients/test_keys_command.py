"""``medassist keys`` and ``medassist store``, as an operator meets them."""

import json
import os
import re
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from clients.store import URL_VARIABLE
from serving.tenants.audit_verify import events
from serving.tenants.store import Store
from tests.clients.commands import run
from tests.databases import postgresql_database

ROOT = Path(__file__).parents[2]
GOOD = "Kq82mPd7Lh3nRb6TjGc9VxFo1Zw5Ys0e"


pytestmark = pytest.mark.usefixtures("home")


def keys(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    code, out, _ = run(capsys, "keys", "list", "--json", *arguments)
    assert code == 0
    found: list[dict[str, Any]] = json.loads(out)
    return found


def names_of_events(home: Path) -> list[str]:
    """In the audit log, but for its own."""
    with Store(f"sqlite:///{home}/medassist.db") as store:
        store.audit_secret()
    return [event["event"] for event in events(home / "audit") if not event["event"].startswith("audit.")]


def test_the_first_key_makes_the_store_and_its_secret_stands_alone(
    capsys: pytest.CaptureFixture[str], home: Path
) -> None:
    code, out, err = run(
        capsys, "keys", "create", "--tenant", "ward-7", "--name", "Ward [7]", "--models", "a, b", "--metrics",
        "--rpm", 60, "--tpm", 1000, "--concurrency", 2, "--max-tokens", 64, "--monthly-tokens", 10**6, "--share", 0.5,
        "--expires", "90d",
    )  # fmt: skip
    assert code == 0
    assert re.fullmatch(r"ma_[A-Za-z0-9_-]{43}\n", out)
    assert out.strip() not in err
    assert f"made a store: {home}/medassist.db" in err
    assert f"gateways that run with the home {home} and no other store take it into use in 5 seconds" in err
    (key,) = keys(capsys)
    assert abs(key.pop("created") + 90 * 86400 - key.pop("expires")) <= 5
    assert key == {
        "id": key["id"], "origin": key["id"], "tenant": "ward-7", "name": "Ward [7]", "models": ["a", "b"],
        "admin": False, "metrics": True, "share": 0.5, "revoked": None, "state": "active",
        "limits": {"requests_per_minute": 60, "tokens_per_minute": 1000, "concurrency": 2, "max_tokens": 64,
                   "tokens_per_month": 10**6},
    }  # fmt: skip
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in home.glob("medassist.db*")} == {0o600}


def test_a_key_from_birth_to_end(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    code, out, _ = run(capsys, "keys", "create", "--tenant", "a", "--rpm", 5, "--json")
    made = json.loads(out)
    assert (code, made["state"], len(made["secret"])) == (0, "active", 46)
    key_id = made["id"]

    code, out, err = run(capsys, "keys", "update", key_id, "--rpm", "none", "--tpm", "9", "--models", "m", "--admin")
    assert (code, out, err) == (0, f"{key_id}: models,admin; tpm 9; expires never\n", "")
    code, out, err = run(capsys, "keys", "update", key_id, "--expires", "2001-01-31")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "expires must be in the future: revoke a key to end it now" in err
    code, out, _ = run(capsys, "keys", "update", key_id, "--models", "all", "--no-admin", "--expires", "2099-01-31")
    assert (code, out) == (0, f"{key_id}: models; tpm 9; expires 2099-01-31 00:00\n")
    code, out, _ = run(capsys, "keys", "show", key_id)
    shown = dict(line.split(maxsplit=1) for line in out.splitlines() if len(line.split(maxsplit=1)) == 2)
    assert (code, shown["state"], shown["models"], shown["expires"]) == (0, "active", "all", "2099-01-31 00:00")
    assert (shown["requests_per_minute"], shown["tokens_per_minute"]) == ("-", "9")

    code, out, err = run(capsys, "keys", "rotate", key_id, "--overlap", "1h")
    assert re.fullmatch(r"ma_[A-Za-z0-9_-]{43}\n", out)
    assert f"{key_id}: good until " in err
    old, new = sorted(keys(capsys), key=lambda key: key["id"] != key_id)
    assert abs(old["expires"] - time.time() - 3600) < 60
    assert (new["origin"], new["limits"]) == (key_id, old["limits"])

    code, out, _ = run(capsys, "keys", "revoke", new["id"])
    assert code == 0
    assert out.startswith(f"{new['id']}: revoked at 20")
    assert [key["id"] for key in keys(capsys, "--active")] == [key_id]
    assert keys(capsys, "--tenant", "b") == []
    code, out, _ = run(capsys, "keys", "list")
    assert out.splitlines()[0].split() == [
        "id",
        "tenant",
        "name",
        "state",
        "expires",
        "models",
        "scopes",
        "limits",
        "share",
    ]
    assert any("revoked" in line for line in out.splitlines() if new["id"] in line)
    assert names_of_events(home) == ["key.created", "key.updated", "key.updated", "key.rotated", "key.revoked"]


def test_an_own_secret_comes_from_a_variable(
    capsys: pytest.CaptureFixture[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for secret, reason in (("sk-1234", "is a default"), ("changeme", "is a default"), ("x" * 40, "repeats itself")):
        monkeypatch.setenv("OWN", secret)
        code, out, err = run(capsys, "keys", "create", "--tenant", "a", "--secret-env", "OWN")
        assert (code, out) == (2, "")
        assert reason in err
        assert secret not in err
        assert not home.exists()
    monkeypatch.setenv("OWN", GOOD)
    assert run(capsys, "keys", "create", "--tenant", "a", "--secret-env", "OWN")[:2] == (0, f"{GOOD}\n")
    code, out, err = run(capsys, "keys", "create", "--tenant", "a", "--secret-env", "OWN")
    assert (code, out) == (2, "")
    assert "the secret is one that a key has or had already" in err
    code, _, err = run(capsys, "keys", "create", "--tenant", "a", "--secret-env", "NOT_THERE")
    assert (code, err) == (2, "medassist: --secret-env: the variable NOT_THERE is not set\n")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("create", "--tenant", "a b"), "tenant must be"),
        (("create", "--tenant", "a", "--expires", "soon"), "--expires must be a date such as 2027-01-31, or a number"),
        (("create", "--tenant", "a", "--expires", "2001-01-01"), "expires must be in the future"),
        (("create", "--tenant", "a", "--models", ","), "models must hold at least one name"),
        (("create", "--tenant", "a", "--share", "0"), "share must be a number above 0"),
        (("show", "key_nobody"), "there is no key 'key_nobody'"),
        (("revoke", "key_nobody"), "there is no key 'key_nobody'"),
        (("rotate", "key_nobody"), "there is no key 'key_nobody'"),
        (("rotate", "key_nobody", "--overlap", "24"), "--overlap must be a number with a unit"),
        (("update", "key_nobody"), "nothing to change"),
        (
            ("create", "--tenant", "a", "--rpm", "9" * 23),
            "per_minute must be a whole number from 1 to 9007199254740992",
        ),
        (("update", "key_nobody", "--rpm", "many"), "--rpm must be a whole number from 1 to 9007199254740992, or none"),
        (("update", "key_nobody", "--monthly-tokens", "9" * 23), "--monthly-tokens must be a whole number from 1 to 9"),
        (("update", "key_nobody", "--tpm", "0"), "--tpm must be a whole number from 1 to 9007199254740992, or none"),
        (("update", "key_nobody", "--share", "2"), "there is no key 'key_nobody'"),
        (("list", "--config", "x", "--store", "sqlite:///x"), "--config and --store exclude each other"),
        (("list", "--store", "postgresql://u:hunter2@h/x"), "--store may not hold a password"),
        (("list", "--store", "mysql://h/x"), "--store must be postgresql://"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: tuple[str, ...], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with_store = arguments[0] != "list"
    if with_store:
        run(capsys, "store", "upgrade")
    code, out, err = run(capsys, "keys", *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("medassist: ")
    assert expected in err
    assert "hunter2" not in err


def test_without_a_store_there_is_nothing_to_list(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    for arguments in (("keys", "list"), ("keys", "revoke", "key_x"), ("usage",), ("store", "show")):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert err.startswith(f"medassist: no store at {home}/medassist.db yet: `medassist keys create` makes one, or")
        assert "with --config FILE" in err
    assert not home.exists()


def test_the_settings_say_where_the_store_is(capsys: pytest.CaptureFixture[str], tmp_path: Path, home: Path) -> None:
    config = tmp_path / "gateway.yaml"
    config.write_text(
        "models: {m: {engines: [{url: 'http://x', api_key_env: NOT_SET_HERE}], adapters: [l]}}\n"
        "aliases: {default: m}\nhome: kept\n"
    )
    code, _, err = run(capsys, "keys", "create", "--tenant", "a", "--models", "m,l,default,zz", "--config", config)
    assert code == 0
    assert "warning: the settings have no model zz\n" in err
    assert err.count("warning") == 1
    assert (tmp_path / "kept/medassist.db").exists()
    assert (tmp_path / "kept/audit").is_dir()
    assert not home.exists()
    config.write_text("models: {m: {engines: [{url: 'http://x'}]}}\nstore: {url_env: STORE_OF_TEST}\n")
    code, _, err = run(capsys, "keys", "list", "--config", config)
    assert (code, err) == (2, "medassist: store.url_env: the variable STORE_OF_TEST is not set\n")


def test_the_variable_counts_where_the_settings_name_no_store(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "gateway.yaml"
    monkeypatch.setenv(URL_VARIABLE, f"sqlite:///{tmp_path}/named.db")
    for line, file in (("", "named.db"), ("store: {url: 'sqlite:///own.db'}", "own.db")):
        config.write_text("models: {m: {engines: [{url: 'http://x'}]}}\n" + line)
        code, out, err = run(capsys, "store", "upgrade", "--config", config)
        assert (code, out) == (0, f"{tmp_path / file}: revision 0003\n"), err


def test_a_home_that_cannot_be_used_is_told(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    home.mkdir(mode=0o755)
    code, out, err = run(capsys, "keys", "create", "--tenant", "a")
    assert (code, out) == (2, "")
    assert err == f"medassist: home {home} is open to others: chmod 700 it, or name another folder\n"
    assert list(home.iterdir()) == []
    home.rmdir()
    home.write_text("")
    code, out, err = run(capsys, "keys", "create", "--tenant", "a")
    assert (code, out) == (2, "")
    assert err == f"medassist: home {home} cannot be written (File exists): set home or MEDASSIST_HOME\n"


def test_names_cannot_draw_in_the_terminal(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    run(capsys, "keys", "create", "--tenant", "a")
    with Store(f"sqlite:///{home}/medassist.db") as store, store.write() as connection:
        connection.exec_driver_sql("UPDATE keys SET name = char(27) || '[31mred'")
    for arguments in (("list",), ("show", keys(capsys)[0]["id"])):
        _, out, _ = run(capsys, "keys", *arguments)
        assert "\x1b" not in out
        assert "\\x1b[31mred" in out


def test_an_audit_log_that_cannot_be_written_stops_the_change(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    run(capsys, "keys", "create", "--tenant", "a")
    for path in (home / "audit").iterdir():
        path.unlink()
    (home / "audit").rmdir()
    (home / "audit").write_text("in the way")
    code, out, err = run(capsys, "keys", "create", "--tenant", "b")
    assert (code, out) == (2, "")
    assert "audit" in err
    assert [key["tenant"] for key in keys(capsys)] == ["a"]


def test_two_commands_at_once_make_one_store(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "clients.cli", "keys", "create", "--tenant", "a"]
    started = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for _ in range(2)]  # fmt: skip
    secrets = set()
    for process in started:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        secrets.add(out)
    assert len(secrets) == len(keys(capsys)) == 2
    assert names_of_events(home) == ["key.created"] * 2


def test_commands_work_on_postgresql(
    capsys: pytest.CaptureFixture[str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with postgresql_database() as url:
        code, _, err = run(capsys, "keys", "create", "--tenant", "a", "--store", url)
        assert code == 2
        assert "has no tables yet: run `medassist store upgrade`" in err
        code, out, _ = run(capsys, "store", "upgrade", "--store", url)
        assert (code, out.endswith("revision 0003\n")) == (0, True)
        monkeypatch.setenv(URL_VARIABLE, url)
        code, secret, _ = run(capsys, "keys", "create", "--tenant", "a")
        assert code == 0
        assert [key["tenant"] for key in keys(capsys)] == ["a"]
        dumped = subprocess.run(["pg_dump", url], capture_output=True, text=True, check=True).stdout
        assert keys(capsys)[0]["id"] in dumped
        assert secret.strip() not in dumped
        code, out, _ = run(capsys, "store", "show", "--json")
        shown = json.loads(out)
        assert (shown["revision"], shown["rows"]["keys"], shown["rows"]["audit_heads"]) == ("0003", 1, 1)
        code, out, _ = run(capsys, "store", "downgrade", "base", "--yes")
        assert (code, out.endswith("revision base\n")) == (0, True)
        assert not (home / "medassist.db").exists()


def test_the_store_goes_up_and_down(capsys: pytest.CaptureFixture[str], home: Path) -> None:
    code, out, _ = run(capsys, "store", "upgrade")
    assert (code, out) == (0, f"{home}/medassist.db: revision 0003\n")
    run(capsys, "keys", "create", "--tenant", "a")
    code, out, err = run(capsys, "store", "downgrade", "base")
    assert (code, out) == (2, "")
    assert "all keys and the whole ledger would be lost: say --yes" in err
    code, out, _ = run(capsys, "store", "downgrade", "0002", "--yes")
    assert (code, out) == (0, f"{home}/medassist.db: revision 0002\n")
    code, _, err = run(capsys, "keys", "list")
    assert code == 2
    assert "run `medassist store upgrade`" in err
    code, out, _ = run(capsys, "store", "show")
    assert re.search(r"^revision +0002$", out, re.M)
    code, out, _ = run(capsys, "store", "upgrade")
    assert code == 0
    code, out, _ = run(capsys, "store", "upgrade")
    assert out == f"{home}/medassist.db: revision 0003 already\n"
    assert len(keys(capsys)) == 1
    code, _, err = run(capsys, "store", "downgrade", "7777", "--yes")
    assert (code, err) == (2, "medassist: there is no revision 7777; there are base, 0001, 0002, 0003\n")
    names = names_of_events(home)
    assert [name for name in names if name.startswith("store.")][:3] == [
        "store.upgraded",
        "store.downgraded",
        "store.upgraded",
    ]


def test_help_needs_no_database_library() -> None:
    code = "import sys, clients.cli; print([n for n in ('sqlalchemy', 'alembic', 'psycopg') if n in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout == "[]\n"
