"""Migrations go up and down with data in the database, on SQLite and PostgreSQL."""

import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from setuptools import find_packages
from sqlalchemy import event, inspect, text

from serving.tenants import schema
from serving.tenants.database import revisions
from serving.tenants.key import KeyLimits
from serving.tenants.statements import add_usage, set_head
from serving.tenants.store import Store, StoreError

ROOT = Path(__file__).parents[3]
_TABLES = ("tenants", "keys", "usage", "journals", "facts", "audit_heads", "captures")


def fill(store: Store) -> None:
    """A row or more in each table."""
    key, _ = store.create_key(
        tenant="ward", name="Ü", models=["a", "b"], metrics=True, share=2.5, limits=KeyLimits(tokens_per_month=2**40)
    )
    new, _ = store.rotate(key.id, 3600)
    store.create_key(tenant="ops", admin=True)
    store.start_capture(key=new.id, recipient="00" * 32, reason="a fault", created_by="me", seconds=60)
    counts = {"requests": 3, "failed": 1, "prompt_tokens": 2**33, "completion_tokens": 7, "estimated": 0}
    with store.write() as connection:
        on_sqlite = store.path is not None
        for model in ("a", "b"):
            row = {"day": "2026-11-25", "key": key.id, "tenant": "ward", "model": model, **counts}
            connection.execute(add_usage(on_sqlite), row)
        connection.execute(schema.journals.insert(), [{"id": "j1", "position": 2**35, "updated": 5}])
        connection.execute(set_head(on_sqlite), {"log": "l", "sequence": 9, "hash": "h", "now": 5})


def contents(store: Store) -> dict[str, list[dict[str, Any]]]:
    """All rows, whatever the revision."""
    with store._engine.connect() as connection:
        names = inspect(connection).get_table_names()
        return {
            name: [dict(row) for row in connection.execute(text(f'SELECT * FROM "{name}" ORDER BY 1, 2')).mappings()]
            for name in names
            if name != "alembic_version"
        }


