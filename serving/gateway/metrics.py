"""Prometheus metrics of the gateway. Labels are routes, models and codes: nothing that a client wrote."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """One gateway's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        r = self.registry
        self.requests = Counter("medassist_requests_total", "Answered requests", ["route", "model", "code"], registry=r)
        self.in_flight = Gauge("medassist_requests_in_flight", "Requests being answered", ["model"], registry=r)
        self.first_byte = Histogram(
            "medassist_time_to_first_byte_seconds",
            "From the request's arrival to the first byte of the engine's answer",
            ["route", "model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.duration = Histogram(
            "medassist_request_duration_seconds",
            "From the request's arrival to the end of its answer",
            ["route", "model"],
            buckets=_SECONDS,
            registry=r,
        )
        self.disconnects = Counter(
            "medassist_client_disconnects_total", "Clients that left before the end", ["model"], registry=r
        )
        self.broken_streams = Counter(
            "medassist_broken_streams_total", "Streams that ended with an error event", ["model"], registry=r
        )
        self.engine_ready = Gauge("medassist_engine_ready", "1 while the engine serves", ["model"], registry=r)
        self.engine_restarts = Gauge(
            "medassist_engine_restarts", "Restarts of the engine since the gateway started", ["model"], registry=r
        )

    def render(self) -> bytes:
        return generate_latest(self.registry)
