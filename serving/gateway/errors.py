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
        headers: further ones.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.headers = headers
        self.status, self.message, self.code, self.param, self.retry_after = status, message, code, param, retry_after

    @property
    def body(self) -> bytes:
        return orjson.dumps({"error": self._error})

    @property
    def _error(self) -> dict[str, str | None]:
        kind = self.code if self.code == "insufficient_quota" else None  # as OpenAI has it
        kind = kind or _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

    def event(self, route: str) -> bytes:
        """The same as a server-sent event, for a stream that has begun."""
        if route == "/v1/messages":  # Anthropic's clients look at the event's name
            return b"event: error\ndata: " + orjson.dumps({"type": "error", "error": self._error}) + b"\n\n"
        return b"data: " + self.body + b"\n\n"

    def response(self, headers: Mapping[str, str] | None = None) -> Response:
        extra = {name.decode(): value.decode() for name, value in self.headers} | dict(headers or {})
        if self.retry_after is not None:
            extra["Retry-After"] = str(self.retry_after)
        return Response(self.body, self.status, extra, media_type="application/json")


def from_engine(status: int, body: bytes, route: str, model: str) -> ApiError:
    """What an engine's refusal (below 500, or 501) means for the client.

    Messages of client errors are the engine's and say what to change.
    """
    try:
        content: Any = orjson.loads(body)
        error = content.get("error", content)
        message, param = str(error["message"]), error.get("param")
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError):
        message, param = "", None
    if status in (405, 501) or (status == 404 and not message):
        return ApiError(404, f"the model {model[:100]!r} has no {route}", "unsupported_route", "model")
    message = re.sub(r" \((?:parameter|value)=[^()]*\)$", "", message)  # vLLM repeats the field behind its sentence
    code = "context_length_exceeded" if _TOO_LONG.search(message) else None
    status = status if status in (404, 413) else 400
    return ApiError(
        status, message or "the engine refused the request", code, param if isinstance(param, str) else None
    )


def engine_lost(retry_after: int) -> ApiError:
    """The engine failed under the request."""
    return ApiError(503, "the model's engine failed", "engine_unavailable", None, retry_after)


def engine_late(seconds: float) -> ApiError:
    """The engine did not begin, or did not go on, in time."""
    return ApiError(504, f"the model's engine sent nothing for {seconds:g} s", "engine_timeout", None, 5)
