"""What is written down of a request: numbers and names, and not a word of it.

A worker packs one record when a request ends and appends it to its journal; the keeper makes of it a row of the ledger,
a line of the audit log, a line of the request log and a span.
"""

from dataclasses import dataclass

import orjson

MOST_TOKENS = 2**40
"""Of a prompt, or of answers: no request has more, and what the store adds up stays within 64 bits."""


@dataclass(slots=True)
class Record:
    """One request.

    Attributes:
        time: seconds since the epoch, of its end.
        request_id: sent to the client as ``X-Request-Id``.
        key, tenant: ids; empty where no key was required.
        route: one of the gateway's routes.
        model: the resolved name; empty where it did not come so far. Never what a client wrote.
        status: of HTTP; 499 where the client left.
        code: of the error, such as "rate_limit_exceeded"; empty on success.
        phase: how far it was: "reading", "queued", "connecting", "waiting", "streaming", "ending".
        stream: whether the client wanted one.
        prompt_tokens, completion_tokens: used.
        estimated: the engine did not say, or the client left before it could.
        seconds, queued, upstream, first_token: durations from its arrival; -1 where there was none.
        replica: that answered last; empty where it reached none.
        attempts: replicas asked.
        trace_id, span_id, parent_id: 32, 16 and 16 hexadecimal digits; empty where nothing is traced.
        captured: its bodies were captured.
    """

    time: float
    request_id: str
    key: str
    tenant: str
    route: str
    model: str
    status: int
    code: str
    phase: str
    stream: bool
    prompt_tokens: int
    completion_tokens: int
    estimated: bool
    seconds: float
    queued: float
    upstream: float
    first_token: float
    replica: str
    attempts: int
    trace_id: str = ""
    span_id: str = ""
    parent_id: str = ""
    captured: bool = False

    def pack(self) -> bytes:
        """As one line of JSON, without its end: an array in the order of the fields."""
        return orjson.dumps([getattr(self, name) for name in _FIELDS])

    @classmethod
    def unpack(cls, line: bytes) -> "Record":
        """The reverse.

        Raises:
            ValueError: it is not one.
        """
        try:
            return cls(*orjson.loads(line))
        except (orjson.JSONDecodeError, TypeError):
            raise ValueError("not a record") from None


_FIELDS = tuple(Record.__dataclass_fields__)
