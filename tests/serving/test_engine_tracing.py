"""How engines are told where their spans go."""

from pathlib import Path

import pytest
import yaml

from serving.engine import Engine
from serving.features import RESERVED
from serving.plan import Options, make

DEMO = Path(__file__).parents[2] / "training/checkpoints/medassist-demo"


def engine(folder: Path, **content: object) -> Engine:
    config = folder / "gateway.yaml"
    config.write_text(yaml.safe_dump({"models": {"demo": {"checkpoint": str(DEMO)}}, **content}))
    (launch,) = make([], Options(config=config)).launches
    return Engine(launch.model, launch.checkpoint, launch.options, folder)


def test_engines_send_their_spans_where_the_gateway_does(short_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opentelemetry.proto", reason="needs medassist[tracing]")
    monkeypatch.setenv("COLLECTOR", "authorization=Bearer%20s3cret")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_on")
    found = engine(short_path, tracing={"endpoint": "http://c.example.org:4318", "headers_env": "COLLECTOR"})
    command, environment = found.command(), found.environment()
    at = command.index("--otlp-traces-endpoint")
    assert command[at + 1] == "http://c.example.org:4318/v1/traces"
    assert "s3cret" not in " ".join(command), "every user of the machine can read arguments"
    assert environment["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"] == "http/protobuf", "vLLM's default is gRPC"
    assert environment["OTEL_EXPORTER_OTLP_TRACES_HEADERS"] == "authorization=Bearer%20s3cret"
    assert environment["OTEL_TRACES_SAMPLER"] == "parentbased_always_off", "the gateway decides"
    # An operator's own would have engines trace what the gateway does not, or in detail.
    assert {"--otlp-traces-endpoint", "--collect-detailed-traces"} <= set(RESERVED)


def test_engines_do_not_trace_by_themselves(short_path: Path) -> None:
    found = engine(short_path)
    assert "--otlp-traces-endpoint" not in found.command()
    assert "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL" not in found.environment()
