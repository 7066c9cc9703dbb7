"""Traces across the gateway, by the W3C's Trace Context.

A request's span is a child of the client's, if the client has sent one. The engine gets our own as its parent, so that
its spans hang below it. ``tracestate`` and ``baggage`` are not passed on: they may hold anything.
"""

import random
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serving.gateway.operations import Tracing

# Version ff is forbidden. Later versions may append to these fields; version 00 may not.
_TRACEPARENT = re.compile(rb"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SAMPLED = 1


@dataclass(slots=True)
class Trace:
    """A span of ours.

    Attributes:
        trace_id, span_id, parent_id: 32, 16 and 16 hexadecimal digits. ``parent_id`` is empty where the trace begins
            here; all are where no span is written.
        headers: for the engine.
    """

    trace_id: str
    span_id: str
    parent_id: str
    headers: dict[str, str] = field(default_factory=dict)


class Tracer:
    """Begins spans."""

    def __init__(self, settings: "Tracing") -> None:
        self._enabled = settings.endpoint is not None
        # As OpenTelemetry's TraceIdRatioBased, so that gateways with the same share choose the same traces.
        self._bound = round(settings.sample * 2**64)
        self._bits = random.Random().getrandbits  # seeded by the system; ids are no secrets

    def begin(self, traceparent: bytes) -> Trace | None:
        """The span of a request that begins; its ids are empty where the trace is not sampled, and only the headers
        for the engine count.

        Args:
            traceparent: the client's header; empty or wrong: it has sent none.

        Returns:
            None where there is nothing to say to the engine either.
        """
        match = _TRACEPARENT.fullmatch(traceparent) if traceparent else None
        if match is None or (match[4] is not None and traceparent.startswith(b"00")):
            if not self._enabled:
                return None
            bits = self._bits(128) or 1
            trace_id, parent_id, sampled = f"{bits:032x}", "", (bits & 0xFFFF_FFFF_FFFF_FFFF) < self._bound
        else:
            trace_id, parent_id, sampled = match[1].decode(), match[2].decode(), bool(int(match[3], 16) & _SAMPLED)
            if not self._enabled or not sampled:
                return Trace("", "", "", {"traceparent": f"00-{trace_id}-{parent_id}-{sampled:02x}"})
        # The two lowest bits tell our spans of one request apart, see upstream_id; none of them is 0.
        span = self._bits(64) & ~3 | 4
        if not sampled:  # said all the same: an engine would begin a trace of its own
            return Trace("", "", "", {"traceparent": f"00-{trace_id}-{span:016x}-00"})
        return Trace(trace_id, f"{span:016x}", parent_id, {"traceparent": f"00-{trace_id}-{span | 1:016x}-01"})


def upstream_id(span_id: str) -> str:
    """The span of the engine's work, which the engine knows as its parent."""
    return f"{int(span_id, 16) | 1:016x}"


def queue_id(span_id: str) -> str:
    """The span of the wait for an engine."""
    return f"{int(span_id, 16) | 2:016x}"
