"""A trace from the client's header through the gateway into the engine, with not a word of the conversation in it."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("opentelemetry.proto", reason="needs medassist[tracing]")

from tests.e2e.server import CHECKPOINT, Server
from tests.serving.tenants.collector import Collector, Span, running_collector
from tests.waiting import until

pytestmark = pytest.mark.engine
CHAT = "/v1/chat/completions"
CANARY = "tachyphylaxis of the marmoset"
SECRET = "s3cret-of-the-collector"
SERVER, CLIENT = 2, 3


@dataclass
class Traced:
    server: Server
    collector: Collector
    log: Path

    def chat(self, traceparent: str = "", stream: bool = False, request_id: str = "", **changes: object) -> str:
        body = {
            "model": "demo", "messages": [{"role": "user", "content": f"What is {CANARY}?"}], "max_tokens": 8,
            "stream": stream,
        }  # fmt: skip
        headers = {"Content-Type": "application/json", "tracestate": f"vendor={CANARY.replace(' ', '-')}"}
        headers |= {"traceparent": traceparent} if traceparent else {}
        headers |= {"X-Request-Id": request_id} if request_id else {}
        status, text = self.server.request("POST", CHAT, json.dumps(body | changes).encode(), headers)
        assert status in (200, 400), text
        return text

    def of(self, trace_id: str) -> list[Span]:
        return [span for span in self.collector.spans if span.trace_id == trace_id]


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Traced]:
    folder = tmp_path_factory.mktemp("tracing")
    log = folder / "requests.log"
    with running_collector() as collector:
        config = folder / "gateway.yaml"
        config.write_text(
            f"models: {{demo: {{checkpoint: {CHECKPOINT}}}}}\n"
            f"home: {folder / 'home'}\n"
            f"tracing: {{endpoint: '{collector.url}', headers_env: COLLECTOR_HEADERS}}\n"
            f"log: {{requests: true, file: {log}}}\n"
            "probes: {canary_interval: 1}\n"
        )
        environment = {"OTEL_BSP_SCHEDULE_DELAY": "200", "COLLECTOR_HEADERS": f"x-secret={SECRET}"}
        server = Server(None, folder / "server", "--config", str(config), env=environment)
        try:
            yield Traced(server.wait_ready(), collector, log)
        finally:
            server.stop()


def check(spans: list[Span], parent_id: str) -> None:
    """One trace: the client's span, ours, and the engine's below ours."""
    ours = {span.kind: span for span in spans if span.service == "medassist"}
    (engine,) = (span for span in spans if span.service == "medassist-engine")
    server, client = ours[SERVER], ours[CLIENT]
    assert server.parent_id == parent_id
    assert client.parent_id == server.span_id
    assert engine.parent_id == client.span_id
    assert engine.name == "llm_request"
    assert server.name == client.name == "chat demo"
    assert server.attributes["gen_ai.usage.output_tokens"] == engine.attributes["gen_ai.usage.completion_tokens"]
    assert server.attributes["gen_ai.usage.input_tokens"] == engine.attributes["gen_ai.usage.prompt_tokens"]
    slack = 50_000_000  # two clocks of one machine, read at different moments
    assert server.start <= client.start <= engine.start + slack
    assert client.end <= server.end


@pytest.mark.parametrize("stream", [False, True])
def test_a_clients_trace_runs_through_the_gateway_into_the_engine(traced: Traced, stream: bool) -> None:
    trace_id, parent_id = os.urandom(16).hex(), os.urandom(8).hex()
    traced.chat(f"00-{trace_id}-{parent_id}-01", stream)
    assert until(lambda: len(traced.of(trace_id)) >= 3), traced.of(trace_id)
    check(traced.of(trace_id), parent_id)


def test_a_trace_can_begin_at_the_gateway(traced: Traced) -> None:
    traced.chat(request_id="begins-here")
    assert until(lambda: "begins-here" in traced.log.read_text())
    (line,) = (json.loads(line) for line in traced.log.read_text().splitlines() if "begins-here" in line)
    assert until(lambda: len(traced.of(line["trace_id"])) >= 3)
    check(traced.of(line["trace_id"]), "")


def test_nothing_else_is_traced(traced: Traced) -> None:
    trace_id = os.urandom(16).hex()
    traced.chat(f"00-{trace_id}-{os.urandom(8).hex()}-00", request_id="not-sampled")
    traced.chat(request_id="sampled")
    assert until(lambda: '"sampled"' in traced.log.read_text())
    lines = [json.loads(line) for line in traced.log.read_text().splitlines()]
    (sampled,) = (line["trace_id"] for line in lines if line["request_id"] == "sampled")
    assert until(lambda: len(traced.of(sampled)) >= 3)
    assert traced.of(trace_id) == []
    # Neither the engine's start, nor its comparison with its fingerprint, nor canaries.
    assert {span.trace_id for span in traced.collector.spans} <= {line["trace_id"] for line in lines}


def test_no_word_of_a_conversation_is_in_what_the_collector_gets(traced: Traced) -> None:
    trace_id = os.urandom(16).hex()
    answer = json.loads(traced.chat(f"00-{trace_id}-{os.urandom(8).hex()}-01", max_tokens=24))
    said = answer["choices"][0]["message"]["content"]
    error = traced.chat(f"00-{trace_id}-{os.urandom(8).hex()}-01", temperature=f"{CANARY}")
    assert "error" in json.loads(error)
    assert until(lambda: len(traced.of(trace_id)) >= 4)
    got = b"".join(traced.collector.bodies).lower()
    for word in {*CANARY.split(), *(word for word in re.findall(r"[A-Za-z]{7,}", said))} - {"of", "the"}:
        assert word.lower().encode() not in got, word
    assert CANARY.split()[0] not in traced.log.read_text()
    assert SECRET.encode() not in got
    assert {head.get("x-secret") or head.get("X-Secret") for head in traced.collector.headers} == {SECRET}
    assert SECRET not in traced.server.log
