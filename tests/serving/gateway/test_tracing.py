import asyncio
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from hypothesis import assume, given
from hypothesis import strategies as st

from serving.gateway.operations import Tracing
from serving.gateway.request_head import read_head
from serving.gateway.tracing import Trace, Tracer, queue_id, upstream_id
from tests.serving.gateway.doubles import CHAT, Engine, answers, gateway_for

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
GIVEN = f"00-{TRACE}-{PARENT}-01"
NOT_SAMPLED = f"00-{TRACE}-{PARENT}-00"

BAD = [
    "x", GIVEN[:-1], GIVEN + "-extra", GIVEN + "0", GIVEN.upper(), f"ff-{TRACE}-{PARENT}-01", f"0-{TRACE}-{PARENT}-01",
    f"00-{'0' * 32}-{PARENT}-01", f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE[:-1]}-{PARENT}-01", f" {GIVEN}",
    f"00-{TRACE[:-1]}g-{PARENT}-01", f"00_{TRACE}_{PARENT}_01", f"{GIVEN},{GIVEN}", f"00-{TRACE}-{PARENT}-01-",
    f"01-{TRACE}-{PARENT}-01x", f"00-{TRACE}-{PARENT}-0g", f"00-{TRACE}--{PARENT}-01",
]  # fmt: skip


def tracer(**settings: Any) -> Tracer:
    return Tracer(Tracing(**({"endpoint": "http://127.0.0.1:4318"} | settings)))


def begin(tracer: Tracer, traceparent: str = "") -> Trace:
    trace = tracer.begin(traceparent.encode())
    assert trace is not None
    return trace


def test_a_clients_trace_goes_on_to_the_engine() -> None:
    trace = begin(tracer(sample=0), GIVEN)
    assert (trace.trace_id, trace.parent_id) == (TRACE, PARENT)
    assert trace.headers == {"traceparent": f"00-{TRACE}-{upstream_id(trace.span_id)}-01"}
    ids = {PARENT, trace.span_id, upstream_id(trace.span_id), queue_id(trace.span_id)}
    assert len(ids) == 4
    assert all(len(span) == 16 and int(span, 16) for span in ids)


def test_what_the_client_has_not_sampled_is_not_traced_here_or_there() -> None:
    trace = begin(tracer(), NOT_SAMPLED)
    assert trace == Trace("", "", "", {"traceparent": NOT_SAMPLED})


@pytest.mark.parametrize("flags", ["02", "fe", "00"])
def test_only_the_flag_of_sampling_counts(flags: str) -> None:
    assert begin(tracer(), GIVEN[:-2] + flags).trace_id == ""
    assert begin(tracer(), GIVEN[:-2] + f"{int(flags, 16) | 1:02x}").trace_id == TRACE


@pytest.mark.parametrize("version", ["01", "cc", "fe"])
def test_later_versions_are_read_as_far_as_they_are_known(version: str) -> None:
    for end in ("", "-", "-what-the-future-brings"):
        trace = begin(tracer(), f"{version}{GIVEN[2:]}{end}")
        assert trace.trace_id == TRACE
        assert trace.headers["traceparent"].startswith("00-")
        assert "future" not in trace.headers["traceparent"]


@pytest.mark.parametrize("traceparent", ["", *BAD])
def test_a_bad_header_is_none(traceparent: str) -> None:
    trace = begin(tracer(), traceparent)
    assert trace.trace_id not in ("", TRACE)
    assert trace.parent_id == ""
    assert tracer(endpoint=None).begin(traceparent.encode()) is None


@given(
    st.lists(st.tuples(st.integers(0, 60), st.sampled_from([*"0123456789abcdefgAF-, ", "", "ff", "-x"])), max_size=4),
    st.sampled_from([GIVEN, NOT_SAMPLED, f"cc-{TRACE}-{PARENT}-01-x", f"00-{'0' * 32}-{PARENT}-01"]),
)
def test_headers_are_read_as_opentelemetry_reads_them(changes: list[tuple[int, str]], header: str) -> None:
    propagation = pytest.importorskip("opentelemetry.trace.propagation.tracecontext")
    spans = pytest.importorskip("opentelemetry.trace")
    for at, what in changes:
        header = header[:at] + what + header[at + 1 :]
    assume(header == header.strip())
    context = propagation.TraceContextTextMapPropagator().extract({"traceparent": header})
    theirs = spans.get_current_span(context).get_span_context()
    ours = tracer(endpoint=None).begin(header.encode())
    assert (ours is not None) == theirs.is_valid
    if ours is not None:
        _, trace_id, parent_id, flags = ours.headers["traceparent"].split("-")
        assert (int(trace_id, 16), int(parent_id, 16)) == (theirs.trace_id, theirs.span_id)
        assert (flags == "01") == theirs.trace_flags.sampled


def test_without_traces_of_its_own_the_gateway_hands_on_the_clients() -> None:
    for header in (GIVEN, NOT_SAMPLED):
        assert begin(tracer(endpoint=None), header) == Trace("", "", "", {"traceparent": header})


def test_traces_are_sampled_as_opentelemetry_does() -> None:
    sampling = pytest.importorskip("opentelemetry.sdk.trace.sampling")
    theirs = sampling.TraceIdRatioBased(0.3)
    ours = tracer(sample=0.3)
    bits = random.Random(7).getrandbits
    ours._bits = bits
    sampled = 0
    for _ in range(5000):
        trace = begin(ours)
        _, trace_id, span_id, flags = trace.headers["traceparent"].split("-")
        decision = theirs.should_sample(None, int(trace_id, 16), "chat").decision.is_sampled()
        assert (flags == "01") == bool(trace.trace_id) == decision
        assert int(span_id, 16)
        sampled += decision
    assert 1300 < sampled < 1700


