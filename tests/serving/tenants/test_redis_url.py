"""Addresses of Redis: what is one, and that no message repeats a password."""

import asyncio
from pathlib import Path

import pytest

from serving.gateway.metrics import Metrics
from serving.gateway.settings import Settings, load
from serving.tenants.limits import Limits
from serving.tenants.redis_url import check_redis
from tests.serving.tenants.redis_server import Server
from tests.waiting import eventually

TAKEN = (
    "redis://h", "redis://h:6379/3", "rediss://user@h/0?ssl_cert_reqs=required", "redis://[::1]:6379", "redis://h?db=2",
    "unix:///run/redis.sock", "unix://user@/run/redis.sock?db=1",
)  # fmt: skip
SECRET = (
    "redis://:hunter2@h", "rediss://user:hunter2@h:1/0", "redis://u:hun%40ter2@h", "redis://h?password=hunter2",
    "unix://user:hunter2@/run/redis.sock", "unix:///run/redis.sock?db=1&password=hunter2",
)  # fmt: skip
WRONG = (
    "", "hunter2", "http://hunter2", "redis:h", "redis://", "redis:///1", "redis://h/hunter2", "redis://h/1/2",
    "redis://h?db=hunter2", "redis://u:hun@ter2@h", "redis://u:hun/ter2@h", "redis://u:hun#ter2@h", "redis://h:port",
    "redis://h?x", "unix://hunter2", "unix://run/redis.sock", "unix:///", "redis://h h", "redis://h\n",
)  # fmt: skip


@pytest.mark.parametrize("url", TAKEN)
def test_addresses_without_a_password_are_taken(url: str) -> None:
    from redis import ConnectionPool

    check_redis(url, secret=False)
    ConnectionPool.from_url(url).make_connection()


@pytest.mark.parametrize("url", SECRET)
def test_a_password_is_for_variables(url: str) -> None:
    check_redis(url, secret=True)
    with pytest.raises(ValueError, match=r"may not hold a password.*url_env") as refused:
        check_redis(url, secret=False)
    assert "hun" not in str(refused.value)


@pytest.mark.parametrize("url", WRONG)
def test_what_is_no_address_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match=r"^must be redis://HOST") as refused:
        check_redis(url, secret=True)
    assert "hun" not in str(refused.value)
    assert "ter2" not in str(refused.value)


def test_settings_name_the_key_or_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gateway.yaml"
    model = "models: {m: {engines: [{url: 'http://x'}]}}\n"
    path.write_text(model + "redis: {url: 'redis://:hunter2@h'}\n")
    with pytest.raises(ValueError, match=r"redis\.url may not hold a password") as refused:
        load(path)
    assert "hunter2" not in str(refused.value)
    path.write_text(model + "redis: {url_env: REDIS_OF_TEST}\n")
    monkeypatch.delenv("REDIS_OF_TEST", raising=False)
    with pytest.raises(ValueError, match=r"redis\.url_env: the variable REDIS_OF_TEST is not set"):
        load(path)
    monkeypatch.setenv("REDIS_OF_TEST", "redis://:hunter2@h/first")
    with pytest.raises(ValueError, match=r"redis\.url_env: what the variable REDIS_OF_TEST holds must be") as refused:
        load(path)
    assert "hunter2" not in str(refused.value)
    monkeypatch.setenv("REDIS_OF_TEST", "redis://:hunter2@h/1")
    assert load(path).redis.resolve() == "redis://:hunter2@h/1"


def test_a_password_that_redis_refuses_is_told_as_such(short_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = Server(short_path)

    async def run() -> None:
        limits = Limits(Settings.from_engines(["demo=http://127.0.0.1:1"], redis={"url": server.url}), Metrics())
        await limits.start()
        assert await eventually(lambda: bool(caplog.messages))
        await limits.stop()

    try:
        server.client.config_set("requirepass", "hunter2")
        asyncio.run(run())
    finally:
        server.kill()
    assert caplog.messages[0].startswith("Redis is away (it refuses the user or the password): ")
