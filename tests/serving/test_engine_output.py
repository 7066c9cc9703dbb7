"""An engine's process: what it gets of the environment, and that it never waits for a reader of what it writes."""

import asyncio
import sys
from pathlib import Path

import pytest
import yaml

from serving.engine import Engine
from serving.engine_environment import inherited
from serving.engine_log import LONGEST
from serving.plan import Options, make

DEMO = Path(__file__).parents[2] / "training/checkpoints/medassist-demo"

# More than a pipe holds, with lines that are longer than may be read, no text, and names of files that cannot be.
WRITES = """
import sys
out = sys.stdout.buffer
out.write(b"# CPU blocks\\n" + b"x" * (3 << 20) + b"\\n\\xff\\xfe\\x00\\n")
for name in (b"y" * 299, b"/forbidden/" + b"z" * 280, b"\\0"):
    out.write(b'  File "' + name + b'.py", line 3, in x\\n')
out.write(b"KeyError: patient\\n" + b"x" * (1 << 20))
"""


def engine(folder: Path, logs: Path | None = None, **content: object) -> Engine:
    config = folder / "gateway.yaml"
    config.write_text(yaml.safe_dump({"models": {"demo": {"checkpoint": str(DEMO)}}, **content}))
    launch = make([], Options(config=config)).launches[0]
    return Engine(launch.model, launch.checkpoint, launch.options, folder, log_dir=logs)


@pytest.mark.parametrize("sealed", [False, True])
@pytest.mark.parametrize("writable", [False, True])
def test_whatever_an_engine_writes_is_read_to_its_end(
    short_path: Path, sealed: bool, writable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = short_path / "logs"
    if writable:
        logs.mkdir()
    found = engine(short_path, logs)
    monkeypatch.setattr(found, "command", lambda: [sys.executable, "-c", WRITES])

    async def run() -> None:
        await found._spawn()
        found._log.sealed = sealed
        assert found._process is not None
        assert found._reader is not None
        assert await asyncio.wait_for(found._process.wait(), 60) == 0
        await asyncio.wait_for(found._reader, 60)
        await found._kill()

    asyncio.run(run())
    kept = "KeyError" if sealed else "KeyError: patient"
    assert kept in found._log_end
    assert max(map(len, found._log_end)) <= LONGEST
    if writable:
        (log,) = logs.iterdir()
        assert kept in log.read_text().splitlines()
        assert ("patient" in log.read_text()) is not sealed


def test_a_fault_in_reading_a_line_is_no_end(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine(short_path)
    monkeypatch.setattr(found, "command", lambda: [sys.executable, "-c", "print('bad'); print('good')"])
    monkeypatch.setattr(found, "_note_cache", lambda line: 1 / (line != "bad"))

    async def run() -> None:
        await found._spawn()
        assert found._reader is not None
        await asyncio.wait_for(found._reader, 60)
        await found._kill()

    asyncio.run(run())
    assert list(found._log_end) == ["(not shown)", "good"]


def test_engines_do_not_inherit_the_secrets_of_others(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = ("STORE", "SHARED", "COLLECTOR", "ENGINE")
    usual = ("PGPASSWORD", "MEDASSIST_STORE_URL", "MEDASSIST_API_KEY", "OTEL_EXPORTER_OTLP_HEADERS", "VLLM_API_KEY",
             "OTEL_EXPORTER_OTLP_TRACES_HEADERS")  # fmt: skip
    for name in (*named, *usual, "VLLM_DEBUG_DUMP_PATH", "HARMLESS"):
        monkeypatch.setenv(name, "s3cret=s3cret")
    monkeypatch.setenv("STORE", f"sqlite:///{short_path}/s3cret.db")
    monkeypatch.setenv("SHARED", "redis://:s3cret@127.0.0.1:6379")
    models = {
        "demo": {"checkpoint": str(DEMO)},
        "other": {"engines": [{"url": "http://127.0.0.1:9", "api_key_env": "ENGINE"}]},
    }
    secrets = {"store": {"url_env": "STORE"}, "redis": {"url_env": "SHARED"}, "tracing": {"headers_env": "COLLECTOR"}}
    found = engine(short_path, models=models, **secrets)
    environment = found.environment()
    assert {name for name, value in environment.items() if "s3cret" in value} == {"HARMLESS"}
    assert "PATH" in environment

    traced = engine(short_path, models=models, **secrets | {"tracing": {
        "headers_env": "COLLECTOR", "endpoint": "http://127.0.0.1:9"}})  # fmt: skip
    told = {name for name, value in traced.environment().items() if "s3cret" in value}
    assert told == {"HARMLESS", "OTEL_EXPORTER_OTLP_TRACES_HEADERS"}
    assert "HARMLESS" not in inherited(frozenset(("HARMLESS",)))


def test_a_variable_more_is_no_reason_to_start_an_engine_anew(
    short_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = short_path / "gateway.yaml"

    def launch(**content: object) -> object:
        config.write_text(yaml.safe_dump({"models": {"demo": {"checkpoint": str(DEMO)}}, **content}))
        return make([], Options(config=config)).launches[0]

    monkeypatch.setenv("SHARED", "redis://127.0.0.1:6379")
    assert launch() == launch(redis={"url_env": "SHARED"})
