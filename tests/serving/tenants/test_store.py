"""The store of keys, captures and usage, on SQLite and PostgreSQL."""

import contextlib
import hashlib
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from serving.tenants.announcing import announce_in
from serving.tenants.audit_files import days, name_of
from serving.tenants.key import KeyLimits
from serving.tenants.statements import add_usage
from serving.tenants.store import CaptureActive, NoSuchKey, Store, StoreError

GOOD = "Kq82mPd7Lh3nRb6TjGc9VxFo1Zw5Ys0e"
LIMITS = KeyLimits(5, 1000, 2, 64, 10**6)


def version(store: Store) -> int:
    return int(store.fact("keys_version") or 0)


def dump(store: Store, store_url: str) -> bytes:
    """All that the database's files hold, as far as they can be read."""
    if store.path:
        with store.read() as connection:
            connection.execute(text("SELECT 1 FROM keys")).all()  # the log's file is there while somebody reads
            return b"".join(path.read_bytes() for path in sorted(store.path.parent.glob("medassist.db*")))
    return subprocess.run(["pg_dump", store_url], capture_output=True, check=True).stdout


def test_a_key_comes_back_as_it_was_made(store: Store) -> None:
    before = int(time.time())
    key, secret = store.create_key(
        tenant="ward-7", name="Älteste [x]", models=["b", "a", "b"], admin=True, metrics=True, limits=LIMITS, share=2,
        expires=before + 60,
    )  # fmt: skip
    assert (key.tenant, key.name, key.models, key.admin, key.metrics) == (
        "ward-7",
        "Älteste [x]",
        ("b", "a"),
        True,
        True,
    )
    assert (key.limits, key.share, key.expires, key.revoked, key.origin) == (LIMITS, 2.0, before + 60, None, key.id)
    assert before <= key.created <= time.time()
    plain, other = store.create_key(tenant="a")
    assert (plain.models, plain.admin, plain.metrics, plain.limits) == (None, False, False, KeyLimits())
    assert secret != other
    assert store.key(key.id) == key
    assert store.keys() == [plain, key]
    with pytest.raises(NoSuchKey, match="there is no key 'key_nobody'"):
        store.key("key_nobody")


