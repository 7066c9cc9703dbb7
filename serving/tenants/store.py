"""Keys, captures and usage in a database: what commands and admin routes do with it. Gateways go through the keeper."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import date
from typing import Any

from sqlalchemy import BigInteger, Connection, Text, cast, func, insert, literal_column, select, update
from sqlalchemy.exc import IntegrityError

from serving.tenants import schema
from serving.tenants.capture import LONGEST as LONGEST_CAPTURE
from serving.tenants.database import Database, StoreError
from serving.tenants.key import KeyLimits
from serving.tenants.secrets import check_strength, digest, new_id, new_key
from serving.tenants.statements import set_head
from serving.tenants.stored import (
    CaptureActive,
    NoSuchKey,
    StoredCapture,
    StoredKey,
    UsageRow,
    check_text,
    parse_models,
)

__all__ = ["CaptureActive", "NoSuchKey", "Store", "StoreError", "StoredCapture", "StoredKey", "UsageRow"]

Head = tuple[str, int, str]
StoredHead = Callable[[str], tuple[int, str] | None]
Announce = Callable[[dict[str, Any], bytes, StoredHead], Head | None]
_CHANGEABLE = ("name", "models", "admin", "metrics", "limits", "share", "expires")
_COUNTS = ("requests", "failed", "prompt_tokens", "completion_tokens", "estimated")
UNLIMITED = KeyLimits()
GROUPS = ("month", "day", "tenant", "key", "model")


class Store(Database):
    """See above. Safe in several threads and processes at once.

    Args:
        announce: called with the event of each change before it is in force, the store's secret, and a function that
            gives number and hash of the last line of a log, to write it to the audit log
            (:func:`serving.tenants.announcing.announce_in`). It returns the log's id, and number and hash of its last
            line, to keep with the change; or None. If it raises, nothing is changed. In doubt the log has a change too
            many, and never one too few.

    Every method that works with the database raises StoreError where it cannot be used now, and ValueError where its
    tables are of another revision.
    """

    def __init__(self, url: str, announce: Announce | None = None) -> None:
        super().__init__(url)
        self.announce = announce

    def create_key(
        self,
        *,
        tenant: str,
        name: str = "",
        models: Sequence[str] | None = None,
        admin: bool = False,
        metrics: bool = False,
        limits: KeyLimits = UNLIMITED,
        share: float = 1.0,
        expires: int | None = None,
        secret: str | None = None,
        by: str = "",
    ) -> tuple[StoredKey, str]:
        """Makes a key, and its tenant if that is new.

        Args:
            models: that it may use; None: all.
            expires: seconds since the epoch; None: never.
            secret: an own one; None: a new one is made.
            by: who does this, for the audit log.

        Returns:
            The key, and its secret, which is stored nowhere.

        Raises:
            ValueError: a value is not valid, or the secret is weak or in use.
        """
        now = int(time.time())
        key_id, secret = _secret(secret)
        key = StoredKey(
            key_id, tenant, name, parse_models(models), admin, metrics, limits, float(share), now, expires, None, key_id
        )
        key.check()
        if expires is not None and expires <= now:
            raise ValueError("expires must be in the future")
        with self._change() as connection:
            known = select(schema.tenants.c.name).where(schema.tenants.c.name == tenant)
            if connection.execute(known).first() is None:
                salt = new_key()[1].removeprefix("ma_")
                connection.execute(insert(schema.tenants).values(name=tenant, cache_salt=salt, created=now))
            _insert_key(connection, key, secret)
            self._tell(connection, "key.created", by, _scopes(key))
        return key, secret

    def keys(self) -> list[StoredKey]:
        """All of them, by tenant and age."""
        rows = select(schema.keys).order_by(schema.keys.c.tenant, schema.keys.c.created, schema.keys.c.id)
        with self.read() as connection:
            return [StoredKey.from_row(dict(row)) for row in connection.execute(rows).mappings()]

    def key(self, key_id: str) -> StoredKey:
        """Raises NoSuchKey."""
        with self.read() as connection:
            return _find(connection, key_id)

    def has_keys(self) -> bool:
        """Whether there has ever been one; then requests need one."""
        with self.read() as connection:
            return connection.execute(select(schema.keys.c.id).limit(1)).first() is not None

    def revoke(self, key_id: str, *, by: str = "") -> StoredKey:
        """Ends a key for good. One that is revoked stays as it is.

        Raises:
            NoSuchKey: there is none.
        """
        with self._change() as connection:
            key = _find(connection, key_id)
            if key.revoked is None:
                key = replace(key, revoked=int(time.time()))
                _save(connection, key, "revoked")
                self._tell(connection, "key.revoked", by, {"key": key.id, "tenant": key.tenant})
        return key

    def rotate(
        self, key_id: str, overlap_seconds: float, *, secret: str | None = None, by: str = ""
    ) -> tuple[StoredKey, str]:
        """Makes a key that takes another's place, with all that it may do and what is left of its month's tokens. The
        old one expires after the overlap.

        Returns:
            The new key, and its secret.

        Raises:
            NoSuchKey: there is none.
            ValueError: it is revoked or expired, or the secret is weak or in use.
        """
        if not 0 <= overlap_seconds <= 366 * 86400:
            raise ValueError("the overlap must be between 0 seconds and a year")
        new, secret = _secret(secret)
        with self._change() as connection:
            now = int(time.time())
            old = _find(connection, key_id)
            if (state := old.state(now)) != "active":
                raise ValueError(f"{key_id} is {state}: make a new key with `medassist keys create`")
            end = now + int(overlap_seconds)
            key = replace(old, id=new, created=now)
            _insert_key(connection, key, secret)
            old = replace(old, expires=end if old.expires is None else min(old.expires, end))
            _save(connection, old, "expires")
            self._tell(connection, "key.rotated", by, {**_scopes(key), "replaces": old.id, "old_expires": old.expires})
        return key, secret

    def update_key(self, key_id: str, changes: Mapping[str, Any], *, by: str = "") -> StoredKey:
        """Changes what a key may do: ``name``, ``models``, ``admin``, ``metrics``, ``limits`` (a KeyLimits), ``share``,
        ``expires``.

        Raises:
            NoSuchKey: there is none.
            ValueError: it is revoked, or a value is not valid.
        """
        if unknown := set(changes) - set(_CHANGEABLE):
            raise ValueError(f"{min(unknown)} of a key cannot be changed: {', '.join(_CHANGEABLE)} can")
        with self._change() as connection:
            old = _find(connection, key_id)
            if old.revoked is not None:
                raise ValueError(f"{key_id} is revoked: make a new key with `medassist keys create`")
            expires = changes.get("expires")
            if type(expires) is int and expires <= time.time():
                raise ValueError("expires must be in the future: revoke a key to end it now")
            key = replace(old, **{**changes, "models": parse_models(changes.get("models", old.models))})
            key.check()
            _save(connection, key, *(column for column in key.row() if column != "id"))
            self._tell(connection, "key.updated", by, _scopes(key))
        return key

    def start_capture(self, *, key: str, recipient: str, reason: str, created_by: str, seconds: float) -> StoredCapture:
        """Orders that one key's bodies be captured for so long, for ``recipient`` to read.

        Raises:
            NoSuchKey: there is none.
            CaptureActive: they are already. Of two orders a gateway could obey only one.
            ValueError: a value is not valid.
        """
        if not 1 <= seconds <= LONGEST_CAPTURE:
            raise ValueError("a capture must take between 1 second and 24 hours")
        now = int(time.time())
        expires = now + int(seconds)
        capture = StoredCapture(new_id("cap_"), key, recipient, reason, created_by, now, expires, None)
        check_text("reason", reason, 1000)
        if not reason.strip() or not recipient:
            raise ValueError("a capture needs a reason and a recipient")
        with self._change() as connection:
            tenant = _find(connection, key).tenant
            _refuse_second_capture(connection, key, now)
            connection.execute(insert(schema.captures), [_columns(capture)])
            event = {"capture": capture.id, "key": key, "tenant": tenant, "reason": reason, "expires": expires}
            self._tell(connection, "capture.started", created_by, {**event, "recipient": recipient})
        return capture

    def end_capture(self, capture_id: str, *, by: str = "") -> StoredCapture:
        """Ends one before its time. One that has ended stays as it is.

        Raises:
            ValueError: there is none.
        """
        table = schema.captures
        with self._change() as connection:
            row = connection.execute(select(table).where(table.c.id == capture_id)).mappings().first()
            if row is None:
                raise ValueError(f"there is no capture {capture_id!r}")
            capture = StoredCapture(**row)
            if capture.active:
                capture = replace(capture, ended=int(time.time()))
                connection.execute(update(table).where(table.c.id == capture_id).values(ended=capture.ended))
                self._tell(connection, "capture.ended", by, {"capture": capture_id, "key": capture.key})
        return capture

    def captures(self) -> list[StoredCapture]:
        """All of them, the latest first."""
        rows = select(schema.captures).order_by(schema.captures.c.created.desc(), schema.captures.c.id)
        with self.read() as connection:
            return [StoredCapture(**row) for row in connection.execute(rows).mappings()]

    def usage(
        self,
        since: date | None = None,
        until: date | None = None,
        key: str | None = None,
        tenant: str | None = None,
        model: str | None = None,
        by: Sequence[str] = ("key", "model", "day"),
    ) -> list[UsageRow]:
        """The ledger, summed up.

        Args:
            since, until: days in UTC, both included.
            key, tenant, model: only of these.
            by: any of ``GROUPS``; a row for each combination, in that order.

        Raises:
            ValueError: ``by`` holds what is not in ``GROUPS``.
        """
        if wrong := [name for name in by if name not in GROUPS]:
            raise ValueError(f"by must be of {', '.join(GROUPS)}, got {wrong[0]!r}")
        table, names = schema.usage, list(dict.fromkeys(by))
        groups: list[Any] = [_group(name) for name in names]
        counts = [cast(func.coalesce(func.sum(table.c[name]), 0), BigInteger).label(name) for name in _COUNTS]
        query = select(*groups, *counts).group_by(*groups).order_by(*groups)
        if since:
            query = query.where(table.c.day >= since.isoformat())
        if until:
            query = query.where(table.c.day <= until.isoformat())
        for name, value in (("key", key), ("tenant", tenant), ("model", model)):
            if value is not None:
                query = query.where(table.c[name] == value)
        with self.read() as connection:
            rows = connection.execute(query).all()
            titles = {}
            if "key" in names:
                titles = {row.id: row.name for row in connection.execute(select(schema.keys.c.id, schema.keys.c.name))}
        found = []
        for row in rows:
            groups_of_row: dict[str, Any] = dict(zip(names, row, strict=False))
            title = titles.get(groups_of_row["key"], "") if "key" in names else None
            counted: dict[str, Any] = dict(zip(_COUNTS, row[len(names) :], strict=True))
            grouped: dict[str, Any] = {name: groups_of_row.get(name) for name in GROUPS}
            found.append(UsageRow(**grouped, name=title, **counted))
        return found

    def fact(self, name: str) -> str | None:
        """ "keys_version", "audit_secret" or "store_id"."""
        with self.read() as connection:
            query = select(schema.facts.c.value).where(schema.facts.c.name == name)
            found: str | None = connection.execute(query).scalar()
            return found

    def audit_secret(self) -> bytes:
        """With which lines of audit logs are hashed."""
        return bytes.fromhex(self.fact("audit_secret") or "")

    def audit_heads(self) -> dict[str, tuple[int, str]]:
        """Number and hash of the last line of each audit log, as far as the store knows."""
        with self.read() as connection:
            rows = connection.execute(select(schema.audit_heads).order_by(schema.audit_heads.c.log))
            return {row.log: (row.sequence, row.hash) for row in rows}

    def note(self, event: str, what: Mapping[str, Any], *, by: str = "") -> None:
        """Writes an event to the audit log that changes nothing here."""
        with self.write() as connection:
            self._tell(connection, event, by, what)

    def counts(self) -> dict[str, int]:
        """Rows of each table."""
        with self.read() as connection:
            return {
                str(table.name): connection.execute(select(func.count()).select_from(table)).scalar_one()
                for table in schema.metadata.sorted_tables
            }

    @contextmanager
    def _change(self) -> Iterator[Connection]:
        """A transaction that changes keys or captures. Gateways see by the version that something has; and since its
        row is locked from here on, changes come one after the other."""
        facts = schema.facts
        version = cast(cast(facts.c.value, BigInteger) + literal_column("1"), Text)
        with self.write() as connection:
            connection.execute(update(facts).where(facts.c.name == "keys_version").values(value=version))
            yield connection

    def _tell(self, connection: Connection, event: str, by: str, what: Mapping[str, Any]) -> None:
        if self.announce is None:
            return
        query = select(schema.facts.c.value).where(schema.facts.c.name == "audit_secret")
        secret = bytes.fromhex(connection.execute(query).scalar_one())
        heads = schema.audit_heads

        def stored(log: str) -> tuple[int, str] | None:
            row = connection.execute(select(heads.c.sequence, heads.c.hash).where(heads.c.log == log)).first()
            return None if row is None else (row.sequence, row.hash)

        if head := self.announce({"event": event, "by": by, **what}, secret, stored):
            log, sequence, last = head
            values = {"log": log, "sequence": sequence, "hash": last, "now": int(time.time())}
            connection.execute(set_head(self.path is not None), values)


def _secret(given: str | None) -> tuple[str, str]:
    key_id, secret = new_key()
    if given is not None:
        check_strength(given)
        secret = given
    return key_id, secret


def _find(connection: Connection, key_id: str) -> StoredKey:
    row = connection.execute(select(schema.keys).where(schema.keys.c.id == key_id)).mappings().first()
    if row is None:
        raise NoSuchKey(f"there is no key {key_id!r}")
    return StoredKey.from_row(dict(row))


def _refuse_second_capture(connection: Connection, key_id: str, now: int) -> None:
    table = schema.captures
    query = select(table.c.id, table.c.expires).where(
        table.c.key == key_id, table.c.ended.is_(None), table.c.expires > now
    )
    if (row := connection.execute(query).first()) is not None:
        until = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(row.expires))
        raise CaptureActive(f"{key_id} is captured until {until} UTC by {row.id}: stop that one first")


def _insert_key(connection: Connection, key: StoredKey, secret: str) -> None:
    try:
        connection.execute(insert(schema.keys), [{**key.row(), "digest": digest(secret.encode()).hex()}])
    except IntegrityError:
        raise ValueError("the secret is one that a key has or had already: bring another") from None


def _save(connection: Connection, key: StoredKey, *columns: str) -> None:
    row = key.row()
    connection.execute(
        update(schema.keys).where(schema.keys.c.id == key.id).values({name: row[name] for name in columns})
    )


def _scopes(key: StoredKey) -> dict[str, Any]:
    """What the audit log tells of a key."""
    row = key.row()
    names = [name for name in row if name not in ("id", "name", "models", "created", "revoked")]
    return {
        "key": key.id,
        "models": None if key.models is None else list(key.models),
        **{name: row[name] for name in names},
    }


def _columns(capture: StoredCapture) -> dict[str, Any]:
    return {field.name: getattr(capture, field.name) for field in fields(capture)}


def _group(name: str) -> Any:
    if name != "month":
        return schema.usage.c[name]
    # Literal: PostgreSQL takes two expressions with parameters for different ones.
    return func.substr(schema.usage.c.day, literal_column("1"), literal_column("7")).label("month")
