"""Any JSON whatever is a client's error, or a body of known fields that can be sent; and the schemas are true."""

import copy
from collections.abc import Callable
from typing import Any

import jsonschema
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from serving.gateway.errors import ApiError
from serving.gateway.parameters import ROUTES, check, parse
from serving.gateway.parameters.control import has_control, has_media
from serving.gateway.parameters.patterns import check_pattern
from serving.gateway.parameters.schemas import Spent, check_schema
from serving.gateway.settings import Limits
from tests.serving.gateway.test_parameters import CHAT, MINIMAL, model
from tests.serving.gateway.test_parameters_schemas import DRUG

QUICK = settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
WORDS = [
    "user",
    "assistant",
    "tool",
    "text",
    "function",
    "json_schema",
    "auto",
    "<|x|>",
    "#",
    "#/$defs/a",
    "(a+)+",
    "m",
]
scalars = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8) | st.sampled_from(WORDS)
)  # fmt: skip
KEYS = ["role", "content", "type", "text", "name", "function", "parameters", "schema", "properties", "items", "$ref",
        "pattern", "anyOf", "maxItems", "enum", "arguments", "tool_calls", "input", "url", "$defs"]  # fmt: skip
anything = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = sorted({name for schema in ROUTES.values() for name in schema.model_fields})


def error_of(call: Callable[[], object]) -> ApiError | None:
    """The error, which must be a client's."""
    try:
        call()
    except ApiError as error:
        return error if 400 <= error.status < 500 else pytest.fail(f"status {error.status}")
    return None


def survives(route: str, request: dict[str, Any], **limits: Any) -> bool:
    """Whether it is accepted; checks what holds in either case."""
    before = copy.deepcopy(request)
    bodies: list[dict[str, Any]] = []
    error = error_of(lambda: bodies.append(check(route, request, model(**limits)).body))
    assert request == before, "the request was changed"
    if error is not None:
        assert orjson.loads(error.body)["error"]["message"]
        return False
    assert set(bodies[0]) <= set(ROUTES[route].model_fields)
    orjson.dumps(bodies[0])
    return True


@QUICK
@given(st.binary(max_size=60) | anything.map(orjson.dumps))
def test_any_bytes_are_an_object_or_a_client_error(body: bytes) -> None:
    assert error_of(lambda: parse(body, 8)) or isinstance(parse(body, 8), dict)