def test_states(store: Store) -> None:
    key, _ = store.create_key(tenant="a", expires=int(time.time()) + 1000)
    assert key.state() == "active"
    assert key.state(now=time.time() + 1001) == "expired"
    revoked = store.revoke(key.id)
    assert revoked.state() == "revoked" == store.key(key.id).state()
    assert store.revoke(key.id) == revoked
    for work in (store.revoke, lambda key_id: store.rotate(key_id, 0), lambda key_id: store.update_key(key_id, {})):
        with pytest.raises(NoSuchKey):
            work("key_nobody")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"tenant": ""}, "tenant must be"),
        ({"tenant": "a b"}, "tenant must be"),
        ({"tenant": "=cmd"}, "tenant must be"),
        ({"name": "a\nb"}, "name must be"),
        ({"name": "x" * 129}, "name must be"),
        ({"models": []}, "models must hold at least one"),
        ({"models": ["../x"]}, "models: each must be"),
        ({"limits": KeyLimits(requests_per_minute=0)}, "requests_per_minute must be a whole number from 1"),
        ({"limits": KeyLimits(tokens_per_month=2**60)}, "tokens_per_month must be"),
        ({"limits": KeyLimits(concurrency=1.5)}, "concurrency must be"),  # type: ignore[arg-type]
        ({"share": 0}, "share must be"),
        ({"share": float("nan")}, "share must be"),
        ({"expires": 5}, "expires must be in the future"),
        ({"secret": "sk-1234"}, "the secret is a default"),
    ],
)
def test_what_no_key_can_have_is_refused(wrong: dict[str, Any], message: str, tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/s.db") as store:
        store.upgrade()
        before = version(store)
        with pytest.raises(ValueError, match=message):
            store.create_key(**{"tenant": "a", **wrong})
        assert (store.keys(), version(store)) == ([], before)


def test_every_change_has_a_version_of_its_own_and_what_fails_has_none(store: Store) -> None:
    seen = [version(store)]

    def step(work: Callable[[], Any]) -> Any:
        result = work()
        seen.append(version(store))
        return result

    key, _ = step(lambda: store.create_key(tenant="a"))
    new, _ = step(lambda: store.rotate(key.id, 60))
    step(lambda: store.update_key(new.id, {"share": 3.0}))
    order = {"key": new.id, "recipient": "00" * 32, "reason": "r", "created_by": "me"}
    capture = step(lambda: store.start_capture(**order, seconds=60))
    step(lambda: store.end_capture(capture.id))
    step(lambda: store.revoke(new.id))
    assert seen == list(range(seen[0], seen[0] + 7))
    store.keys(), store.usage(), store.captures(), store.counts()
    with pytest.raises(ValueError, match="is revoked: make a new key"):
        store.rotate(new.id, 0)
    with pytest.raises(ValueError, match="is revoked: make a new key"):
        store.update_key(new.id, {"share": 1.0})
    with pytest.raises(ValueError, match="there is no capture"):
        store.end_capture("cap_nothing")
    assert version(store) == seen[-1]


def test_a_rotated_key_has_all_of_the_old_one_which_ends_after_the_overlap(store: Store) -> None:
    soon = int(time.time()) + 100
    key, secret = store.create_key(tenant="a", models=["m"], metrics=True, limits=LIMITS, share=0.5, expires=soon)
    new, other = store.rotate(key.id, 50)
    assert replace(new, id=key.id, created=key.created) == key
    assert new.id != key.id
    assert secret != other
    old = store.key(key.id)
    assert old.expires is not None
    assert new.created <= old.expires - 50 <= time.time()
    store.rotate(new.id, 10_000)
    assert store.key(new.id).expires == soon  # not later than it would have
    last, _ = store.create_key(tenant="a")
    store.rotate(last.id, 0)
    assert store.key(last.id).state() == "expired"
    with pytest.raises(ValueError, match="is expired: make a new key"):
        store.rotate(last.id, 0)
    with pytest.raises(ValueError, match="the overlap must be"):
        store.rotate(new.id, -1)


def test_changes_of_a_key(store: Store) -> None:
    key, _ = store.create_key(tenant="a", models=["m"], limits=LIMITS, expires=int(time.time()) + 60)
    changed = store.update_key(key.id, {"models": None, "limits": replace(LIMITS, concurrency=None), "expires": None})
    assert changed == replace(key, models=None, limits=replace(LIMITS, concurrency=None), expires=None)
    assert store.key(key.id) == changed
    with pytest.raises(ValueError, match="tenant of a key cannot be changed"):
        store.update_key(key.id, {"tenant": "b"})
    for wrong in ({"share": -1}, {"share": None}, {"name": None}, {"admin": None}, {"metrics": 1}, {"expires": 1.5},
                  {"models": ["a", 5]}, {"expires": True}, {"expires": int(time.time())}):  # fmt: skip
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}:? .*must be"):
            store.update_key(key.id, wrong)
    assert store.key(key.id) == changed


def test_an_own_secret_is_taken_once(store: Store) -> None:
    key, secret = store.create_key(tenant="a", secret=GOOD)
    assert secret == GOOD
    for work in (lambda: store.create_key(tenant="b", secret=GOOD), lambda: store.rotate(key.id, 5, secret=GOOD)):
        with pytest.raises(ValueError, match="the secret is one that a key has or had already") as refused:
            work()
        assert key.id not in str(refused.value)
        assert GOOD not in str(refused.value)
    assert store.keys() == [key]
    assert store.counts()["tenants"] == 1


def test_secrets_are_nowhere_in_clear(store: Store, store_url: str, tmp_path: Path) -> None:
    store.announce = announce_in(tmp_path / "home", 10)
    key, first = store.create_key(tenant="a", name="n")
    _, second = store.create_key(tenant="a", secret=GOOD)
    new, third = store.rotate(key.id, 60)
    store.update_key(new.id, {"share": 2.0})
    store.revoke(new.id)
    written = dump(store, store_url)
    log = b"".join((tmp_path / "home/audit" / name_of(day)).read_bytes() for day in days(tmp_path / "home/audit"))
    assert key.id.encode() in written
    assert key.id.encode() in log
    for secret in (first, second, third):
        assert hashlib.sha256(secret.encode()).hexdigest().encode() in written
        for form in (secret, secret.removeprefix("ma_"), secret[:16], secret[-16:], secret.encode().hex()):
            assert form.encode() not in written
            assert form.encode() not in log
        assert secret not in repr(store.keys())


