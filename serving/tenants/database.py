"""A store's database: connections, transactions, and the revision of its tables."""

import contextlib
import os
import secrets
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import Connection, NullPool, create_engine, event, inspect, text
from sqlalchemy.exc import DataError, DBAPIError

from serving.tenants import schema
from serving.tenants.store_url import connect_arguments, passwords, sqlite_path

if TYPE_CHECKING:
    from alembic.config import Config

_UPGRADE_LOCK = 0x6D65_6461  # PostgreSQL's advisory lock that upgrades hold


class StoreError(OSError):
    """The database cannot be used now: it is away, locked or full, or does not let us."""


class Database:
    """The database at an address. Each transaction opens a connection of its own.

    Args:
        url: as :func:`serving.tenants.store_url.connect_arguments` takes it.

    Raises:
        ValueError: it is no address of a store, or its driver is not installed.
    """

    def __init__(self, url: str) -> None:
        self.path = sqlite_path(url)
        self._passwords = passwords(url) if self.path is None else []
        self._arguments: dict[str, Any] = connect_arguments(url)["arguments"]
        self._checked = False
        # Parameters stay out of messages: there are digests among them.
        options: dict[str, Any] = {"creator": self._connect, "poolclass": NullPool, "hide_parameters": True}
        try:
            self._engine = create_engine("sqlite://" if self.path else "postgresql+psycopg://", **options)
        except ModuleNotFoundError as e:
            raise ValueError(f"PostgreSQL needs {e.name}: pip install 'medassist[postgresql]'") from None
        if self.path:
            event.listen(self._engine, "begin", _begin)

    @property
    def where(self) -> str:
        """For messages and reports; no password in it."""
        if self.path:
            return str(self.path)
        import psycopg

        with contextlib.suppress(psycopg.Error):
            parts = psycopg.conninfo.conninfo_to_dict(self._arguments["conninfo"])
            return f"PostgreSQL {parts.get('dbname') or parts.get('user', '')} at {parts.get('host', 'its socket')}"
        return "PostgreSQL"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._engine.dispose()

    @contextlib.contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database.

        Raises:
            StoreError: see there.
            ValueError: its tables are of another revision.
        """
        self.check()
        with self._plain_errors(), self._engine.connect() as connection:
            if self.path is None:
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with connection.begin():
                yield connection

    @contextlib.contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction that can write. Raises as :meth:`read`."""
        self.check()
        with self._plain_errors(), self._writing() as connection:
            yield connection

    def check(self) -> None:
        """Whether this version of the program can work with the tables.

        Raises:
            ValueError: it cannot; the message says which command helps.
            StoreError: the database cannot be used now.
        """
        if self._checked:
            return
        revision = self.revision()
        if revision is None:
            raise ValueError(f"the store ({self.where}) has no tables yet: run `medassist store upgrade`")
        if revision < schema.REVISION:
            raise ValueError(
                f"the store ({self.where}) is at revision {revision}, and this version works with {schema.REVISION}: "
                "run `medassist store upgrade`"
            )
        if revision > schema.REVISION:
            raise ValueError(
                f"the store ({self.where}) is at revision {revision}, which a newer version made: this one works with "
                f"{schema.REVISION}; update it, or run the newer one's `medassist store downgrade {schema.REVISION}`"
            )
        self._checked = True

    def revision(self) -> str | None:
        """Of the tables; None: there are none. Raises StoreError."""
        with self._plain_errors(), self._engine.connect() as connection, connection.begin():
            return _revision(connection)

    def upgrade(self, revision: str = "head") -> None:
        """Brings the tables to a revision, in one transaction; a database of SQLite that is not there is made.

        Raises:
            ValueError: there is no such revision, or the tables are of a newer version of the program.
            StoreError: see there; nothing was changed.
        """
        if self.path:
            _create_file(self.path)
        self._migrate(revision, upgrade=True)

    def downgrade(self, revision: str) -> None:
        """Goes back to an older revision, or to "base": no tables. What newer ones have brought is lost.

        Raises: as :meth:`upgrade`.
        """
        self._migrate(revision, upgrade=False)

    def _migrate(self, revision: str, upgrade: bool) -> None:
        # Alembic takes its time to import, and only these need it.
        from alembic import command
        from alembic.util import CommandError

        config = alembic_config()
        self._checked = False
        with self._plain_errors(), self._writing() as connection:
            if self.path is None:
                connection.execute(text(f"SELECT pg_advisory_xact_lock({_UPGRADE_LOCK})"))
            now = _revision(connection) or "base"
            known = revisions()
            if revision not in (*known, "head", "base"):
                raise ValueError(f"there is no revision {revision}; there are base, {', '.join(known)}")
            if now not in (*known, "base"):
                raise ValueError(f"the store ({self.where}) is at revision {now}, which a newer version made")
            order = ["base", *known]
            target = order.index(known[-1] if revision == "head" else revision)
            if not upgrade and target >= order.index(now):
                raise ValueError(f"the store ({self.where}) is at revision {now} already")
            config.attributes["connection"] = connection
            try:
                (command.upgrade if upgrade else command.downgrade)(config, revision)
            except CommandError as e:
                raise ValueError(f"the store ({self.where}) cannot be brought to {revision}: {e}") from None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Connection]:
        with self._engine.connect() as connection:
            connection = connection.execution_options(medassist_writes=True)
            with connection.begin():
                yield connection

    def _connect(self) -> Any:
        if self.path:
            if not self.path.exists():
                raise StoreError(
                    f"no store at {self.path} yet: `medassist keys create` makes one, or name the settings that say "
                    "where it is with --config FILE"
                )
            return sqlite3.connect(**self._arguments)
        import psycopg

        return psycopg.connect(**{**self._arguments, "autocommit": False})

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except DataError:  # not the driver's message: it shows the value
            raise ValueError("the store can hold no such value: it has a NUL, or is too large") from None
        except DBAPIError as e:
            lines = str(e.orig or "").strip().splitlines()
            reason = lines[0] if lines else type(e.orig).__name__
            for password in self._passwords:
                reason = reason.replace(password, "***")
            if "database is locked" in reason:
                reason = "another process has been writing to it for too long"
            raise StoreError(f"the store ({self.where}) cannot be used: {reason}") from None


def alembic_config() -> "Config":
    """Alembic's configuration of our migrations. ``attributes["connection"]`` is what they work on."""
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def revisions() -> list[str]:
    """Of the migrations, the oldest first."""
    from alembic.script import ScriptDirectory

    return [script.revision for script in ScriptDirectory.from_config(alembic_config()).walk_revisions()][::-1]


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _begin(connection: Connection) -> None:
    # The driver is in autocommit. Immediate: a transaction that reads first and writes later could fail in between.
    writes = connection.get_execution_options().get("medassist_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _create_file(path: Path) -> None:
    """Makes an empty database that readers and one writer can use at once (WAL), for its owner alone."""
    if path.exists():
        return
    missing = [folder for folder in path.parents if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    own = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        os.close(os.open(own, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        # Before it can be seen: two that switch to WAL at once get in each other's way.
        with contextlib.closing(sqlite3.connect(own)) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        with contextlib.suppress(FileExistsError):
            os.link(own, path)
    finally:
        for leftover in (own, own.with_name(own.name + "-wal"), own.with_name(own.name + "-shm")):
            leftover.unlink(missing_ok=True)
