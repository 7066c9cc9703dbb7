"""Pages of other origins: none may use the API, but those that are named."""

import asyncio
from typing import Any

import pytest

from serving.gateway.web import Web
from tests.serving.gateway.doubles import CHAT, Client, Engine, gateway_for
from tests.serving.gateway.keeping import Keeping, bearer

HERE, ELSEWHERE = "https://app.example.org", "https://evil.example.org"
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}


def run(test: Any) -> None:
    asyncio.run(asyncio.wait_for(test, 30))


def cors(response: Any) -> dict[str, str]:
    return {k.lower(): v for k, v in response.headers.items() if k.lower().startswith("access-control")}


async def preflight(client: Client, origin: str, path: str = CHAT, **more: str) -> Any:
    headers = {"Origin": origin, **PREFLIGHT, **more}
    async with client.session.options(client.root + path, headers=headers) as response:
        await response.read()
        return response


def test_closed_by_default(tmp_path: Any) -> None:
    keeping = Keeping(tmp_path)
    _, secret = keeping.key()

    async def test() -> None:
        async with Engine().running() as engine, gateway_for(engine, accounts=keeping.accounts) as client:
            response = await preflight(client, HERE)
            assert (response.status, cors(response)) == (403, {})
            async with client.post(headers=bearer(secret) | {"Origin": HERE}) as response:
                assert (response.status, cors(response)) == (200, {})
                assert "Vary" not in response.headers
            async with client.session.options(client.root + CHAT, headers={"Origin": HERE}) as response:
                assert (response.status, cors(response)) == (405, {})

    run(test())


def test_named_origins_may(tmp_path: Any) -> None:
    keeping = Keeping(tmp_path)
    _, secret = keeping.key(requests_per_minute=100, admin=1)
    ours = bearer(secret) | {"Origin": HERE}

    async def test() -> None:
        async with Engine().running() as engine, gateway_for(engine, accounts=keeping.accounts) as client:
            client.server.web = Web([HERE])
            response = await preflight(client, HERE, **{
                "Access-Control-Request-Headers": "Authorization, X-Stainless-OS, x-evil, content-type",
            })  # fmt: skip
            assert response.status == 204
            told = cors(response)
            assert told["access-control-allow-origin"] == HERE
            assert told["access-control-allow-headers"] == "authorization, x-stainless-os, content-type"
            assert "POST" in told["access-control-allow-methods"]
            assert int(told["access-control-max-age"]) > 0
            assert "access-control-allow-credentials" not in told
            assert response.headers["Vary"] == "origin"
            for stream in (False, True):
                async with client.post(stream, headers=ours) as response:
                    await response.read()
                    assert response.status == 200
                    told = cors(response)
                    assert told["access-control-allow-origin"] == HERE
                    exposed = told["access-control-expose-headers"].split(", ")
                    wanted = {n.lower() for n in response.headers if n.lower().startswith(("x-ratelimit", "x-request"))}
                    assert len(wanted) >= 4
                    assert wanted | {"retry-after", "retry-after-ms", "x-should-retry"} <= set(exposed)
            # A page may read why it was refused, here and by the server in front.
            for origin, body, status in ((HERE, b"{}", 401), (HERE, b"x" * 9_000_000, 413)):
                async with client.session.post(
                    client.root + CHAT, data=body, headers={"Origin": origin, "Content-Type": "application/json"}
                ) as response:
                    assert (response.status, cors(response)["access-control-allow-origin"]) == (status, HERE)
            for origin in (ELSEWHERE, "null", HERE + ".evil.org", HERE.upper(), "http://app.example.org", HERE + ":8"):
                response = await preflight(client, origin)
                assert (response.status, cors(response)) == (403, {})
                async with client.post(headers=bearer(secret) | {"Origin": origin}) as response:
                    assert (response.status, cors(response)) == (200, {})
                    assert response.headers["Vary"] == "origin"
            # Operators' routes are for no page.
            for path in ("/admin/keys", "/metrics"):
                response = await preflight(client, HERE, path)
                assert (response.status, cors(response)) == (403, {})
                async with client.session.get(client.root + path, headers=ours) as response:
                    assert cors(response) == {}

    run(test())


@pytest.mark.parametrize(
    ("setting", "origin", "same"),
    [
        ("https://App.Example.org", "https://app.example.org", True),
        ("https://app.example.org:443", "https://app.example.org", True),
        ("http://app.example.org:80", "http://app.example.org", True),
        ("https://app.example.org:80", "https://app.example.org", False),
        ("http://localhost:3000", "http://localhost:3000", True),
        ("http://localhost:3000", "http://localhost", False),
    ],
)
def test_origins_are_compared_as_browsers_write_them(setting: str, origin: str, same: bool) -> None:
    lines, count = Web([setting]).fields(origin.encode(), "/v1/models", False)
    assert (b"access-control-allow-origin: %b\r\n" % origin.encode() in lines) is same
    assert lines.count(b"\r\n") == count
