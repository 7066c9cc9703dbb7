"""Spans of requests, sent to an OpenTelemetry collector as OTLP over HTTP.

Names and attributes are those of OpenTelemetry's semantic conventions for HTTP and generative AI where they have some,
and ``medassist.*`` where not. There is no content in them: they are made of records, which hold none.

The SDK is not used: it would take more memory than the process that runs this. OpenTelemetry's own protocol messages
and the standard library's HTTP client do what is needed.
"""

import http.client
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from serving.gateway.tracing import queue_id, upstream_id
from serving.tenants.collector import read_headers, traces_url
from serving.tenants.record import Record
from serving.tenants.request_log import hash_id

CAPACITY = 4096  # requests whose spans wait to be sent
BATCH = 128  # requests; what is made to encode one batch is several times its size
INTERVAL = 1.0  # seconds that they are gathered
TIMEOUT = 10.0  # seconds for the collector to answer
FIRST_BACKOFF, LONGEST_BACKOFF, LONGEST_RETRY = 0.5, 15.0, 60.0
TELLING = 60.0  # seconds between two reports that the collector is too slow

_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/embeddings": "embeddings",
    "/v1/messages": "chat",
    "/v1/responses": "chat",
}
_RETRYABLE = (429, 502, 503, 504)  # by OTLP's specification
_SAMPLED, _LOCAL_PARENT, _REMOTE_PARENT = 0x001, 0x100, 0x300  # flags of a span
_KINDS = {kind: Span.SpanKind.Value(f"SPAN_KIND_{kind}") for kind in ("SERVER", "INTERNAL", "CLIENT")}
_SECOND = 1_000_000_000
_UNIQUE = frozenset(("medassist.request.id",))  # attributes with a value of their own for each request


