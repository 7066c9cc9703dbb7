"""What the head of a relayed request says."""

import re
import secrets
from dataclasses import dataclass

from serving.gateway.errors import ApiError

LONGEST_DEADLINE = 86_400.0  # seconds
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,128}")


@dataclass(slots=True)
class Head:
    """The headers that matter.

    Attributes:
        id: the client's, or one of ours.
        deadline: the client's own limit of time, in seconds.
        traceparent: of the W3C's Trace Context, as it came.
        refusal: why the request is not answered; its id is known all the same.
    """

    id: bytes
    deadline: float | None = None
    traceparent: bytes = b""
    refusal: ApiError | None = None


def read_head(headers: list[tuple[bytes, bytes]]) -> Head:
    """Reads the headers, whose names are in lower case. ``refusal`` is 415 for another media type than JSON in UTF-8,
    400 for a limit that is no number of seconds."""
    media_type, seconds, encoding, request_id, traceparent, seen = b"", b"", b"", b"", b"", False
    for name, value in headers:
        if name == b"content-type":
            media_type = value.lower()
        elif name == b"x-request-id":
            request_id = value if _REQUEST_ID.fullmatch(value) else b""
        elif name == b"x-request-timeout":
            seconds = value
        elif name == b"content-encoding":
            encoding = value.lower()
        elif name == b"traceparent":
            traceparent = b"" if seen else value  # none that is sent twice counts
            seen = True
    head = Head(request_id or b"req-" + secrets.token_hex(16).encode(), traceparent=traceparent)
    if media_type != b"application/json":
        kind, _, parameters = media_type.partition(b";")
        charset = parameters.strip().replace(b'"', b"") or b"charset=utf-8"
        if kind.strip() != b"application/json" or charset not in (b"charset=utf-8", b"charset=utf8"):
            what = "the request's Content-Type must be application/json, in UTF-8"
            head.refusal = ApiError(415, what, "unsupported_media_type", "Content-Type")
    if encoding not in (b"", b"identity"):
        what = "the request's body must not be compressed"
        head.refusal = ApiError(415, what, "unsupported_media_type", "Content-Encoding")
    if seconds:
        try:
            head.deadline = float(seconds)
        except ValueError:
            head.deadline = 0.0
        if not 0 < head.deadline <= LONGEST_DEADLINE:
            what = f"X-Request-Timeout must be a number of seconds above 0, up to {LONGEST_DEADLINE:g}"
            head.refusal = ApiError(400, what, "invalid_timeout", "X-Request-Timeout")
    return head
