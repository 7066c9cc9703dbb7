"""Databases for tests: of SQLite, and of a PostgreSQL server where one runs."""

import contextlib
import os
import secrets
from collections.abc import Iterator

import pytest

SERVER = os.environ.get("MEDASSIST_TEST_POSTGRESQL", "postgresql://postgres@127.0.0.1:5432")


@contextlib.contextmanager
def postgresql_database() -> Iterator[str]:
    """The URL of an empty database, which is dropped afterwards. Skips the test where no server lets us make one."""
    psycopg = pytest.importorskip("psycopg")
    name = f"medassist_test_{secrets.token_hex(6)}"
    try:
        server = psycopg.connect(f"{SERVER}/postgres", autocommit=True, connect_timeout=5)
    except psycopg.OperationalError as e:
        pytest.skip(f"no PostgreSQL at {SERVER}: {str(e).splitlines()[0]}")
    with server:
        server.execute(f"CREATE DATABASE {name}")
        try:
            yield f"{SERVER}/{name}"
        finally:
            server.execute(f"DROP DATABASE {name} WITH (FORCE)")