def test_changes_are_announced_before_they_are_in_force(store: Store) -> None:
    events: list[dict[str, Any]] = []
    secrets = set()

    def announce(event: dict[str, Any], secret: bytes, stored: object) -> tuple[str, int, str]:
        events.append(event)
        secrets.add(secret)
        return "log", len(events), f"hash-{len(events)}"

    store.announce = announce
    key, _ = store.create_key(tenant="a", models=["m"], limits=LIMITS, by="me")
    new, _ = store.rotate(key.id, 60, by="me")
    store.update_key(new.id, {"admin": True}, by="you")
    order: dict[str, Any] = {"key": new.id, "recipient": "00" * 32, "reason": "a fault", "created_by": "doctor"}
    capture = store.start_capture(**order, seconds=60)
    store.end_capture(capture.id, by="you")
    store.end_capture(capture.id, by="you")
    store.revoke(new.id, by="me")
    store.revoke(new.id, by="me")
    assert [(event["event"], event["by"], event["key"]) for event in events] == [
        ("key.created", "me", key.id),
        ("key.rotated", "me", new.id),
        ("key.updated", "you", new.id),
        ("capture.started", "doctor", new.id),
        ("capture.ended", "you", new.id),
        ("key.revoked", "me", new.id),
    ]
    assert (events[0]["models"], events[0]["requests_per_minute"]) == (["m"], 5)
    assert events[1]["replaces"] == key.id
    assert events[3]["reason"] == "a fault"
    assert secrets == {store.audit_secret()}
    assert len(store.audit_secret()) == 32
    assert store.audit_heads() == {"log": (6, "hash-6")}

    def fail(event: dict[str, Any], secret: bytes, stored: object) -> None:
        raise OSError(28, "No space left on device")

    store.announce = fail
    before = (store.keys(), version(store), store.counts())
    for work in (lambda: store.create_key(tenant="b"), lambda: store.revoke(key.id), lambda: store.rotate(key.id, 5)):
        with pytest.raises(OSError, match="No space left"):
            work()
    assert (store.keys(), version(store), store.counts()) == before


def test_captures(store: Store) -> None:
    key, _ = store.create_key(tenant="a")
    order: dict[str, Any] = {"key": key.id, "recipient": "00" * 32, "reason": "a fault", "created_by": "me"}
    capture = store.start_capture(**order, seconds=60)
    assert (capture.key, capture.reason, capture.created_by, capture.expires - capture.created) == (
        key.id, "a fault", "me", 60,
    )  # fmt: skip
    assert store.captures() == [capture]
    assert capture.active
    with pytest.raises(CaptureActive, match=f"^{key.id} is captured until .* UTC by {capture.id}: stop that one first"):
        store.start_capture(**order, seconds=60)
    another, _ = store.create_key(tenant="a")
    store.end_capture(store.start_capture(**{**order, "key": another.id}, seconds=60).id)
    ended = store.end_capture(capture.id)
    assert not ended.active
    assert ended in store.captures()
    again = store.start_capture(**order, seconds=60)
    assert [found.id for found in store.captures() if found.active] == [again.id]
    for wrong, error in (
        ({"key": "key_nobody"}, NoSuchKey),
        ({"reason": " "}, ValueError),
        ({"recipient": ""}, ValueError),
    ):
        with pytest.raises(error):
            store.start_capture(**{**order, **wrong}, seconds=60)
    with pytest.raises(ValueError, match="must take between 1 second and 24 hours"):
        store.start_capture(**order, seconds=0)