def test_all_or_none_are_sampled_at_the_ends() -> None:
    assert all(begin(tracer(sample=1)).trace_id for _ in range(100))
    unsampled = [begin(tracer(sample=0)) for _ in range(100)]
    assert not any(trace.trace_id for trace in unsampled)
    # Engines that trace by themselves would begin a trace otherwise.
    assert all(trace.headers["traceparent"].endswith("-00") for trace in unsampled)


def test_ids_do_not_repeat() -> None:
    traces = [begin(tracer()) for _ in range(200)]
    assert len({trace.trace_id for trace in traces}) == 200
    assert len({trace.span_id for trace in traces}) == 200


def test_a_header_that_comes_twice_is_none() -> None:
    once = (b"traceparent", GIVEN.encode())
    media_type = (b"content-type", b"application/json")
    assert read_head([media_type, once]).traceparent == GIVEN.encode()
    assert read_head([once, media_type, once]).traceparent == b""
    assert read_head([once, once, once]).traceparent == b""


@pytest.mark.parametrize("endpoint", [None, "http://127.0.0.1:9"])
def test_engines_get_the_trace_and_nothing_else_of_it(endpoint: str | None) -> None:
    heads: list[dict[str, str]] = []

    async def looking(engine: Engine, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        heads.append(dict(request.headers))
        return await answers(engine, request, body)

    async def run() -> None:
        others = {"tracestate": "vendor=the-canary", "baggage": "name=the-canary", "b3": f"{TRACE}-{PARENT}-1"}
        async with Engine(looking).running() as engine, gateway_for(engine, tracing={"endpoint": endpoint}) as client:
            for stream in (False, True):
                async with client.post(stream, headers={"traceparent": GIVEN, **others}) as response:
                    assert response.status == 200
                    assert "traceparent" not in response.headers
                    await response.read()

    asyncio.run(run())
    assert len(heads) == 2
    for head in heads:
        assert "the-canary" not in str(head)
        assert not {"tracestate", "baggage", "b3"} & {name.lower() for name in head}
        sent = head["traceparent"]
        assert sent.startswith(f"00-{TRACE}-")
        assert (sent == GIVEN) == (endpoint is None)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_gateway_tells_of_each_request_once(tmp_path: Path, workers: int) -> None:
    """Spans, lines of the log and exemplars of a real gateway, to its end."""
    pytest.importorskip("opentelemetry.proto", reason="needs medassist[tracing]")
    from tests.serving.tenants.collector import running_collector

    traces = [os.urandom(16).hex() for _ in range(20)]

    async def run(endpoint: str) -> tuple[str, str, str]:
        async with Engine().running() as engine:
            config = tmp_path / "gateway.yaml"
            content = {
                "models": {"m": {"engines": [{"url": engine.url}]}},
                "workers": workers,
                "home": str(tmp_path / "home"),
                "probes": {"canary_interval": 0},
                "tracing": {"endpoint": endpoint},
                "log": {"requests": True},
            }
            config.write_text(json.dumps(content))
            command = [sys.executable, "-m", "clients.cli", "gateway", "--config", str(config), "--port", "0"]
            process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            assert process.stdout is not None
            assert process.stderr is not None
            said = ""
            try:
                while "ready: " not in said:
                    line = await asyncio.wait_for(process.stderr.readline(), 60)
                    assert line, said
                    said += line.decode()
                root = said.partition("ready: ")[2].partition("/v1 ")[0]
                for trace_id in traces:
                    headers = {"traceparent": f"00-{trace_id}-{PARENT}-01", "X-Request-Id": f"id-{trace_id}"}
                    body = {"model": "m", "messages": [{"role": "user", "content": "the-canary"}]}
                    # A connection each: with several workers, now the one answers and now the other.
                    async with (
                        aiohttp.ClientSession() as session,
                        session.post(root + CHAT, json=body, headers=headers) as response,
                    ):
                        assert response.status == 200
                accept = {"Accept": "application/openmetrics-text"}
                async with (
                    aiohttp.ClientSession() as session,
                    session.get(root + "/metrics", headers=accept) as response,
                ):
                    metrics = await response.text()
                process.terminate()
                out, errors = await asyncio.wait_for(process.communicate(), 60)
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
            assert process.returncode == 0
            return out.decode(), said + errors.decode(), metrics

    with running_collector() as collector:
        out, errors, metrics = asyncio.run(run(collector.url))
        spans = collector.spans
    lines = [json.loads(line) for line in out.splitlines()]
    assert sorted(line["trace_id"] for line in lines) == sorted(traces), errors
    assert all(line["request_id"] == f"id-{line['trace_id']}" for line in lines)
    ours = [span for span in spans if span.parent_id == PARENT]
    assert sorted(span.trace_id for span in ours) == sorted(traces)
    assert {span.span_id for span in ours} == {line["span_id"] for line in lines}
    assert set(re.findall(r'trace_id="(\w+)"', metrics)) <= set(traces)
    assert 'trace_id="' in metrics
    for text in (out, errors, metrics, str(spans)):
        assert "the-canary" not in text