def without(rows: list[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


def test_up_and_down_with_data(store: Store) -> None:
    fill(store)
    full = contents(store)
    assert set(full) == set(_TABLES)
    assert all(full.values())

    store.downgrade("0002")
    at_2 = contents(store)
    assert at_2["keys"] == without(full["keys"], "metrics", "share", "origin")
    version = {row["name"]: row["value"] for row in full["facts"]}["keys_version"]
    later = {row["name"]: row["value"] for row in at_2["facts"]}["keys_version"]
    assert int(later) > int(version)  # gateways look again
    assert {n: at_2[n] for n in _TABLES if n not in ("keys", "facts")} == {
        n: full[n] for n in _TABLES if n not in ("keys", "facts")
    }

    store.upgrade()
    again = contents(store)
    assert without(again["keys"], "metrics", "share", "origin") == at_2["keys"]
    assert all((row["metrics"], row["share"], row["origin"]) == (0, 1.0, row["id"]) for row in again["keys"])
    assert again["usage"] == full["usage"]
    assert again["captures"] == full["captures"]
    assert len(store.keys()) == 3

    store.downgrade("0001")
    at_1 = contents(store)
    assert set(at_1) == {"tenants", "keys", "usage", "journals", "facts"}
    for name in ("tenants", "usage", "journals"):
        assert at_1[name] == full[name]
    assert at_1["keys"] == at_2["keys"]
    secret = [row for row in full["facts"] if row["name"] != "keys_version"]
    assert [row for row in at_1["facts"] if row["name"] != "keys_version"] == secret

    store.upgrade("0002")  # step by step, too
    store.upgrade()
    last = contents(store)
    assert (last["usage"], last["journals"], last["tenants"]) == (full["usage"], full["journals"], full["tenants"])
    assert (last["captures"], last["audit_heads"]) == ([], [])
    assert sorted(row["id"] for row in full["keys"]) == sorted(row["id"] for row in last["keys"])
    assert len(store.keys()) == len(full["keys"])

    store.downgrade("base")
    assert contents(store) == {}
    assert store.revision() is None
    store.upgrade()
    fill(store)


def test_constraints_are_there_after_a_round_trip(store: Store) -> None:
    """SQLite makes a table again to alter it."""
    fill(store)
    store.downgrade("0001")
    store.upgrade()
    with store._engine.connect() as connection:
        inspector = inspect(connection)
        assert [c["column_names"] for c in inspector.get_unique_constraints("keys")] == [["digest"]]
        assert inspector.get_pk_constraint("keys")["constrained_columns"] == ["id"]
        assert [c["referred_table"] for c in inspector.get_foreign_keys("keys")] == ["tenants"]
        assert [c["referred_table"] for c in inspector.get_foreign_keys("captures")] == ["keys"]
        assert {i["name"] for i in inspector.get_indexes("usage")} == {"ix_usage_key_day"}
    row = {**store.keys()[0].row(), "id": "key_other", "origin": None, "digest": "00"}

    def insert_incomplete() -> None:
        with store.write() as connection:
            connection.execute(schema.keys.insert(), [row])

    with pytest.raises(StoreError, match=r"(?i)origin.*null|null.*origin"):
        insert_incomplete()


def test_the_tables_are_those_that_the_program_knows(store: Store) -> None:
    def differences() -> list[Any]:
        options = {"compare_type": True, "compare_server_default": True}
        with store.read() as connection:
            return compare_metadata(MigrationContext.configure(connection, opts=options), schema.metadata)

    assert differences() == []
    store.downgrade("0001")
    store.upgrade()
    assert differences() == []


def test_revisions_are_one_line_and_the_program_wants_the_last() -> None:
    assert revisions() == ["0001", "0002", "0003"]
    assert revisions()[-1] == schema.REVISION


def test_a_migration_that_fails_changes_nothing(store: Store) -> None:
    fill(store)
    store.downgrade("0001")
    before = contents(store)

    def fail(_c: Any, _k: Any, statement: str, *_: Any) -> None:
        if "ix_usage_key_day" in statement:
            raise RuntimeError("power cut")

    event.listen(store._engine, "before_cursor_execute", fail)
    with pytest.raises(RuntimeError, match="power cut"):
        store.upgrade()
    event.remove(store._engine, "before_cursor_execute", fail)
    assert store.revision() == "0001"
    assert contents(store) == before
    store.upgrade()
    assert store.revision() == schema.REVISION


@pytest.mark.parametrize("store_url", ["postgresql"], indirect=True)  # the commands' tests do it with SQLite
def test_several_may_upgrade_at_once(store_url: str) -> None:
    code = "import sys; from serving.tenants.store import Store; Store(sys.argv[1]).upgrade()"
    command = [sys.executable, "-c", code, store_url]
    started = [subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in started:
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    with Store(store_url) as store:
        store.create_key(tenant="a")
        assert store.counts()["facts"] == 3


def test_another_revision_is_refused_with_what_helps(store: Store) -> None:
    store.downgrade("0001")
    with pytest.raises(ValueError, match=r"at revision 0001, .* works with 0003: run `medassist store upgrade`"):
        store.keys()
    with pytest.raises(ValueError, match="at revision 0001 already"):
        store.downgrade("0002")
    with pytest.raises(ValueError, match="there is no revision 0815; there are base, 0001, 0002, 0003"):
        store.downgrade("0815")
    store.upgrade()
    with store.write() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0099'"))
    for work in (store.upgrade, lambda: store.downgrade("0001"), lambda: Store.check(store)):
        store._checked = False
        with pytest.raises(ValueError, match="at revision 0099, which a newer version made"):
            work()


def test_an_empty_database_is_refused_with_what_helps(store_url: str) -> None:
    with Store(store_url) as store:
        expected = "no store at .* yet" if store.path else "has no tables yet: run `medassist store upgrade`"
        with pytest.raises((ValueError, StoreError), match=expected):
            store.keys()


def test_a_database_of_sqlite_is_for_its_owner_alone(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "home"
    with Store(f"sqlite:///{folder}/medassist.db") as store:
        store.upgrade()
        fill(store)
        with store.read() as connection:
            connection.execute(text("SELECT 1 FROM keys")).all()
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"medassist.db": 0o600, "medassist.db-wal": 0o600, "medassist.db-shm": 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_migrations_are_part_of_the_package() -> None:
    packages = find_packages(str(ROOT), include=["serving*"])
    assert {"serving.tenants.migrations", "serving.tenants.migrations.versions"} <= set(packages)
