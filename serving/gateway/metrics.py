"""Prometheus metrics of the gateway. Labels are routes, models, replicas and codes: nothing that a client wrote.

With several workers they are kept in files that the workers share (``PROMETHEUS_MULTIPROC_DIR``, set before this is
imported), so that any worker can tell the whole.
"""

import contextlib
import os
import time
from bisect import bisect_left
from pathlib import Path
from typing import TYPE_CHECKING

import orjson
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics

from serving.gateway.exemplars import Exemplars
from serving.tenants.key_table import CONTACT, STATE

if TYPE_CHECKING:
    from serving.gateway.usage import Usage

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_OWN_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 1)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text"
OPENMETRICS_TYPE = f"{OPENMETRICS}; version=1.0.0; charset=utf-8"


class Metrics:
    """One gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
        self._shared = folder is not None
        self.exemplars = Exemplars(Path(folder) if folder else None)
        if not self._shared:
            ProcessCollector(registry=self.registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"medassist_{name}", what, labels, registry=self.registry)

        def gauge(name: str, what: str, *labels: str, mode: str = "livesum") -> Gauge:
            return Gauge(f"medassist_{name}", what, labels, registry=self.registry, multiprocess_mode=mode)  # type: ignore[arg-type]

        def histogram(name: str, what: str, *labels: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"medassist_{name}_seconds", what, labels, registry=self.registry, buckets=buckets)

        self.requests = counter("requests_total", "Answered requests", "route", "model", "code")
        self.tokens = counter("tokens_total", "Tokens of prompts and answers", "model", "kind")
        self.key_requests = counter("key_requests_total", "Answered requests by key", "key", "status")
        self.key_tokens = counter("key_tokens_total", "Tokens of prompts and answers by key", "key", "kind")
        self.auth_failures = counter("auth_failures_total", "Requests without a valid key", "reason")
        self.records_dropped = counter("records_dropped_total", "Ended requests that there was no room to write down")
        self.in_flight = gauge("requests_in_flight", "Requests being answered", "model")
        self.duration = histogram("request_duration", "From arrival to the end of the answer", "route", "model")
        self.first_token = histogram(
            "time_to_first_token", "From arrival to the first byte of the engine's answer", "route", "model"
        )
        self.inter_token = histogram(
            "inter_token", "Between two pieces of a stream", "route", "model", buckets=_TOKEN_SECONDS
        )
        self.queued = histogram("queue", "Waiting in the gateway for an engine", "model")
        self.upstream = histogram("upstream", "At the engine, from sending to its last byte", "model")
        self.overhead = histogram(
            "overhead", "Arrival to end, less waiting for the engine and for the queue", "route", buckets=_OWN_SECONDS
        )
        self.errors = counter("errors_total", "Requests answered with an error, by its code", "code")
        self.rejections = counter("rejections_total", "Requests that were not let through to an engine", "reason")
        self.cancellations = counter("cancellations_total", "Requests whose client left, by how far they were", "phase")
        self.retries = counter("retries_total", "Requests sent to another replica", "model", "reason")
        self.broken_streams = counter("broken_streams_total", "Streams that ended with an error event", "model")
        self.keep_alives = counter("keep_alive_comments_total", "Comments sent into silent streams")
        self.queue_length = gauge("queue_length", "Requests that wait for an engine", "model")
        self.limit = gauge("concurrency_limit", "Requests that a replica may have at once", "model", "replica")
        self.outstanding = gauge("replica_outstanding", "Requests at a replica, of this gateway", "model", "replica")
        self.replica_up = gauge("replica_up", "1 while a replica gets requests", "model", "replica", mode="livemin")
        self.replica_state = gauge(
            "replica_state", "1 for the state it is in", "model", "replica", "state", mode="livemax"
        )
        self.replica_failures = counter("replica_failures_total", "Failures seen", "model", "replica", "reason")
        self.engine_running = gauge("engine_running", "Running requests, as told", "model", "replica", mode="livemax")
        self.engine_waiting = gauge("engine_waiting", "Waiting requests, as told", "model", "replica", mode="livemax")
        self.engine_cache = gauge("engine_cache_usage", "KV cache in use, of 1", "model", "replica", mode="livemax")
        self.canaries = counter("canaries_total", "Canaries sent, by outcome", "model", "replica", "outcome")
        self.limited = counter("limited_total", "Requests refused, by the limit of their key", "limit")
        self.shared_limits_up = gauge(
            "shared_limits_up", "1 while limits are shared with other gateways", "store", mode="livemin"
        )
        self.shared_limits_reconnects = counter(
            "shared_limits_reconnects_total", "Times that the store of shared limits was back", "store"
        )
        self.reloads = counter("config_reloads_total", "Reloads of the settings", "outcome")
        # Of the keeper, which serves all workers: whoever is asked last says it.
        self.store_up = gauge("store_up", "1 while the store can be reached", mode="mostrecent")
        self.store_outages = gauge("store_outages", "Times that the store was away", mode="mostrecent")
        self.keys_age = gauge("keys_age_seconds", "Since the keys were compared with the store", mode="mostrecent")
        self.ledger_batches = gauge("ledger_batches", "Transactions that added usage", mode="mostrecent")
        self.ledger_lag = gauge("ledger_lag_seconds", "For which the ledger has lacked usage", mode="mostrecent")
        self.ledger_lag_bytes = gauge("ledger_lag_bytes", "Of journals that the ledger lacks", mode="mostrecent")
        self.ledger_refused = gauge("ledger_refused", "Records that the store did not take", mode="mostrecent")
        self.keeper_folder: Path | None = None

        self._of: dict[tuple[str, str], ModelMetrics] = {}

    def of(self, route: str, model: str) -> "ModelMetrics":
        """Those of one route and model, looked up once."""
        found = self._of.get((route, model))
        if found is None:
            found = self._of[route, model] = ModelMetrics(self, route, model)
        return found

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """The text of ``/metrics``, and its media type: OpenMetrics, which has exemplars, for a scraper that names it
        first in its header ``Accept``."""
        if self.keeper_folder is not None:
            self._show_keeper(self.keeper_folder)
        if not self._shared:
            return self._encode(self.registry, accept)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)
        for _ in range(3):
            with contextlib.suppress(FileNotFoundError):  # of a worker that has just gone
                return self._encode(registry, accept)
        return self._encode(registry, accept)

    def _show_keeper(self, folder: Path) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError):  # there is no store, or the keeper has just ended
            state = orjson.loads((folder / STATE).read_bytes())
            self.store_up.set(state["store_up"])
            self.store_outages.set(state["outages"])
            self.ledger_batches.set(state["batches"])
            self.ledger_refused.set(state.get("refused", 0))
            self.ledger_lag.set(state["lag_seconds"])
            self.ledger_lag_bytes.set(state["lag_bytes"])
            self.keys_age.set(max(0.0, time.time() - (folder / CONTACT).stat().st_mtime))

    def _encode(self, registry: CollectorRegistry, accept: str) -> tuple[bytes, str]:
        if wants_openmetrics(accept):
            text: bytes = generate_openmetrics(self.exemplars.attach(registry))
            return text, OPENMETRICS_TYPE
        return generate_latest(registry), CONTENT_TYPE


def wants_openmetrics(accept: str) -> bool:
    """Whether a header ``Accept`` names OpenMetrics before plain text."""
    for part in accept.split(","):
        kind, *parameters = (word.strip().lower() for word in part.split(";"))
        if kind in (OPENMETRICS, "text/plain", "*/*") and "q=0" not in parameters:
            return kind == OPENMETRICS
    return False


class ModelMetrics:
    """The metrics of one route and model."""

    def __init__(self, metrics: Metrics, route: str, model: str) -> None:
        self.in_flight = metrics.in_flight.labels(model)
        self.duration = metrics.duration.labels(route, model)
        self.first_token = metrics.first_token.labels(route, model)
        self._inter_token = metrics.inter_token.labels(route, model)
        self.queued = metrics.queued.labels(model)
        self.overhead = metrics.overhead.labels(route)
        self._upstream = metrics.upstream.labels(model)
        self._prompt = metrics.tokens.labels(model, "prompt")
        self._completion = metrics.tokens.labels(model, "completion")
        series = metrics.exemplars.series
        self._traced_duration = series("medassist_request_duration_seconds", route, model, _SECONDS)
        self._traced_first_token = series("medassist_time_to_first_token_seconds", route, model, _SECONDS)

    def count(self, upstream: float, usage: "Usage") -> None:
        """An engine's work on a request: seconds and tokens."""
        self._upstream.observe(upstream)
        if usage.prompt_tokens is not None:
            self._prompt.inc(usage.prompt_tokens)
        if usage.completion_tokens is not None:
            self._completion.inc(usage.completion_tokens)

    def observe_gaps(self, gaps: list[float]) -> None:
        """Puts down the seconds between pieces of a stream, and empties the list.

        Together, since one ``observe`` costs as much as what is done besides for a piece, and there is one for each
        token. The library has no call for it.
        """
        buckets, counts = self._inter_token._buckets, [0] * (len(_TOKEN_SECONDS) + 1)
        for gap in gaps:
            counts[bisect_left(_TOKEN_SECONDS, gap)] += 1
        self._inter_token._sum.inc(sum(gaps))
        for bucket, count in zip(buckets, counts, strict=True):
            if count:
                bucket.inc(count)
        gaps.clear()

    def exemplify(self, trace_id: str, duration: float, first_token: float) -> None:
        """Links what was observed of a traced request to its trace; ``first_token`` is -1 where there was none."""
        self._traced_duration.note(duration, trace_id)
        if first_token >= 0:
            self._traced_first_token.note(first_token, trace_id)
