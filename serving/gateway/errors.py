"""Every error in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``."""

import re
from collections.abc import Mapping
from typing import Any

import orjson
from starlette.responses import Response

# How vLLM, and serving.launch in its place, say that prompt and answer do not fit.
_TOO_LONG = re.compile(
    r"maximum context length|maximum model length|max_(?:completion_)?tokens=\d+ cannot be greater than max_model_len"
)
_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer other than success.

    Args:
        status: HTTP status.
        message: for the developer who sent the request; never holds a prompt or an answer.
        code: machine-readable, such as "model_not_found".
        param: the request's field that is wrong.
        retry_after: seconds; sent as the ``Retry-After`` header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> bytes:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": error})

    @property
    def event(self) -> bytes:
        """The same as a server-sent event, for a stream that has begun."""
        return b"data: " + self.body + b"\n\n"

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        extra = dict(headers or {})
        if self.retry_after is not None:
            extra["Retry-After"] = str(self.retry_after)
        return Response(self.body, self.status, extra, media_type="application/json")


def from_engine(status: int, body: bytes, retry_after: int) -> ApiError:
    """What an engine's error means for the client.

    Messages of client errors are vLLM's and say what to change. Those of server errors are replaced: they can hold
    anything.
    """
    if status >= 500:
        return engine_lost(retry_after)
    try:
        error: Any = orjson.loads(body)
        error = error.get("error", error)
        message, param = str(error["message"]), error.get("param")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        message, param = "the engine refused the request", None
    message = re.sub(r" \((?:parameter|value)=[^()]*\)$", "", message)  # vLLM repeats the field behind its sentence
    code = "context_length_exceeded" if _TOO_LONG.search(message) else None
    return ApiError(status, message, code, param)


def engine_lost(retry_after: int) -> ApiError:
    """The engine failed under the request; another is being started."""
    return ApiError(503, "the model's engine failed and is being restarted", "engine_unavailable", None, retry_after)
