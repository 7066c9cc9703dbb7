"""Refusals of a request, as errors of OpenAI's shape that name the field and never quote what people wrote."""

from collections.abc import Iterable
from typing import Any

from pydantic import ValidationError

from serving.gateway.errors import ApiError

_MAX_NAME = 64  # characters of a field's name that an error repeats
_MAX_ERRORS = 200  # beyond, a body is junk: pydantic needs a second to describe half a million wrong fields

# What a field cannot do here, though OpenAI's can.
_UNSUPPORTED = {
    "background": "answers are not computed in the background; leave it out",
    "previous_response_id": "answers are not stored: send the whole conversation as input",
    "store": "answers are not stored; leave it out or send false",
}


def printable(name: object) -> str:
    """A field's name as an error may repeat it: printable, and at most 64 characters."""
    text = str(name)
    short = text if len(text) <= _MAX_NAME else text[: _MAX_NAME - 1] + "…"
    return "".join(c if c.isprintable() else "?" for c in short)


def dotted(path: Iterable[object]) -> str:
    """A field's place, such as ``messages[0].content``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{printable(part)}" if text else printable(part)
    return text


def wrong(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field's value is not allowed. ``message`` follows the field's name: "must be ..."."""
    return ApiError(400, f"{param} {message}", code, param)


def unknown(name: object, path: Iterable[object] = ()) -> ApiError:
    """A field that there is not."""
    param = dotted([*path, name])
    return ApiError(400, f"there is no parameter {param}", "unknown_parameter", param)


def from_validation(error: ValidationError, root: tuple[str, ...] = ()) -> ApiError:
    """The first of pydantic's errors, of a request or of its field ``root``."""
    if error.error_count() > _MAX_ERRORS:
        return ApiError(400, f"the request has {error.error_count()} mistakes", "invalid_request")
    first = error.errors(include_url=False, include_context=True, include_input=True)[0]
    # Branches of a union are named "<...>" in our models; only the last part can be a client's own name.
    *where, last = (*root, *first["loc"]) or ("",)
    path = [part for part in where if not (isinstance(part, str) and part.startswith("<"))]
    kind = first["type"]
    if kind == "extra_forbidden":
        return unknown(last, path)
    if last == "[key]":
        return wrong(dotted(path[:-1]), "has a key that is not allowed")
    if not (isinstance(last, str) and last.startswith("<")):
        path.append(last)
    param = dotted(path)
    if kind == "missing":
        return ApiError(400, f"the request needs the field {param}", "missing_parameter", param)
    if last in _UNSUPPORTED and len(path) == 1:
        return ApiError(400, f"{param}: {_UNSUPPORTED[str(last)]}", "unsupported_parameter", param)
    message = first["msg"].replace("Input should be", "must be")
    given: Any = first["input"]
    if isinstance(given, bool | int | float):
        message += f", not {str(given).lower() if isinstance(given, bool) else given}"
    is_type = kind.endswith("_type") or kind == "none_required"
    return wrong(param, _plain(kind, message, first.get("ctx", {})), "invalid_type" if is_type else "invalid_value")


def _plain(kind: str, message: str, context: dict[str, Any]) -> str:
    """pydantic's sentence in words for people who have not heard of Python."""
    if kind in ("dict_type", "model_type", "model_attributes_type"):
        return "must be an object"
    if kind == "list_type":
        return "must be an array"
    if kind == "too_long":
        return f"must have at most {context['max_length']:,} entries"
    if kind == "too_short":
        return "must not be empty"
    if kind == "string_too_long":
        return f"must have at most {context['max_length']:,} characters"
    if kind == "string_too_short":
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        if "data:" in context["pattern"]:
            return "must be a data: URL of a PNG, JPEG, WebP or GIF image; nothing is ever fetched"
        return f"must match {context['pattern']}"
    return message.replace("a valid integer", "an integer").replace("a valid", "a")
