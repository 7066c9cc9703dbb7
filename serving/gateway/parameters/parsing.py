"""From the bytes of a body to an object of bounded shape."""

from itertools import islice
from typing import Any

import orjson

from serving.gateway.errors import ApiError

# Together, what a worker can look at in a tenth of a second.
_MAX_CONTAINERS = 25_000  # objects and arrays; 2048 messages of calls, or as many prompts of ids, have far fewer
_MAX_FIELDS = 10_000  # of one object
_MAX_DEPTH = 250  # orjson writes no more than 254, and the request is to be written again
_MAX_BRACKETS = 400_000  # "[" and "{"; those within text count too, and no model reads as many
_MAX_TAGS = 500_000  # "<", each of which may begin a control token


def parse(body: bytes, json_depth: int) -> dict[str, Any]:
    """A request's JSON object.

    Text that is not UTF-8, NaN and numbers beyond a double are no JSON here.

    Args:
        json_depth: how deeply objects and arrays may lie in each other; 250 at most.

    Raises:
        ApiError: 400, it is not such an object.
    """
    # Brackets within text count too, so few of them tell that there is nothing to look for, and many almost nothing.
    brackets = body.count(b"[") + body.count(b"{")
    if brackets > _MAX_BRACKETS:
        raise ApiError(400, f"the request has more than {_MAX_BRACKETS:,} brackets", "invalid_json")
    # Escaped ones, and digits that are, as only large bodies can have many.
    if len(body) > _MAX_TAGS and body.count(b"<") + body.count(b"\\u003") > _MAX_TAGS:
        raise ApiError(400, f'the request has more than {_MAX_TAGS:,} "<"', "invalid_json")
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as e:
        # Positions and reasons only: the message quotes nothing of the body.
        raise ApiError(400, f"the request is not valid JSON: {e}", "invalid_json") from None
    if not isinstance(request, dict):
        raise ApiError(400, "the request must be a JSON object", "invalid_json")
    depth = min(json_depth, _MAX_DEPTH)
    if brackets > depth or body.count(b":") > _MAX_FIELDS:
        _check_shape(request, depth)
    return request


def _check_shape(request: dict[str, Any], limit: int) -> None:
    """Level by level, without recursion, and no further than it must."""
    level: list[Any] = [request]
    total = 0
    for _ in range(limit):
        if any(len(container) > _MAX_FIELDS for container in level if type(container) is dict):
            raise ApiError(400, f"the request has an object of more than {_MAX_FIELDS:,} fields", "invalid_json")
        inside = (
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)
            if type(child) is dict or type(child) is list
        )
        level = list(islice(inside, _MAX_CONTAINERS + 1))
        total += len(level)
        if total > _MAX_CONTAINERS:
            raise ApiError(400, f"the request has more than {_MAX_CONTAINERS:,} objects and arrays", "invalid_json")
        if not level:
            return
    raise ApiError(400, f"the request's JSON is nested more than {limit} deep", "invalid_json")
