"""Messages after validation: bounded in number, free of control tokens, and without what engines do not know."""

import binascii
from collections.abc import Iterator
from typing import Any

import orjson

from serving.gateway.errors import ApiError
from serving.gateway.parameters.control import has_control, has_media
from serving.gateway.parameters.refusals import wrong
from serving.gateway.parameters.schemas import Spent, check_schema
from serving.gateway.settings import Limits

# Accepted from clients that send back what they got; no engine needs them.
_DROPPED = frozenset(("annotations", "cache_control", "citations", "audio", "function_call"))
_NO_TEXT = frozenset(("type", "role", "detail", "status", "cache_control", "image_url", "source"))
_IMAGES = frozenset(("image_url", "input_image", "image"))
_MAGIC = {"png": b"\x89PNG\r\n\x1a\n", "jpeg": b"\xff\xd8\xff", "gif": b"GIF8", "webp": b"RIFF"}


def check_text(text: str, param: str, limits: Limits) -> None:
    """Refuses text of a conversation that a tokenizer may read as control tokens.

    Raises:
        ApiError: 400, control_token.
    """
    if has_media(text) if limits.control_tokens else has_control(text):
        raise ApiError(400, f"{param} holds something like a control token", "control_token", param)


def check_media(text: str, param: str) -> None:
    """Refuses a placeholder for media in a plain prompt, whose own control tokens are allowed.

    Raises:
        ApiError: 400, control_token.
    """
    if has_media(text):
        raise ApiError(400, f"{param} holds something like a placeholder for media", "control_token", param)


def check_messages(
    messages: list[dict[str, Any]], param: str, limits: Limits
) -> tuple[list[dict[str, Any]], list[str]]:
    """Messages as the engine gets them, and the text of each with its role.

    Args:
        messages: of any of the three routes; they fit the route's model.

    Raises:
        ApiError: 400.
    """
    if len(messages) > limits.messages:
        raise wrong(param, f"must have at most {limits.messages:,} entries, not {len(messages):,}")
    clean: list[dict[str, Any]] = []
    texts: list[str] = []
    for i, message in enumerate(messages):
        content = message.get("content")
        if len(message) == 2 and type(content) is str:
            text = content
            if "<" in text or "[" in text:
                check_text(text, f"{param}[{i}].content", limits)
        else:
            where = f"{param}[{i}]"
            text = "".join(_strings(message, where))
            if "<" in text or "[" in text:
                field = f"{where}.content" if "content" in message else where
                check_text(text, field, limits)
                if type(content) is list:
                    _check_kinds(content, field, limits)
            message = _cleaned(message, where, limits)
        clean.append(message)
        texts += (message.get("role", "tool"), text)
    return clean, texts


def _check_kinds(parts: list[dict[str, Any]], param: str, limits: Limits) -> None:
    """Parts of each kind by themselves: engines lift thoughts and calls out of a text, and its ends meet."""
    kinds = {part["type"] for part in parts}
    if len(kinds) > 1:
        for kind in kinds:
            check_text("".join(_strings([part for part in parts if part["type"] == kind], param)), param, limits)


def _strings(value: Any, param: str) -> Iterator[str]:
    """All text of a message, in its order, so that a token cut in two parts is found."""
    if type(value) is str:
        yield value
    elif type(value) is list:
        for inner in value:
            yield from _strings(inner, param)
    elif type(value) is dict:
        for name, inner in value.items():
            if name == "input" and type(inner) is dict:  # of a call, rendered as JSON
                yield orjson.dumps(inner).decode()
            elif name == "arguments" and "\\" in inner:
                try:
                    yield orjson.dumps(orjson.loads(inner)).decode()  # without escapes that would hide a token
                except (orjson.JSONDecodeError, orjson.JSONEncodeError):  # the latter: nested too deeply
                    raise wrong(f"{param}.arguments", "must be JSON of ordinary depth") from None
            elif name not in _NO_TEXT:
                yield from _strings(inner, param)


def without_dropped(part: dict[str, Any]) -> dict[str, Any]:
    """A message or a part of one without nulls, and without what no engine needs."""
    return {name: value for name, value in part.items() if value is not None and name not in _DROPPED}


def _cleaned(message: dict[str, Any], param: str, limits: Limits) -> dict[str, Any]:
    message = without_dropped(message)
    content = message.get("content")
    if type(content) is list:
        parts = []
        for j, part in enumerate(content):
            if part["type"] in _IMAGES:
                _check_image(part, f"{param}.content[{j}]", limits)
            if part["type"] == "output_text":
                # An answer that was written by hand, without id and status, is only known as input.
                whole = {"type": "output_text", "annotations": []} if "id" in message and "status" in message else {}
                part = {"type": "input_text", "text": part["text"], **whole}
            elif None in part.values() or not _DROPPED.isdisjoint(part):
                part = without_dropped(part)
            parts.append(part)
        message["content"] = parts
    return message


def _check_image(part: dict[str, Any], param: str, limits: Limits) -> None:
    """The image must be what it says it is: decoders are chosen by its first bytes."""
    if not limits.images:
        raise wrong(param, "must be text: the model takes no images", "images_not_allowed")
    if part["type"] == "image":
        kind, data = part["source"]["media_type"].removeprefix("image/"), part["source"]["data"]
    else:
        url = part["image_url"] if part["type"] == "input_image" else part["image_url"]["url"]
        head, _, data = url.partition(",")
        kind = head.removeprefix("data:image/").removesuffix(";base64")
    try:
        first = binascii.a2b_base64(data[:24], strict_mode=True)
    except (binascii.Error, ValueError):
        raise wrong(param, "must hold base64") from None
    if not first.startswith(_MAGIC[kind]) or (kind == "webp" and first[8:12] != b"WEBP"):
        raise wrong(param, f"does not hold a {kind} image, as it says")


def check_tools(tools: list[dict[str, Any]], limits: Limits, spent: Spent) -> str:
    """Checks functions that the model may call, and returns them as text: it becomes part of the prompt.

    Raises:
        ApiError: 400.
    """
    if len(tools) > limits.tools:
        allowed = f"must have at most {limits.tools} entries, not {len(tools)}" if limits.tools else "are not allowed"
        raise wrong("tools", allowed)
    for i, tool in enumerate(tools):
        function = tool.get("function", tool)
        where = f"tools[{i}].function" if "function" in tool else f"tools[{i}]"
        if function.get("description"):
            check_text(function["description"], f"{where}.description", limits)
        for field in ("parameters", "input_schema"):
            if function.get(field) is not None:
                check_schema(function[field], f"{where}.{field}", limits, spent)
    return orjson.dumps(tools).decode()