class SpanExporter:
    """Sends spans from a thread of its own. A collector that is slow, or away, costs spans and nothing else.

    Attributes:
        dropped: requests whose spans were not sent.
    """

    def __init__(self, config: dict[str, Any], report: Callable[[str], None]) -> None:
        """
        Args:
            config: the settings' section ``tracing``, with an ``endpoint``.
            report: told what a person should know; called from other threads too.

        Raises:
            ValueError: the endpoint or the headers are wrong.
        """
        self._url = urlsplit(traces_url(config["endpoint"]))
        self._headers = {**read_headers(config.get("headers_env")), "Content-Type": "application/x-protobuf"}
        self._report = report
        self._waiting: deque[bytes] = deque()  # packed: a quarter of the memory of records
        self._wake = threading.Event()
        self._stop_at: float | None = None
        self._overflown = self._lost = self._told = 0
        self._failing, self._last_told = False, 0.0
        self._resource = {
            "service.name": os.environ.get("OTEL_SERVICE_NAME") or "medassist",
            "service.version": version("medassist"),
            "service.instance.id": str(uuid4()),
        }
        self._context = _tls_context() if self._url.scheme == "https" else None
        self._thread = threading.Thread(target=self._run, name="spans", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        return self._overflown + self._lost

    def export(self, records: Sequence[Record]) -> None:
        """Takes the records of traced requests, to be sent soon; returns at once."""
        for record in records:
            if record.trace_id:
                if len(self._waiting) >= CAPACITY:
                    self._overflown += 1
                else:
                    self._waiting.append(record.pack())
        if len(self._waiting) >= BATCH:
            self._wake.set()

    def stop(self, seconds: float) -> None:
        """Sends what waits, as far as that can be done in so many seconds."""
        self._stop_at = time.monotonic() + seconds
        self._wake.set()
        self._thread.join(seconds)
        if self.dropped != self._told:
            self._report(f"traces: the spans of {self.dropped - self._told} requests were dropped")
            self._told = self.dropped

    def _run(self) -> None:
        while self._stop_at is None or (self._waiting and time.monotonic() < self._stop_at):
            if self._stop_at is None:
                self._wake.wait(INTERVAL)
                self._wake.clear()
            while self._waiting and (self._stop_at is None or time.monotonic() < self._stop_at):
                batch = [Record.unpack(self._waiting.popleft()) for _ in range(min(BATCH, len(self._waiting)))]
                try:
                    self._send(batch)
                except Exception as e:  # or the thread would end, and nobody would know
                    self._lost += len(batch)
                    self._failed(type(e).__name__)
        self._lost += len(self._waiting)

    def _send(self, records: list[Record]) -> None:
        """Sends a batch, again and again until the collector takes or refuses it, or it is too old."""
        body, backoff, began = _encode(records, self._resource), FIRST_BACKOFF, time.monotonic()
        while True:
            try:
                self._lost += min(len(records), self._post(body))
                self._succeeded()
                return
            except _Refused as e:
                self._failed(str(e))
                break
            except (OSError, http.client.HTTPException) as e:
                self._failed(str(e) if isinstance(e, _Busy) else getattr(e, "strerror", None) or type(e).__name__)
                pause = max(backoff * random.uniform(0.8, 1.2), e.seconds if isinstance(e, _Busy) else 0.0)
            now = time.monotonic()
            if now + pause > min(began + LONGEST_RETRY, self._stop_at or now + pause):
                break
            self._pause(pause)
            backoff = min(2 * backoff, LONGEST_BACKOFF)
        self._lost += len(records)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (now := time.monotonic()) < until and self._stop_at is None:
            self._wake.wait(until - now)  # which a full batch ends too early, and a stop in time
            self._wake.clear()

    def _post(self, body: bytes) -> int:
        """Returns how many spans the collector has rejected.

        Raises:
            OSError, http.client.HTTPException: it may be tried again.
            _Refused: it may not.
        """
        url, host = self._url, self._url.hostname or ""
        port = url.port or (443 if self._context else 80)
        connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
        try:
            if self._context is not None:
                connection.connect()
                connection.sock = self._context.wrap_socket(connection.sock, server_hostname=host)
            connection.request("POST", url.path, body, self._headers)
            answer = connection.getresponse()
            said = answer.read(65_536)
        finally:
            connection.close()
        if answer.status in _RETRYABLE:
            raise _Busy(f"HTTP {answer.status}", answer.headers.get("Retry-After", ""))
        if not 200 <= answer.status < 300:
            raise _Refused(f"HTTP {answer.status}")
        return _rejected(said)

    def _failed(self, why: str) -> None:
        if not self._failing:
            self._failing = True
            self._report(f"traces: the collector does not take spans ({why}): they are dropped if that lasts")

    def _succeeded(self) -> None:
        dropped, now = self.dropped, time.monotonic()
        if self._failing:
            self._failing = False
            self._report(
                f"traces: the collector takes spans again; those of {dropped - self._told} requests were dropped"
            )
        elif dropped != self._told and now - self._last_told > TELLING:
            self._report(f"traces: the spans of {dropped - self._told} requests were dropped: the collector is slow")
        else:
            return
        self._told, self._last_told = dropped, now


class _Refused(Exception):
    """The collector will not take it, however often it is sent."""


class _Busy(OSError):
    def __init__(self, what: str, retry_after: str) -> None:
        super().__init__(what)
        self.seconds = min(float(retry_after), LONGEST_BACKOFF) if retry_after.isdecimal() else 0.0


def _tls_context() -> Any:
    # The supervisor does without OpenSSL until something needs it.
    if "ssl" in sys.modules and sys.modules["ssl"] is None:
        del sys.modules["ssl"]
    import ssl

    return ssl.create_default_context()


def _rejected(said: bytes) -> int:
    try:
        return int(ExportTraceServiceResponse.FromString(said).partial_success.rejected_spans)
    except DecodeError:  # it is no answer of OTLP's, but it is a success
        return 0


def _encode(records: Sequence[Record], resource: dict[str, str]) -> bytes:
    request = ExportTraceServiceRequest()
    group = request.resource_spans.add()
    _set(group.resource.attributes, resource)
    scope = group.scope_spans.add()
    scope.scope.name = "medassist.gateway"
    for record in records:
        for span in describe(record):
            _add(scope.spans, **span)
    data: bytes = request.SerializeToString()
    return data


def describe(record: Record) -> Iterator[dict[str, Any]]:
    """The spans of a request: its own, and below it those of the queue and of the engine's work, where it came so far.

    Returns:
        dicts of name, kind ("SERVER", "INTERNAL" or "CLIENT"), trace_id, span_id, parent_id (hexadecimal), start, end
        (nanoseconds since the epoch), flags, attributes and error (whether it failed for the server's fault).
    """
    end = int(record.time * _SECOND)
    queued, upstream = (max(0, int(seconds * _SECOND)) for seconds in (record.queued, record.upstream))
    start = min(end - int(record.seconds * _SECOND), end - queued - upstream)
    operation = _OPERATIONS.get(record.route, record.route.rsplit("/", 1)[-1])
    name = f"{operation} {record.model}".rstrip()
    failed = record.status >= 500
    model = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "vllm",
        "gen_ai.request.model": record.model or None,
    }
    error = (record.code or str(record.status)) if record.status >= 400 else None
    answered = not error and record.model
    common = {"trace_id": record.trace_id, "error": failed}
    yield common | {
        "name": name,
        "kind": "SERVER",
        "span_id": record.span_id,
        "parent_id": record.parent_id,
        "start": start,
        "end": end,
        "flags": _SAMPLED | (_REMOTE_PARENT if record.parent_id else _LOCAL_PARENT),
        "attributes": {
            **model,
            "gen_ai.request.stream": record.stream,
            "gen_ai.response.model": record.model if answered else None,
            "gen_ai.response.time_to_first_chunk": record.first_token if record.first_token >= 0 else None,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "http.request.method": "POST",
            "http.route": record.route,
            "http.response.status_code": record.status,
            "error.type": error,
            "medassist.request.id": record.request_id,
            "medassist.key.hash": hash_id(record.key) or None,
            "medassist.tenant": record.tenant or None,
            "medassist.phase": record.phase,
            "medassist.attempts": record.attempts,
            "medassist.usage.estimated": record.estimated,
        },
    }
    child = common | {"parent_id": record.span_id, "flags": _SAMPLED | _LOCAL_PARENT}
    if queued > 0:
        yield child | {
            "name": "queue",
            "kind": "INTERNAL",
            "span_id": queue_id(record.span_id),
            "start": end - upstream - queued,
            "end": end - upstream,
            "attributes": {"gen_ai.request.model": record.model or None},
            "error": False,
        }
    if record.attempts:
        yield child | {
            "name": name,
            "kind": "CLIENT",
            "span_id": upstream_id(record.span_id),
            "start": end - upstream,
            "end": end,
            "attributes": {
                **model,
                "error.type": error if failed else None,
                "medassist.replica": record.replica or None,
                "medassist.attempts": record.attempts,
            },
        }


