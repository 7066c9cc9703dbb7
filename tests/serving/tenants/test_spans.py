import importlib
import pkgutil
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.proto", reason="needs medassist[tracing]")

from loadtest.gateway.processes import free_port
from serving.gateway.parameters import ROUTES
from serving.gateway.settings import load
from serving.tenants import spans
from serving.tenants.collector import read_headers, traces_url
from serving.tenants.record import Record
from serving.tenants.spans import SpanExporter, describe
from tests.serving.tenants.collector import Collector, running_collector
from tests.waiting import until

SERVER, CLIENT, INTERNAL, ERROR = 2, 3, 1, 2
TRACE, SPAN, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203334", "00f067aa0ba902b7"
KEY = "key_0123456789abcdef"


def record(**changes: object) -> Record:
    content = {
        "time": 1_800_000_000.5, "request_id": "req-1", "key": KEY, "tenant": "clinic", "route": "/v1/chat/completions",
        "model": "demo", "status": 200, "code": "", "phase": "ending", "stream": True, "prompt_tokens": 7,
        "completion_tokens": 5, "estimated": False, "seconds": 1.0, "queued": 0.25, "upstream": 0.5, "first_token": 0.4,
        "replica": "0", "attempts": 1, "trace_id": TRACE, "span_id": SPAN, "parent_id": PARENT,
    }  # fmt: skip
    return Record(**(content | changes))  # type: ignore[arg-type]


@pytest.fixture
def collector() -> Iterator[Collector]:
    with running_collector() as collector:
        yield collector


@pytest.fixture(autouse=True)
def _quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "INTERVAL", 0.02)
    monkeypatch.setattr(spans, "FIRST_BACKOFF", 0.02)


def test_the_spans_of_a_request_hang_below_the_clients(collector: Collector) -> None:
    exporter = SpanExporter({"endpoint": collector.url}, lambda text: None)
    exporter.export([record(), record(trace_id="", span_id="", parent_id="")])
    exporter.stop(10)
    server, queue, client = collector.spans
    assert collector.paths == ["/v1/traces"]
    assert collector.headers[0]["Content-Type"] == "application/x-protobuf"
    assert {span.trace_id for span in collector.spans} == {TRACE}
    assert {span.service for span in collector.spans} == {"medassist"}
    assert (server.name, server.kind, server.span_id, server.parent_id) == ("chat demo", SERVER, SPAN, PARENT)
    assert (queue.name, queue.kind, queue.parent_id) == ("queue", INTERNAL, SPAN)
    assert (client.name, client.kind, client.parent_id) == ("chat demo", CLIENT, SPAN)
    assert len({server.span_id, queue.span_id, client.span_id}) == 3
    assert server.end - server.start == 1_000_000_000
    assert server.start <= queue.start < queue.end == client.start < client.end == server.end
    assert client.end - client.start == 500_000_000
    assert server.attributes == {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "vllm", "gen_ai.request.model": "demo",
        "gen_ai.request.stream": True, "gen_ai.response.model": "demo", "gen_ai.response.time_to_first_chunk": 0.4,
        "gen_ai.usage.input_tokens": 7, "gen_ai.usage.output_tokens": 5, "http.request.method": "POST",
        "http.route": "/v1/chat/completions", "http.response.status_code": 200, "medassist.request.id": "req-1",
        "medassist.key.hash": server.attributes["medassist.key.hash"], "medassist.tenant": "clinic",
        "medassist.phase": "ending", "medassist.attempts": 1, "medassist.usage.estimated": False,
    }  # fmt: skip
    assert client.attributes["medassist.replica"] == "0"
    assert KEY.encode() not in collector.bodies[0]


@pytest.mark.parametrize(
    ("changes", "names", "error", "status"),
    [
        ({"status": 401, "code": "invalid_api_key", "model": "", "attempts": 0, "queued": 0.0, "upstream": 0.0},
         ["chat"], "invalid_api_key", 0),
        ({"status": 429, "code": "rate_limit_exceeded", "attempts": 0, "queued": 0.0}, ["chat demo"],
         "rate_limit_exceeded", 0),
        ({"status": 499, "code": "", "queued": -1.0}, ["chat demo", "chat demo"], "499", 0),
        ({"status": 502, "code": "engine_unavailable"}, ["chat demo", "queue", "chat demo"], "engine_unavailable",
         ERROR),
    ],
)  # fmt: skip
def test_only_faults_of_the_server_are_errors(
    collector: Collector, changes: dict, names: list[str], error: str, status: int
) -> None:
    exporter = SpanExporter({"endpoint": collector.url}, lambda text: None)
    exporter.export([record(**changes)])
    exporter.stop(10)
    assert [span.name for span in collector.spans] == names
    assert collector.spans[0].attributes["error.type"] == error
    assert collector.spans[0].status == status
    assert "gen_ai.response.model" not in collector.spans[0].attributes


