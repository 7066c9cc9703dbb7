"""``/admin``: who may, what it does with the store, and what it does without one."""

import asyncio
import csv
import io
import json
import re
import subprocess
import sys
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from sqlalchemy import insert

from serving.gateway import admin
from serving.tenants import audit_verify, schema
from serving.tenants.capture import new_pair
from serving.tenants.key import KeyLimits
from serving.tenants.store import Store
from tests.serving.gateway.doubles import CHAT, Client, Engine, gateway_for
from tests.serving.gateway.keeping import Keeping, bearer


@pytest.fixture
def keeping(tmp_path: Path) -> Keeping:
    return Keeping(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(f"sqlite:///{tmp_path / 'medassist.db'}")
    store.upgrade()
    return store


def serving(keeping: Keeping, *engines: Engine, **more: Any) -> AbstractAsyncContextManager[Client]:
    return gateway_for(*engines, accounts=keeping.accounts, home=str(keeping.accounts.parent), **more)


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


class Admin:
    """Requests with an admin's key, each answered with the status given, and as the OpenAPI document says."""

    def __init__(self, client: Client, secret: str) -> None:
        self.client, self.secret = client, secret
        self.document: dict[str, Any] = {}

    async def __call__(self, status: int, method: str, path: str, body: Any = None, **more: Any) -> Any:
        headers = bearer(self.secret) | more.pop("headers", {})
        url = self.client.root + "/admin" + path
        async with self.client.session.request(method, url, json=body, headers=headers, **more) as response:
            text = await response.text()
            assert response.status == status, text
            assert response.headers["Cache-Control"] == "no-store"
            assert response.headers["X-Request-Id"]
            self.headers = response.headers
        if response.content_type != "application/json":
            return text
        await self._check(method, "/admin" + path.partition("?")[0], status, content := json.loads(text))
        return content

    async def _check(self, method: str, path: str, status: int, content: Any) -> None:
        if not self.document:
            async with self.client.session.get(self.client.root + "/openapi.json", headers=bearer(self.secret)) as r:
                self.document = await r.json()
        for route, operations in self.document["paths"].items():
            if re.fullmatch(re.sub(r"{\w+}", "[^/]+", route), path) and method.lower() in operations:
                documented = operations[method.lower()]["responses"][str(status)]["content"]["application/json"]
                jsonschema.validate(content, {**documented["schema"], "components": self.document["components"]})
                return
        raise AssertionError(f"{method} {path} is not documented")


def events(home: Path) -> list[dict[str, Any]]:
    """What the audit log says that somebody did."""
    return [event for event in audit_verify.events(home / "audit") if "by" in event]


def contents(folder: Path) -> bytes:
    """Of all files in it."""
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_a_key_through_its_life(keeping: Keeping, store: Store, tmp_path: Path) -> None:
    row, secret = keeping.key(admin=1)

    async def test() -> None:
        async with Engine().running() as engine, serving(keeping, engine) as client:
            ask = Admin(client, secret)
            made = await ask(201, "POST", "/keys", {
                "tenant": "ward-7", "name": "portal", "models": ["m"], "share": 2, "expires": 4_000_000_000,
                "limits": {"requests_per_minute": 60, "tokens_per_month": 1_000_000},
            })  # fmt: skip
            assert made["secret"].startswith("ma_")
            stored = store.key(made["id"])
            assert (stored.tenant, stored.models, stored.share, stored.admin) == ("ward-7", ("m",), 2.0, False)
            assert stored.limits == KeyLimits(requests_per_minute=60, tokens_per_month=1_000_000)
            shown = await ask(200, "GET", f"/keys/{made['id']}")
            assert shown == {name: value for name, value in made.items() if name != "secret"}
            await ask(201, "POST", "/keys", {"tenant": "other"})
            listed = await ask(200, "GET", "/keys?tenant=ward-7")
            assert listed == {"data": [shown]}
            assert len((await ask(200, "GET", "/keys"))["data"]) == 2

            changed = await ask(200, "PATCH", f"/keys/{made['id']}", {"limits": {"concurrency": 2}, "metrics": True})
            assert changed["limits"]["concurrency"] == 2
            assert changed["limits"]["requests_per_minute"] is None
            assert (changed["metrics"], changed["share"], changed["name"]) == (True, 2.0, "portal")

            new = await ask(201, "POST", f"/keys/{made['id']}/rotate", {"overlap_seconds": 60})
            assert new["secret"] not in ("", made["secret"])
            assert new["origin"] == made["id"]
            assert (await ask(200, "GET", f"/keys/{made['id']}"))["expires"] < 4_000_000_000
            assert (await ask(201, "POST", f"/keys/{new['id']}/rotate"))["origin"] == made["id"]  # no body: a day

            assert (await ask(200, "POST", f"/keys/{new['id']}/revoke"))["state"] == "revoked"
            assert (await ask(400, "POST", f"/keys/{new['id']}/rotate"))["error"]["code"] == "invalid_value"
            for method, path in (("GET", ""), ("POST", "/revoke"), ("POST", "/rotate")):
                assert (await ask(404, method, f"/keys/key_none{path}"))["error"]["code"] == "key_not_found"
            assert (await ask(404, "PATCH", "/keys/key_none", {"name": "x"}))["error"]["code"] == "key_not_found"

            told = events(tmp_path)
            assert [e["event"] for e in told] == [
                "key.created", "key.created", "key.updated", "key.rotated", "key.rotated", "key.revoked",
            ]  # fmt: skip
            assert {e["by"] for e in told} == {row["id"]}  # who did it
            for known in (made["secret"], new["secret"], secret):
                assert known.encode() not in contents(tmp_path)

    run(test())


def test_who_may(keeping: Keeping, store: Store) -> None:
    async def test() -> None:
        async with Engine().running() as engine, serving(keeping, engine) as client:

            async def status(path: str, secret: str = "", method: str = "GET") -> tuple[int, str | None]:
                headers = bearer(secret) if secret else {}
                async with client.session.request(method, client.root + path, headers=headers) as response:
                    content = await response.read()
                    code = json.loads(content)["error"]["code"] if response.status >= 400 else None
                    return response.status, code

            # Without any key nobody may administer, not even here.
            assert await status("/admin/keys") == (403, "admin_disabled")
            assert await status("/admin/nothing") == (403, "admin_disabled")
            assert await status("/metrics") == (200, None)
            assert await status("/v1/models") == (200, None)
            _, plain = keeping.key()
            _, reader = keeping.key(metrics=1)
            _, boss = keeping.key(admin=1)
            async with asyncio.timeout(30):  # the worker looks every quarter of a second
                while (await status("/admin/keys", boss))[0] != 200:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            for path in ("/health", "/ready"):
                assert await status(path, method="HEAD") == (200, None)
            for path in ("/v1/models", "/v1/models/m", "/openapi.json", "/metrics", "/admin/keys", "/nothing"):
                assert await status(path) == (401, "missing_api_key")
                assert await status(path, "ma_wrong") == (401, "invalid_api_key")
            assert await status("/admin/keys", "ma_wrong", "POST") == (401, "invalid_api_key")
            for path in ("/v1/models", "/v1/models/m", "/openapi.json"):
                assert (await status(path, plain))[0] == 200
            assert await status("/nothing", plain) == (404, "not_found")
            assert await status("/metrics", plain) == (403, "insufficient_scope")
            assert (await status("/metrics", reader))[0] == 200
            assert (await status("/metrics", boss))[0] == 200
            for method, path in (("GET", "/admin/keys"), ("POST", "/admin/keys"), ("GET", "/admin/usage")):
                for secret in (plain, reader):
                    assert await status(path, secret, method) == (403, "insufficient_scope")
            assert (await status("/admin/keys", boss))[0] == 200
            # No memory for the bodies of strangers, or of those who only ask what they may.
            for method, path, headers, read in (
                ("POST", CHAT, {}, False), ("POST", CHAT, bearer(plain), True), ("OPTIONS", CHAT, bearer(plain), False),
                ("POST", "/admin/keys", bearer(plain), False), ("POST", "/admin/keys", bearer(boss), True),
                ("POST", "/health", bearer(boss), False), ("POST", "/nothing", bearer(boss), False),
            ):  # fmt: skip
                fields = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
                assert client.gateway.admit({"method": method, "path": path, "headers": fields}) is read

    run(test())


def test_strangers_are_not_told_which_models_there_are(keeping: Keeping) -> None:
    async def test() -> None:
        async with Engine().running() as engine, serving(keeping, engine) as client:

            async def told(path: str, *secret: str) -> Any:
                headers = {"X-Api-Key": secret[0]} if secret else {}
                async with client.session.get(client.root + path, headers=headers) as response:
                    assert response.status == 200
                    return await response.json()

            named = {"/health": {"status": "ok"}, "/ready": {"status": "ready"}}
            for path, status in named.items():
                assert await told(path) == status | {"engines": {"m": "ready"}}
            _, secret = keeping.key(models='["m"]')
            assert client.gateway.accounts._keys is not None
            client.gateway.accounts._keys.refresh()
            for path, status in named.items():
                assert await told(path) == await told(path, "ma_wrong") == status
                assert await told(path, secret) == status | {"engines": {"m": "ready"}}
            failures = client.gateway.metrics.auth_failures
            assert {failures.labels(reason)._value.get() for reason in ("missing", "unknown")} == {0}

    run(test())


def test_a_key_sees_only_its_models(keeping: Keeping) -> None:
    _, narrow = keeping.key(models=json.dumps(["n"]))
    _, wide = keeping.key()

    async def test() -> None:
        async with Engine().running() as engine, serving(keeping, engine, aliases={"n": "m", "o": "m"}) as client:

            async def names(secret: str) -> set[str]:
                async with client.session.get(client.root + "/v1/models", headers=bearer(secret)) as response:
                    return {card["id"] for card in (await response.json())["data"]}

            assert await names(wide) == {"m", "n", "o"}
            assert "o" not in await names(narrow)
            async with client.session.get(client.root + "/v1/models/o", headers=bearer(narrow)) as response:
                assert response.status == 404

    run(test())


WRONG: list[tuple[Any, str | None]] = [
    ({}, "tenant"),
    ({"tenant": ""}, "tenant"),
    ({"tenant": "a b"}, "tenant"),
    ({"tenant": 5}, "tenant"),
    ({"tenant": "a", "secret": "mine"}, "secret"),
    ({"tenant": "a", "limits": {"rpm": 5}}, "limits.rpm"),
    ({"tenant": "a", "limits": {"concurrency": 0}}, "limits.concurrency"),
    ({"tenant": "a", "limits": {"concurrency": "5"}}, "limits.concurrency"),
    ({"tenant": "a", "share": 0}, "share"),
    ({"tenant": "a", "name": "a\nb"}, "name"),
    ({"tenant": "a", "models": "m"}, "models"),
    ({"tenant": "a", "admin": "yes"}, "admin"),
    ([], None),
]


def test_wrong_values_are_named(keeping: Keeping, store: Store) -> None:
    _, secret = keeping.key(admin=1)

    async def test() -> None:
        async with Engine().running() as engine, serving(keeping, engine) as client:
            ask = Admin(client, secret)
            for body, param in WRONG:
                error = (await ask(400, "POST", "/keys", body))["error"]
                assert (error["code"], error["param"], error["type"]) == (
                    "invalid_value",
                    param,
                    "invalid_request_error",
                )
            assert store.keys() == []
            for path in ("/keys?tenant=%00", "/usage?key=%00", "/usage?tenant=%00", "/usage?model=a%0A", "/keys/%00"):
                assert (await ask(400, "GET", path))["error"]["code"] == "invalid_value"
            for path in ("/keys/a%00/revoke", "/keys/%FF/rotate", f"/keys/{'a' * 65}/revoke"):
                await ask(400, "POST", path)
            await ask(400, "PATCH", "/keys/%00", {"share": 2})
            await ask(400, "DELETE", "/captures/%00")

    run(test())


def test_what_only_the_store_knows_to_be_wrong(keeping: Keeping, store: Store) -> None:
    _, secret = keeping.key(admin=1)

    async def test() -> None:
        async with Engine().running() as engine, serving(keeping, engine) as client:
            ask = Admin(client, secret)
            assert "future" in (await ask(400, "POST", "/keys", {"tenant": "a", "expires": 5}))["error"]["message"]
            await ask(400, "POST", "/keys", {"tenant": "a", "models": []})
            async with client.session.post(
                client.root + "/admin/keys", data=b"{", headers=bearer(secret) | {"Content-Type": "application/json"}
            ) as response:
                assert response.status == 400
            await ask(400, "GET", "/usage?by=key,secret")
            await ask(400, "GET", "/usage?since=yesterday")
            await ask(400, "GET", "/usage?format=xml")
            assert store.keys() == []

    run(test())


def test_usage(keeping: Keeping, store: Store) -> None:
    _, secret = keeping.key(admin=1)
    key, _ = store.create_key(tenant="ward-7", name="=1+1")
    rows = [
        {"day": day, "key": key.id, "tenant": "ward-7", "model": model, "requests": 2, "failed": 1,
         "prompt_tokens": 30, "completion_tokens": 10, "estimated": 0}
        for day in ("2026-10-31", "2026-11-01") for model in ("m", "n")
    ]  # fmt: skip
    with store.write() as connection:
        connection.execute(insert(schema.usage), rows)

    async def test() -> None:
        async with Engine().running() as engine, serving(keeping, engine) as client:
            ask = Admin(client, secret)
            assert len((await ask(200, "GET", "/usage"))["data"]) == 4
            (row,) = (await ask(200, "GET", "/usage?by=tenant&since=2026-11-01"))["data"]
            assert (row["tenant"], row["day"], row["requests"], row["prompt_tokens"]) == ("ward-7", None, 4, 60)
            assert (await ask(200, "GET", "/usage?tenant=nobody"))["data"] == []
            for how in ({"params": {"format": "csv"}}, {"headers": {"Accept": "text/csv"}}):
                text = await ask(200, "GET", "/usage", **how)
                assert ask.headers["Content-Type"].startswith("text/csv")
                head, *lines = csv.reader(io.StringIO(text))
                assert head[:4] == ["key", "name", "model", "day"]
                assert len(lines) == 4
                assert lines[0][1] == "'=1+1"  # not a formula

    run(test())


def test_captures(keeping: Keeping, store: Store, tmp_path: Path) -> None:
    row, secret = keeping.key(admin=1)
    key, _ = store.create_key(tenant="ward-7")
    _, recipient = new_pair()

    async def test() -> None:
        async with Engine().running() as engine, serving(keeping, engine) as client:
            ask = Admin(client, secret)
            order = {"key": key.id, "recipient": recipient, "reason": "incident 12", "seconds": 600}
            made = await ask(201, "POST", "/captures", order)
            assert (made["active"], made["created_by"], made["expires"] - made["created"]) == (True, row["id"], 600)
            second = (await ask(409, "POST", "/captures", order))["error"]
            assert (second["code"], made["id"] in second["message"]) == ("capture_active", True)
            assert await ask(200, "GET", "/captures") == {"data": [made]}
            assert (await ask(200, "DELETE", f"/captures/{made['id']}"))["active"] is False
            assert (await ask(404, "DELETE", "/captures/cap_none"))["error"]["code"] == "capture_not_found"
            await ask(404, "POST", "/captures", {**order, "key": "key_none"})
            for wrong in ({"recipient": "0" * 64}, {"recipient": "x"}, {"seconds": 10**6}, {"reason": ""}):
                await ask(400, "POST", "/captures", {**order, **wrong})
            told = [(e["event"], e["by"]) for e in events(tmp_path)]
            assert told == [("capture.started", row["id"]), ("capture.ended", row["id"])]

    run(test())


def test_without_the_store_only_admin_stops(keeping: Keeping, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, secret = keeping.key(admin=1)

    async def test() -> None:
        away = {"url": "postgresql://nobody@127.0.0.1:9/medassist"}
        for settings in ({}, {"store": away}):  # not made yet; nobody listens there
            async with Engine().running() as engine, serving(keeping, engine, **settings) as client:
                ask = Admin(client, secret)
                for method, path, body in (("GET", "/keys", None), ("POST", "/keys", {"tenant": "a"})):
                    error = (await ask(503, method, path, body))["error"]
                    assert error["code"] == "store_unavailable"
                    assert ask.headers["Retry-After"] == "5"
                async with client.post(headers=bearer(secret)) as response:
                    assert response.status == 200
        # One that answers slowly does not collect threads.
        monkeypatch.setattr(admin, "MAX_WAITING", 0)
        async with Engine().running() as engine, serving(keeping, engine) as client:
            await Admin(client, secret)(503, "GET", "/keys")
        monkeypatch.undo()
        Store(f"sqlite:///{tmp_path / 'medassist.db'}").upgrade()
        async with Engine().running() as engine, serving(keeping, engine) as client:
            ask = Admin(client, secret)
            assert await ask(200, "GET", "/keys") == {"data": []}
            (tmp_path / "audit").mkdir(exist_ok=True)
            for path in (tmp_path / "audit").iterdir():
                path.unlink()
            (tmp_path / "audit").rmdir()
            (tmp_path / "audit").write_text("no folder")  # what cannot be put down is not done
            await ask(503, "POST", "/keys", {"tenant": "a"})
            assert await ask(200, "GET", "/keys") == {"data": []}

    run(test())


def test_a_worker_has_nothing_of_the_database_before_it_is_asked() -> None:
    code = f"""
import sys
from serving.gateway.app import Gateway
from serving.gateway.settings import Settings
Gateway(Settings.model_validate({{"models": {{"m": {{"engines": [{{"url": "http://127.0.0.1:9"}}]}}}}}}))
names = {{name.partition(".")[0] for name in sys.modules}}
print(sorted(names & {{"sqlalchemy", "alembic", "psycopg", "cryptography", "opentelemetry"}}), {CHAT!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["[]", CHAT]