def _add(
    spans: Any,
    *,
    name: str,
    kind: str,
    trace_id: str,
    span_id: str,
    parent_id: str,
    start: int,
    end: int,
    flags: int,
    attributes: dict[str, Any],
    error: bool,
) -> None:
    span = spans.add(
        name=name,
        kind=_KINDS[kind],
        trace_id=bytes.fromhex(trace_id),
        span_id=bytes.fromhex(span_id),
        parent_span_id=bytes.fromhex(parent_id),
        start_time_unix_nano=start,
        end_time_unix_nano=end,
        flags=flags,
    )
    if error:
        span.status.code = Status.STATUS_CODE_ERROR
    usual = [
        _attribute(key, value)
        for key, value in attributes.items()
        if not (value is None or type(value) is float or key in _UNIQUE)
    ]
    span.MergeFromString(b"".join(usual))
    _set(span.attributes, {key: value for key, value in attributes.items() if type(value) is float or key in _UNIQUE})


@lru_cache(4096, typed=True)
def _attribute(key: str, value: Any) -> bytes:
    """A span that has nothing else: merged into another, it adds the attribute at a third of the price."""
    span = Span()
    _set(span.attributes, {key: value})
    data: bytes = span.SerializeToString()
    return data


def _set(attributes: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if value is None:
            continue
        field = {bool: "bool_value", int: "int_value", float: "double_value", str: "string_value"}[type(value)]
        setattr(attributes.add(key=key).value, field, value)