def test_times_stay_in_order_whatever_the_durations() -> None:
    for seconds, queued, upstream in ((0.0, 0.5, 0.5), (1.0, 0.0, 2.0), (0.001, -1.0, -1.0)):
        found = list(describe(record(seconds=seconds, queued=queued, upstream=upstream)))
        for span in found:
            assert found[0]["start"] <= span["start"] <= span["end"] <= found[0]["end"]


def test_the_names_are_those_of_the_conventions() -> None:
    package = pytest.importorskip("opentelemetry.semconv._incubating.attributes")
    known = set()
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        if module.name.endswith(("gen_ai_attributes", "http_attributes", "error_attributes")):
            names = vars(importlib.import_module(module.name)).values()
            known |= {name for name in names if isinstance(name, str)}
    from opentelemetry.semconv._incubating.attributes.gen_ai_attributes import GenAiOperationNameValues

    for route in ROUTES:
        for span in describe(record(route=route, status=500)):
            for name in span["attributes"]:
                assert name in known or name.startswith("medassist."), name
            operation = span["attributes"].get("gen_ai.operation.name", "tokenize")
            assert operation == "tokenize" or operation in {value.value for value in GenAiOperationNameValues}


def test_headers_come_from_the_environment_and_are_never_told(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACES", "Authorization=Bearer%20s3cret, x-scope=a b")
    told: list[str] = []
    collector.statuses = [401]
    exporter = SpanExporter({"endpoint": f"{collector.url}/otlp/", "headers_env": "TRACES"}, told.append)
    exporter.export([record()])
    exporter.stop(10)
    assert collector.paths == ["/otlp/v1/traces"]
    assert collector.headers[0]["Authorization"] == "Bearer s3cret"
    assert collector.headers[0]["x-scope"] == "a b"
    assert exporter.dropped == 1
    assert len(collector.bodies) == 1, "what is refused is not sent again"
    assert any("HTTP 401" in line for line in told)
    assert "s3cret" not in "".join(told)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_collector_is_asked_again(collector: Collector, status: int) -> None:
    told: list[str] = []
    collector.statuses, collector.extra = [status, status], {"Retry-After": "0"}
    exporter = SpanExporter({"endpoint": collector.url}, told.append)
    exporter.export([record()])
    assert until(lambda: len(collector.bodies) == 3)
    assert until(lambda: len(told) == 2)
    exporter.stop(10)
    assert collector.bodies[0] == collector.bodies[1] == collector.bodies[2]
    assert exporter.dropped == 0
    assert f"HTTP {status}" in told[0]
    assert "takes spans again" in told[1]


def test_what_a_collector_rejects_of_a_batch_is_counted(collector: Collector) -> None:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    answer = ExportTraceServiceResponse()
    answer.partial_success.rejected_spans = 2
    collector.answer = answer.SerializeToString()
    exporter = SpanExporter({"endpoint": collector.url}, lambda text: None)
    exporter.export([record(), record(), record()])
    exporter.stop(10)
    assert exporter.dropped == 2


def test_a_collector_that_is_away_costs_a_bounded_number_of_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "CAPACITY", 50)
    monkeypatch.setattr(spans, "BATCH", 10)
    port, told = free_port(), []
    exporter = SpanExporter({"endpoint": f"http://127.0.0.1:{port}"}, told.append)
    slowest = 0.0
    for _ in range(200):
        began = time.monotonic()
        exporter.export([record()])
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 5
    assert until(lambda: told)
    assert exporter.dropped >= 200 - 50 - 10
    with running_collector(port) as collector:
        assert until(lambda: len(told) == 2)
        exporter.export([record(request_id="req-later")])
        exporter.stop(10)
        ids = [span.attributes["medassist.request.id"] for span in collector.spans if span.kind == SERVER]
    assert len(ids) == 201 - exporter.dropped
    assert ids[-1] == "req-later"
    assert "does not take spans (Connection refused)" in told[0]
    assert str(exporter.dropped) in told[1]
    assert len(told) == 2, "told once, not for every batch"


def test_a_collector_that_never_answers_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spans, "TIMEOUT", 600.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        exporter = SpanExporter({"endpoint": f"http://127.0.0.1:{silent.getsockname()[1]}"}, lambda text: None)
        exporter.export([record()])
        began = time.monotonic()
        exporter.stop(0.2)
        assert time.monotonic() - began < 60


def test_an_end_without_a_collector_tells_what_was_lost() -> None:
    told: list[str] = []
    exporter = SpanExporter({"endpoint": f"http://127.0.0.1:{free_port()}"}, told.append)
    exporter.export([record() for _ in range(3)])
    exporter.stop(0.5)
    assert exporter.dropped == 3
    assert "3 requests" in told[-1]


