"""What is read of an engine's answers."""

import asyncio
import os
from pathlib import Path

import aiohttp
import orjson
import pytest
import yarl

from serving.gateway import probes
from serving.gateway.probes import Found, Load, Status, StatusFile, choose_model, parse_load
from tests.serving.gateway.faulty_engine import FaultyEngine, running

# Shortened from what vLLM 0.32 answers with two data-parallel ranks; the names that only begin alike are its own, too.
PAGE = b"""\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 3.0
vllm:num_requests_running{engine="1",model_name="de}mo 7"} 4.0
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="demo"} 0.0
vllm:num_requests_waiting{engine="1",model_name="demo"} 1.2e+01
vllm:num_requests_waiting_by_reason{engine="0",model_name="demo",reason="capacity"} 90.0
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="demo"} 8.5e-01
vllm:num_preemptions_total{engine="0",model_name="demo"} 55.0
"""


def test_requests_add_up_over_ranks_and_the_fullest_cache_counts() -> None:
    assert parse_load(PAGE) == Load(running=7, waiting=12, cache_usage=0.85)


def test_older_name_of_the_cache_and_series_without_labels() -> None:
    assert parse_load(b"vllm:num_requests_running 2.0\nvllm:gpu_cache_usage_perc 0.5") == Load(2, 0, 0.5)


@pytest.mark.parametrize("page", [b"", b"python_info 1.0\n", b"vllm:num_requests_running 1e999\n", b"\xff\x00" * 99])
def test_other_pages_tell_no_load(page: bytes) -> None:
    assert parse_load(page) is None


def models(*names: str) -> bytes:
    return orjson.dumps({"data": [{"id": name, "max_model_len": 512} for name in names]})


def test_model_is_the_one_of_its_public_name_or_else_the_only_one() -> None:
    assert choose_model(models("other", "demo"), "demo", None, ()) == Found("demo", 512)
    assert choose_model(models("/models/thing"), "demo", None, ()) == Found("/models/thing", 512)
    with_adapter = orjson.dumps({"data": [{"id": "base"}, {"id": "tuned", "parent": "base"}]})
    assert choose_model(with_adapter, "demo", None, ["tuned"]) == Found("base", None)


def test_given_name_is_believed_where_the_list_lacks_it() -> None:
    assert choose_model(models("a", "b"), "demo", "hidden", ()) == Found("hidden", None)


@pytest.mark.parametrize(
    ("page", "adapters", "message"),
    [
        (models("a", "b"), (), "set served_name to one of: 'a', 'b'"),
        (models(*"abcdefghijklm"), (), "'j' and 3 more"),
        (models("demo"), ("tuned",), "no adapter 'tuned'; it has: 'demo'"),
        (b'{"data": 3}', (), "no list of models"),
        (b"<html>", (), "no list of models"),
        (b'{"data": ["demo"]}', (), "no list of models"),
    ],
)
def test_what_is_missing_is_said(page: bytes, adapters: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_model(page, "demo", None, adapters)


def test_status_file_is_read_again_when_it_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "demo.json"
    file = StatusFile(path)

    def write(content: bytes) -> None:
        path.with_suffix(".new").write_bytes(content)
        os.utime(path.with_suffix(".new"), ns=(0, 0))  # as soon after another as the clock cannot tell
        path.with_suffix(".new").replace(path)

    assert file.read() == Status("starting", "not started yet")
    write(b'{"state": "restarting", "reason": "it ended", "ready_at": 12.5, "start_seconds": 18}')
    assert file.read() == Status("restarting", "it ended", 12.5, 18.0)
    write(b'{"state": "ready", "reason": "", "ready_at": null}')
    assert file.read() == Status("ready")
    write(b"[]")
    assert file.read().state == "starting"
    path.unlink()
    assert file.read().state == "starting"


def test_answers_without_end_are_not_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "MAX_ANSWER", 1000)
    engine = FaultyEngine()

    async def ask() -> tuple[int, bytes]:
        async with running(engine), aiohttp.ClientSession() as session:
            return await probes.get(session, yarl.URL(engine.url + "/v1/models"), 5)

    assert asyncio.run(ask())[0] == 200
    engine.models *= 100
    with pytest.raises(aiohttp.ClientPayloadError, match="too large"):
        asyncio.run(ask())
