"""What the OpenAPI document says about answers."""

from typing import Any

from pydantic import BaseModel, Field

_STREAMED = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"))
_REASONS = {
    400: "A field is missing, unknown or not allowed for the model, or prompt and answer do not fit it; `param` names "
    "the field.",
    401: "A valid key is needed. Not where none is required.",
    403: "The key may not do this.",
    404: "There is no such model, or it has no such route.",
    405: "Another method than POST.",
    408: "The request did not arrive in time.",
    413: "The body is too large.",
    415: "The body is not `application/json`.",
    429: "Too many requests wait already, or the key has reached a limit.",
    431: "The request's head is too large.",
    500: "A mistake of the gateway.",
    502: "The engine does not accept the gateway.",
    503: "No engine can answer now.",
    504: "The engine did not answer in time.",
}
_RETRY = {"Retry-After": {"description": "Seconds after which to try again.", "schema": {"type": "integer"}}}
_CHALLENGE = {"WWW-Authenticate": {"description": "Always `Bearer`.", "schema": {"type": "string"}}}
_RATE_LIMITS = {
    f"X-RateLimit-{what}-{of}": {
        "description": f"Of keys with such a limit: {meaning} {of.lower()}.",
        "schema": {"type": "string"},
    }
    for what, meaning in (("Limit", "per minute,"), ("Remaining", "what is left of"), ("Reset", "time until all of"))
    for of in ("Requests", "Tokens")
}
_FURTHER = {401: _CHALLENGE, 429: _RETRY | _RATE_LIMITS, 503: _RETRY}
_REQUEST_ID = {"X-Request-Id": {"description": "The request's id, for support.", "schema": {"type": "string"}}}


class Error(BaseModel):
    message: str = Field(description="What is wrong, for the developer; never holds a prompt or an answer.")
    type: str = Field(description='Such as "invalid_request_error".')
    param: str | None = Field(description="The request's field that is wrong, such as `messages[0].content`.")
    code: str | None = Field(description='Machine-readable, such as "model_not_found".')


class ErrorResponse(BaseModel):
    """Every answer other than success."""

    error: Error


# Other routes: the media type of success, and what else there is than what every route can answer.
_OTHERS: dict[str, tuple[str, tuple[int, ...]]] = {
    "/v1/models": ("application/json", ()),
    "/v1/models/{model}": ("application/json", (404,)),
    "/health": ("application/json", ()),
    "/ready": ("application/json", (503,)),
    "/metrics": ("text/plain", ()),
}
_ANYWHERE = (400, 405, 408, 413, 431, 500, 503)
_OPEN = ("/health", "/ready")  # for everybody


def responses(route: str) -> dict[int | str, dict[str, Any]]:
    """All answers of a route, for FastAPI's ``responses``.

    Successful ones are the engine's own: they are not described further than what every engine keeps to.
    """
    media, further = _OTHERS.get(route, ("application/json", tuple(_REASONS)))
    content: dict[str, Any] = {media: {"schema": {"type": "string" if media == "text/plain" else "object"}}}
    if route in _STREAMED:
        content["text/event-stream"] = {}  # a schema would be that of each event
    if route == "/metrics":
        content["application/openmetrics-text"] = content[media]  # for those that ask for it
    what = "What was asked for." if route in _OTHERS else "The engine's answer."
    headers = _REQUEST_ID | ({} if route in _OTHERS else _RATE_LIMITS)
    success: dict[str, Any] = {"description": what, "content": content, "headers": headers}
    found = errors(*_ANYWHERE, *further, *(() if route in _OPEN else (401, 403)))
    if route == "/ready":
        found[503] = {"description": "A model has no engine that answers.", "content": content, "headers": _RETRY}
    return {200: success, **found}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers of these statuses, for FastAPI's ``responses``."""
    return {
        status: {
            "description": reason,
            "model": ErrorResponse,
            "headers": _REQUEST_ID | _FURTHER.get(status, {}),
        }
        for status, reason in _REASONS.items()
        if status in statuses
    }


SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "As OpenAI's clients send the key."},
    "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "As Anthropic's clients do."},
}


def security(path: str) -> list[dict[str, list[str]]]:
    """What a route needs, as an operation's ``security``; keys are required as soon as there has been one."""
    if path in _OPEN:
        return []
    keys: list[dict[str, list[str]]] = [{name: []} for name in SECURITY]
    return keys if path.startswith("/admin/") else [*keys, {}]