def test_a_record_that_cannot_be_told_ends_nothing(collector: Collector) -> None:
    told: list[str] = []
    exporter = SpanExporter({"endpoint": collector.url}, told.append)
    exporter.export([record(trace_id="no-hexadecimal")])
    assert until(lambda: exporter.dropped == 1)
    exporter.export([record()])
    exporter.stop(10)
    assert len(collector.spans) == 3
    assert "ValueError" in told[0]
    assert "no-hexadecimal" not in "".join(told)


def test_large_numbers_go_in_batches(collector: Collector) -> None:
    exporter = SpanExporter({"endpoint": collector.url}, lambda text: None)
    exporter.export([record(attempts=0, queued=0.0) for _ in range(1200)])
    exporter.stop(20)
    assert len(collector.spans) == 1200
    assert len(collector.bodies) >= 3
    assert exporter.dropped == 0


IN_A_SUPERVISOR = """
import sys
sys.modules["ssl"] = None
import json
import serving.gateway.workers, serving.tenants.keeper
def memory():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before = memory()
from serving.tenants.record import Record
from serving.tenants.spans import SpanExporter
record = Record.unpack(sys.argv[2].encode())
told = []
exporter = SpanExporter({"endpoint": sys.argv[1]}, told.append)
exporter.export([record] * 100)
exporter.stop(20)
loaded = [name for name in ("ssl", "requests", "pydantic", "opentelemetry.sdk") if sys.modules.get(name)]
print(json.dumps({"mib": memory() - before, "dropped": exporter.dropped, "told": told, "loaded": loaded}))
"""


def in_a_supervisor(url: str, **environment: str) -> dict:
    import json
    import os

    command = [sys.executable, "-c", IN_A_SUPERVISOR, url, record().pack().decode()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | environment)
    found: dict = json.loads(done.stdout)
    return found


def test_it_fits_the_supervisors_memory(collector: Collector) -> None:
    found = in_a_supervisor(collector.url)
    assert found["dropped"] == 0
    assert found["loaded"] == []
    assert found["mib"] < 12  # 5 as measured


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command, for a certificate")
def test_tls_is_loaded_only_where_it_is_wanted_and_checks_certificates(tmp_path: Path) -> None:
    certificate = tmp_path / "both.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", certificate, "-out",
         tmp_path / "certificate.pem"], check=True, capture_output=True,
    )  # fmt: skip
    certificate.write_text(certificate.read_text() + (tmp_path / "certificate.pem").read_text())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    with running_collector(tls=context) as collector:
        assert in_a_supervisor(collector.url, SSL_CERT_FILE=str(tmp_path / "certificate.pem"))["dropped"] == 0
        assert len(collector.spans) == 300
        distrusted = in_a_supervisor(collector.url, SSL_CERT_FILE="/dev/null")
        assert distrusted["dropped"] == 100
        assert "CERTIFICATE_VERIFY_FAILED" in distrusted["told"][0]
        assert len(collector.spans) == 300


@pytest.mark.parametrize(
    ("endpoint", "what"),
    [
        ("http://127.0.0.1:4318", "http://127.0.0.1:4318/v1/traces"),
        ("https://c.example.org/", "https://c.example.org/v1/traces"),
        ("http://[::1]:4318/x/v1/traces", "http://[::1]:4318/x/v1/traces"),
    ],
)
def test_where_spans_are_sent(endpoint: str, what: str) -> None:
    assert traces_url(endpoint) == what


@pytest.mark.parametrize(
    ("tracing", "message"),
    [
        ("{endpoint: 'grpc://127.0.0.1:4317'}", "tracing.endpoint must be http://HOST:PORT"),
        ("{endpoint: 'http://'}", "tracing.endpoint must be http://HOST:PORT"),
        ("{endpoint: 'http://a:99999'}", "tracing.endpoint must be http://HOST:PORT"),
        ("{endpoint: 'http://me:s3cret@a:4318'}", "put credentials into headers_env"),
        ("{endpoint: 'http://a:4318/?token=s3cret'}", "put credentials into headers_env"),
        ("{endpoint: 'http://a:4318', headers_env: NOT_SET}", "tracing: the variable NOT_SET is not set"),
        ("{endpoint: 'http://a:4318', headers_env: WRONG}", "tracing: the variable WRONG must hold name=value"),
    ],
)
def test_wrong_settings_are_refused_without_their_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracing: str, message: str
) -> None:
    monkeypatch.setenv("WRONG", "Bearer s3cret")
    file = tmp_path / "gateway.yaml"
    file.write_text(f"models: {{m: {{engines: [{{url: 'http://127.0.0.1:1'}}]}}}}\ntracing: {tracing}\n")
    with pytest.raises(ValueError, match="tracing") as caught:
        load(file)
    assert message in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("text", ["a", "=b", "a b=c", "a=b\r\nc: d", "a=%0d%0ac: d", "a=b,,"])
def test_headers_that_could_split_a_request_are_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADERS", text)
    with pytest.raises(ValueError, match="HEADERS must hold name=value"):
        read_headers("HEADERS")
