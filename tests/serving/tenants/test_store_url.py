"""Addresses of stores: what is one, and that no message repeats a password."""

import subprocess
import sys
from pathlib import Path

import pytest

from serving.gateway.settings import load
from serving.tenants.store_url import connect_arguments, passwords, refuse_password, sqlite_path

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:hunter2@h/db",
        "postgresql://u:hunter2@/db",
        "postgresql://u:hun/ter2@h/db",
        "postgresql://u:hun@ter2@h/db",
        "postgresql://u:hun?ter2@h/db",
        "postgresql://u:hun#ter2@h/db",
        "postgresql://u:12#hunter2@h/db",
        "postgresql://u:hun%20ter2@h/db",
        "postgresql://u:hun ter2@h/db",
        "postgresql://h/db?user=u&password=hunter2",
        "postgresql://h/db?sslpassword=hunter2",
        "postgresql://u:hunter2",
        "mysql://u:hunter2@h/db",
        "hunter2",
        "u:hunter2@h",
        "sqlite://hunter2",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///file:x?mode=memory",
        "postgresql://h:port/db",
        "postgresql://h/db?x",
        "",
    ],
)
def test_wrong_addresses_and_those_with_a_password_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"^--store ") as refused:
        refuse_password(url, "--store")
    message = str(refused.value)
    assert "hun" not in message
    assert "ter2" not in message
    if "@" in url or "password" in url:
        assert "PGPASSWORD" in message
        assert "~/.pgpass" in message
        assert "url_env" in message


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u@h/db",
        "postgres://h",
        "postgresql+psycopg://u@h:5432/db",
        "postgresql:///db?host=/run/postgresql",
        "postgresql://[::1]:5432,h2:5433/db?target_session_attrs=read-write",
        "postgresql://u%40realm@h/db",
        "sqlite:////var/lib/medassist.db",
    ],
)
def test_addresses_without_a_password_are_taken(url: str) -> None:
    refuse_password(url, "--store")
    connect_arguments(url)


def test_libpq_understands_what_we_take() -> None:
    psycopg = pytest.importorskip("psycopg")
    arguments = connect_arguments("postgresql+psycopg://u%40realm:p%2Fw@h1:1,h2:2/db?sslmode=require")["arguments"]
    found = psycopg.conninfo.conninfo_to_dict(arguments["conninfo"])
    assert found == {"user": "u@realm", "password": "p/w", "host": "h1,h2", "port": "1,2", "dbname": "db",
                     "sslmode": "require"}  # fmt: skip


def test_what_the_address_says_of_timeouts_is_kept() -> None:
    arguments = connect_arguments("postgresql://h/db?connect_timeout=60&application_name=mine")["arguments"]
    assert not {"connect_timeout", "application_name"} & set(arguments)
    assert connect_arguments("postgresql://h/db")["arguments"]["connect_timeout"] == 5


def test_passwords_are_found_as_written_and_as_meant() -> None:
    assert set(passwords("postgresql://u:p%40ss@h/db?sslpassword=x%2Fy")) == {"p%40ss", "p@ss", "x/y"}
    assert passwords("postgresql://u@h/db") == []


def test_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert sqlite_path("sqlite:////var/lib/a b.db") == Path("/var/lib/a b.db")
    assert sqlite_path("sqlite:///a.db") == tmp_path / "a.db"
    assert sqlite_path("sqlite:///~/a.db") == Path("/home/me/a.db")
    assert sqlite_path("postgresql://h/db") is None


def test_a_settings_file_may_not_hold_a_password(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    path.write_text("models: {m: {engines: [{url: 'http://x'}]}}\nstore: {url: 'postgresql://u:hunter2@h/db'}\n")
    with pytest.raises(ValueError, match=r"store\.url may not hold a password") as refused:
        load(path)
    assert "hunter2" not in str(refused.value)


def test_a_path_in_a_settings_file_is_relative_to_it(tmp_path: Path) -> None:
    path = tmp_path / "gateway.yaml"
    for written, meant in (("kept/a.db", tmp_path / "kept/a.db"), ("/srv/a.db", Path("/srv/a.db"))):
        path.write_text(f"models: {{m: {{engines: [{{url: 'http://x'}}]}}}}\nstore: {{url: 'sqlite:///{written}'}}\n")
        assert sqlite_path(load(path).store.resolve(tmp_path / "home")) == meant


def test_it_imports_the_standard_library_only() -> None:
    code = (
        "import sys; import serving.tenants.store_url; "
        "print([n for n in ('sqlalchemy', 'alembic', 'psycopg', 'pydantic') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