def test_usage_is_summed_up_by_what_is_asked_for(store: Store) -> None:
    assert [(row.requests, row.prompt_tokens) for row in store.usage(by=())] == [(0, 0)]
    key, _ = store.create_key(tenant="a", name="first")
    counts = {"failed": 1, "prompt_tokens": 2**40, "completion_tokens": 3, "estimated": 0}
    with store.write() as connection:
        for day, name, tenant, model, requests in (
            ("2026-10-31", key.id, "a", "m", 1),
            ("2026-11-01", key.id, "a", "m", 2),
            ("2026-11-30", key.id, "a", "n", 4),
            ("2026-11-30", "key_b", "b", "m", 8),
            ("2026-12-01", "", "", "", 16),
        ):
            row = {"day": day, "key": name, "tenant": tenant, "model": model, "requests": requests, **counts}
            connection.execute(add_usage(store.path is not None), row)
    rows = store.usage()
    assert sorted((row.day, row.key, row.model, row.requests) for row in rows) == sorted([
        ("2026-12-01", "", "", 16), ("2026-11-30", "key_b", "m", 8), ("2026-10-31", key.id, "m", 1),
        ("2026-11-01", key.id, "m", 2), ("2026-11-30", key.id, "n", 4),
    ])  # fmt: skip
    assert {row.key: row.name for row in rows} == {key.id: "first", "key_b": "", "": ""}

    def by(*groups: str, **only: Any) -> list[tuple[Any, ...]]:
        found = store.usage(by=groups, **only)
        assert all(type(row.prompt_tokens) is int for row in found)
        return [(*(getattr(row, group) for group in groups), row.requests) for row in found]

    assert by("month") == [("2026-10", 1), ("2026-11", 14), ("2026-12", 16)]
    assert by("tenant", "month") == [("", "2026-12", 16), ("a", "2026-10", 1), ("a", "2026-11", 6), ("b", "2026-11", 8)]
    assert by("model") == [("", 16), ("m", 11), ("n", 4)]
    assert by("month", since=date(2026, 11, 1), until=date(2026, 11, 30)) == [("2026-11", 14)]
    assert by("day", key=key.id, model="m") == [("2026-10-31", 1), ("2026-11-01", 2)]
    assert by("model", tenant="b") == [("m", 8)]
    assert by(key=key.id) == [(7,)]
    (total,) = store.usage(by=())
    assert (total.failed, total.prompt_tokens, total.completion_tokens, total.day) == (5, 5 * 2**40, 15, None)
    with pytest.raises(ValueError, match="by must be of month, day, tenant, key, model, got 'secret'"):
        store.usage(by=("secret",))


def test_changes_at_once_are_all_made(store: Store, store_url: str) -> None:
    key, _ = store.create_key(tenant="start")
    before = version(store)
    failures: list[Exception] = []

    def work(index: int) -> None:
        try:
            with Store(store_url) as own:
                for _ in range(4):
                    made, _ = own.create_key(tenant="shared")  # one tenant, made once
                    own.rotate(made.id, 0)
                own.revoke(key.id)
        except Exception as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert version(store) == before + 4 * 9
    assert len(store.keys()) == 1 + 4 * 8
    assert store.counts()["tenants"] == 2
    assert store.key(key.id).state() == "revoked"


def test_a_store_of_sqlite_that_is_written_to_can_be_read(tmp_path: Path) -> None:
    with Store(f"sqlite:///{tmp_path}/s.db") as store:
        store.upgrade()
        key, _ = store.create_key(tenant="a")
        store._arguments["timeout"] = 0.1
        with contextlib.closing(sqlite3.connect(tmp_path / "s.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert store.keys() == [key]
            with pytest.raises(StoreError, match="another process has been writing to it for too long"):
                store.revoke(key.id)
            other.execute("ROLLBACK")
        store.revoke(key.id)


def test_a_database_that_is_away_is_no_traceback_and_shows_no_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    with Store("postgresql://me:hunter2@127.0.0.1:1/db") as store:
        for work in (store.keys, store.upgrade, store.revision, lambda: store.create_key(tenant="a")):
            with pytest.raises(StoreError, match=r"the store \(PostgreSQL db at .* cannot be used: ") as refused:
                work()
            assert "hunter2" not in str(refused.value)
            assert refused.value.__suppress_context__
        assert "hunter2" not in repr(store)
    (tmp_path / "s.db").write_bytes(b"no database at all" * 100)
    with Store(f"sqlite:///{tmp_path}/s.db") as store, pytest.raises(StoreError, match="file is not a database"):
        store.keys()
    (tmp_path / "gone").mkdir()
    with Store(f"sqlite:///{tmp_path}/gone") as store, pytest.raises(StoreError, match="unable to open"):
        store.keys()


def test_what_no_column_can_hold_is_no_failure_of_the_database(store: Store) -> None:
    works: list[Callable[[str], object]] = [store.key, store.revoke, lambda what: store.usage(tenant=what)]
    for work in works:
        with contextlib.suppress(ValueError):  # SQLite holds it
            work("a\0")


def test_parameters_are_in_no_message(store: Store) -> None:
    digest = "d1" * 32
    with pytest.raises(StoreError) as refused, store.write() as connection:
        connection.execute(text("INSERT INTO keys (id, digest) VALUES (:id, :digest)"), {"id": "x", "digest": digest})
    assert digest not in str(refused.value)