@QUICK
@given(
    st.sampled_from(list(ROUTES)), st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=6), anything, max_size=5)
)
@example(CHAT, {"messages": [{"role": "user", "content": [{"type": []}]}]})
@example(CHAT, {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": "\\"}}]}]})
def test_any_object_is_checked_without_another_error(route: str, changes: dict[str, Any]) -> None:
    survives(route, MINIMAL[route] | changes)
    survives(route, changes)
    survives(route, MINIMAL[route] | changes, control_tokens=True, images=True, max_tokens=5)


@QUICK
@given(st.data(), st.sampled_from(list(ROUTES)))
def test_one_mistake_anywhere_is_checked_without_another_error(data: st.DataObject, route: str) -> None:
    """A request with everything in it, and one of its values exchanged for anything."""
    request = copy.deepcopy(RICH[route])
    places: list[tuple[Any, Any]] = []
    left: list[Any] = [request]
    while left:
        container = left.pop()
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        places += [(container, key) for key in keys]
        left += [container[key] for key in keys if isinstance(container[key], dict | list)]
    container, key = data.draw(st.sampled_from(places))
    container[key] = data.draw(anything)
    survives(route, request)


@QUICK
@given(anything | st.dictionaries(st.sampled_from(KEYS), anything, max_size=4))
def test_any_schema_passes_or_is_a_client_error(schema: Any) -> None:
    if isinstance(schema, dict):
        error_of(lambda: check_schema(schema, "p", Limits(), Spent()))


@QUICK
@given(st.text(alphabet="ab()[]{}*+?|\\^$.,:-12", max_size=20))
def test_any_pattern_passes_or_is_a_client_error(pattern: str) -> None:
    error_of(lambda: check_pattern(pattern, "p"))


@QUICK
@given(st.text(alphabet="<>|[]/sIMGimage_ \uff5c", max_size=30))
def test_a_placeholder_for_media_is_a_control_token_too(text: str) -> None:
    assert has_control(text) or not has_media(text)


CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": DRUG, "strict": True}}
SAMPLING = {"temperature": 1, "top_p": 0.5, "top_k": 5, "seed": 7, "stop": ["x"], "logit_bias": {"5": 1.5},
            "presence_penalty": -1}  # fmt: skip
RICH: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "model": "m", "n": 2, "max_completion_tokens": 9, "logprobs": True, "top_logprobs": 2, "tools": [TOOL],
        "tool_choice": {"type": "function", "function": {"name": "f"}}, "stream": True,
        "stream_options": {"include_usage": True}, "metadata": {"a": "b"},
        "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": DRUG}},
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "x"}], "name": "n"},
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "x", "tool_call_id": "1"},
        ], **SAMPLING,
    },
    "/v1/completions": {
        "model": "m", "prompt": [[1, 2], [3]], "max_tokens": 1, "bad_words": ["x"], "echo": True, "n": 2, **SAMPLING,
    },
    "/v1/embeddings": {"model": "m", "input": ["x", "y"], "encoding_format": "base64", "dimensions": 8},
    "/v1/responses": {
        "model": "m", "instructions": "x", "text": {"format": {"type": "json_schema", "name": "s", "schema": DRUG}},
        "tools": [{"type": "function", "name": "f", "parameters": DRUG}], "reasoning": {"effort": "low"},
        "input": [
            {"role": "user", "content": [{"type": "input_text", "text": "x"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "a"}]},
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "1", "output": "x"},
        ], **SAMPLING,
    },
    "/v1/messages": {
        "model": "m", "max_tokens": 5, "system": [{"type": "text", "text": "x"}], "stop_sequences": ["x"],
        "tools": [{"name": "f", "input_schema": DRUG, "cache_control": {"type": "ephemeral"}}],
        "tool_choice": {"type": "tool", "name": "f"}, "thinking": {"type": "disabled"},
        "messages": [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "1", "name": "f", "input": {"a": [1]}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "1", "content": "x"}]},
        ],
    },
    "/tokenize": {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": [TOOL]},
}  # fmt: skip


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_with_everything_is_accepted(route: str) -> None:
    assert survives(route, RICH[route])


@QUICK
@given(st.data(), st.sampled_from(list(ROUTES)))
def test_the_published_schema_forbids_nothing_that_is_accepted(data: st.DataObject, route: str) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(ROUTES[route].model_fields)), anything, max_size=3))
    for request in (MINIMAL[route] | changes, RICH[route] | changes):
        if survives(route, request):
            VALIDATORS[route].validate(request)


@pytest.mark.parametrize("route", ROUTES)
def test_single_values_are_refused_exactly_where_the_published_schema_forbids_them(route: str) -> None:
    """Of every field: edges of its numbers, wrong types, and nothing."""
    values = [None, True, False, 0, 1, -1, 2, 0.5, -2.5, 10**4, 2**31, 2**63, -(2**63), 2**64 - 1, "", "x", "auto",
              "none", "left", [], ["x"], [1], [[1]], [""], {}, {"5": 1}, {"x": "y"}, {"type": "text"}]  # fmt: skip
    wrong = []
    for name in sorted(ROUTES[route].model_fields):
        for value in values:
            request = MINIMAL[route] | {name: value}
            allowed = VALIDATORS[route].is_valid(request)
            # Limits of a model, named in the schema's descriptions.
            if allowed is not survives(route, request, n=128, logprobs=1000, stop=128) and name not in CAPPED:
                wrong.append((name, value, allowed))
    assert wrong == []


VALIDATORS = {route: jsonschema.Draft202012Validator(schema.model_json_schema()) for route, schema in ROUTES.items()}
CAPPED = {"min_tokens"}  # 16 at most for a completion that asks for no max_tokens
