import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from serving.gateway import exemplars
from serving.gateway.metrics import Metrics, wants_openmetrics
from serving.gateway.shared_metrics import merge_ended
from tests.serving.gateway.doubles import CHAT, Engine, gateway_for

OPENMETRICS = "application/openmetrics-text"
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,application/openmetrics-text;version=0.0.1;"
    "q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)
TRACE = "0af7651916cd43dd8448eb211c80319c"


def exemplars_of(text: str) -> dict[tuple[str, str, str], tuple[str, float]]:
    """By sample, model and upper bound: trace and value."""
    return {
        (sample.name, sample.labels["model"], sample.labels["le"]): (
            sample.exemplar.labels["trace_id"],
            sample.exemplar.value,
        )
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.exemplar
    }


def observe(metrics: Metrics, trace_id: str, duration: float, first_token: float, model: str = "m") -> None:
    of = metrics.of(CHAT, model)
    of.duration.observe(duration)
    if first_token >= 0:
        of.first_token.observe(first_token)
    of.exemplify(trace_id, duration, first_token)


def test_a_bucket_names_the_last_trace_that_fell_into_it() -> None:
    metrics = Metrics()
    observe(metrics, "a" * 32, 0.3, 0.1)
    observe(metrics, "b" * 32, 0.4, -1)
    observe(metrics, "c" * 32, 500.0, 0.11)
    observe(metrics, "d" * 32, 0.005, 0.005, "other")
    text, kind = metrics.render(OPENMETRICS)
    assert kind == "application/openmetrics-text; version=1.0.0; charset=utf-8"
    duration, first = "medassist_request_duration_seconds_bucket", "medassist_time_to_first_token_seconds_bucket"
    assert exemplars_of(text.decode()) == {
        (duration, "m", "0.5"): ("b" * 32, 0.4),
        (duration, "m", "+Inf"): ("c" * 32, 500.0),
        (first, "m", "0.1"): ("a" * 32, 0.1),
        (first, "m", "0.25"): ("c" * 32, 0.11),
        (duration, "other", "0.005"): ("d" * 32, 0.005),
        (first, "other", "0.005"): ("d" * 32, 0.005),
    }
    plain, kind = metrics.render()
    assert kind.startswith("text/plain")
    assert b"trace_id" not in plain


@pytest.mark.parametrize(
    ("accept", "wanted"),
    [
        ("", False), ("*/*", False), ("text/plain", False), ("text/html, */*", False), (PROMETHEUS, True),
        (OPENMETRICS, True), (f"{OPENMETRICS};q=0, text/plain", False),
        (f"text/plain;version=0.0.4, {OPENMETRICS}", False), (f"text/html,{OPENMETRICS.upper()};version=1.0.0", True),
        (f"{OPENMETRICS};version=a;b", True), (";,,=", False),
    ],
)  # fmt: skip
def test_openmetrics_is_for_those_who_ask_for_it(accept: str, wanted: bool) -> None:
    assert wants_openmetrics(accept) is wanted


def test_more_buckets_than_there_is_room_for_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exemplars, "SLOTS", 3)
    metrics = Metrics()
    for number in range(5):
        observe(metrics, TRACE, 0.3, -1, f"m{number}")
    observe(metrics, TRACE, 0.3, -1, "m" * 600)
    found = exemplars_of(metrics.render(OPENMETRICS)[0].decode())
    assert sorted(model for _, model, _ in found) == ["m0", "m1", "m2"]


WORKER = """
import sys
from serving.gateway.metrics import Metrics
metrics = Metrics()
of = metrics.of("/v1/chat/completions", "m")
for pair in sys.argv[1:]:
    trace_id, _, seconds = pair.partition("=")
    of.duration.observe(float(seconds))
    of.exemplify(trace_id, float(seconds), -1)
print("there", flush=True)
if sys.stdin.readline():
    sys.stdout.buffer.write(metrics.render("application/openmetrics-text")[0])
"""


def worker(folder: Path, *observations: str) -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", WORKER, *observations],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"there\n"
    return process


def test_any_worker_tells_the_exemplars_of_all(tmp_path: Path) -> None:
    first = worker(tmp_path, f"{'a' * 32}=0.3", f"{'b' * 32}=2.0")
    second = worker(tmp_path, f"{'c' * 32}=0.4")
    third = worker(tmp_path)
    bucket = "medassist_request_duration_seconds_bucket"
    try:
        # A slot that is half written is as if it were empty.
        file = tmp_path / f"exemplars_{first.pid}.map"
        slots = bytearray(file.read_bytes())
        assert slots[512 + 8] != 0xFF
        with file.open("r+b") as f:
            f.seek(512 + 8)
            f.write(b"\xff")
        assert exemplars_of(third.communicate(b"render\n", 20)[0].decode()) == {(bucket, "m", "0.5"): ("c" * 32, 0.4)}
        assert third.returncode == 0
        with file.open("r+b") as f:
            f.write(slots)
        text = second.communicate(b"render\n", 20)[0].decode()
        assert exemplars_of(text) == {(bucket, "m", "0.5"): ("c" * 32, 0.4), (bucket, "m", "2.5"): ("b" * 32, 2.0)}
        assert 'medassist_request_duration_seconds_count{model="m",route="/v1/chat/completions"} 3.0' in text
    finally:
        for process in (first, second, third):
            process.kill()
            process.wait()
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
            process.stdout.close()
    merge_ended(tmp_path)
    assert not list(tmp_path.glob("exemplars_*"))


def test_no_room_on_the_disk_is_no_reason_not_to_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    mine = exemplars.Exemplars(tmp_path)
    mine.series("x", CHAT, "m", (1.0,)).note(0.5, TRACE)
    assert [exemplar.labels["trace_id"] for exemplar in mine.read().values()] == [TRACE]


def test_a_scraper_gets_the_traces_of_requests() -> None:
    async def run() -> None:
        tracing = {"endpoint": "http://127.0.0.1:9", "sample": 0}
        async with Engine().running() as engine, gateway_for(engine, tracing=tracing) as client:
            async with client.post() as response:
                await response.read()
            async with client.post(headers={"traceparent": f"00-{TRACE}-b7ad6b7169203331-01"}) as response:
                await response.read()
            async with client.session.get(client.root + "/metrics", headers={"Accept": PROMETHEUS}) as response:
                assert response.headers["Content-Type"].startswith(OPENMETRICS)
                found = exemplars_of(await response.text())
            async with client.session.get(client.root + "/metrics") as response:
                assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
                assert TRACE not in await response.text()
        assert {trace for trace, _ in found.values()} == {TRACE}
        assert {name for name, _, _ in found} == {
            "medassist_request_duration_seconds_bucket", "medassist_time_to_first_token_seconds_bucket",
        }  # fmt: skip

    asyncio.run(run())
