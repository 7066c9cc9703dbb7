"""JSON schemas and regular expressions that engines compile: real ones pass, bombs do not."""

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from serving.gateway.errors import ApiError
from serving.gateway.parameters import check
from serving.gateway.parameters.patterns import check_pattern
from serving.gateway.parameters.schemas import Spent, check_schema
from serving.gateway.settings import Limits
from tests.serving.gateway.measuring import seconds
from tests.serving.gateway.test_parameters import CHAT, model


def _doubling(levels: int) -> dict[str, Any]:
    """Each definition holds the next one twice: small as it stands, 2^levels parts when written out."""
    both = [{"type": "array", "prefixItems": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(levels)]
    return {"$ref": "#/$defs/d0", "$defs": {f"d{i}": d for i, d in enumerate(both)} | {f"d{levels}": {}}}


class Person(BaseModel):
    name: str
    children: list["Person"]
    spouse: "Person | None" = None


TREE = Person.model_json_schema()
DRUG = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 200, "pattern": "^[A-Za-z][A-Za-z -]*$"},
        "dose": {"type": ["number", "null"], "exclusiveMinimum": 0, "description": "in mg"},
        "route": {"enum": ["oral", "iv", None]},
        "times": {"type": "array", "items": {"type": "string", "format": "time"}, "maxItems": 24, "uniqueItems": True},
        "id": {"anyOf": [{"const": 1}, {"$ref": "#/$defs/code"}]},
        "type": {"type": "string"},
    },
    "required": ["name", "dose"],
    "additionalProperties": False,
    "$defs": {"code": {"type": "string", "pattern": r"^[A-Z]\d{2}(?:\.\d{1,2})?$"}},
    "x-note": {"type": "not a schema"},
}


@pytest.mark.parametrize("schema", [{}, TREE, DRUG, _doubling(8), {"$ref": "#/$defs/a~1b", "$defs": {"a/b": True}}])
def test_real_schemas_pass(schema: dict[str, Any]) -> None:
    check_schema(schema, "p", Limits(), Spent())


BAD: list[tuple[dict[str, Any], str]] = [
    ({"type": "strnig"}, "p.type"),
    ({"type": 7}, "p.type"),
    ({"type": []}, "p.type"),
    ({"type": {"a": 1}}, "p.type"),
    ({"properties": {"a": {"type": "x"}}}, "p.properties.a.type"),
    ({"properties": []}, "p.properties"),
    ({"properties": {"a": 5}}, "p.properties.a"),
    ({"items": "x"}, "p.items"),
    ({"anyOf": {}}, "p.anyOf"),
    ({"anyOf": [{}, {"not": 5}]}, "p.anyOf[1].not"),
    ({"required": "a"}, "p.required"),
    ({"enum": []}, "p.enum"),
    ({"enum": list(range(513))}, "p.enum"),
    ({"maxItems": 4097}, "p.maxItems"),
    ({"minLength": -1}, "p.minLength"),
    ({"maxLength": 1.5}, "p.maxLength"),
    ({"minItems": True}, "p.minItems"),
    ({"anyOf": [{"maxLength": 4096} for _ in range(17)]}, "p.anyOf[0]"),
    ({"multipleOf": 0}, "p.multipleOf"),
    ({"minimum": "0"}, "p.minimum"),
    ({"format": "x" * 65}, "p.format"),
    ({"pattern": "("}, "p.pattern"),
    ({"pattern": 5}, "p.pattern"),
    ({"patternProperties": {"(a+)+": {}}}, "p.patternProperties"),
    ({"$ref": "https://example.org/schema.json"}, "p.$ref"),
    ({"$ref": "#/$defs/none"}, "p.$ref"),
    ({"$ref": 5}, "p.$ref"),
    ({"$id": "https://example.org/"}, "p.$id"),
    ({"$dynamicRef": "#x"}, "p.$dynamicRef"),
    ({"$ref": "#"}, "p.$ref"),
    ({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/b"}]},
                                     "b": {"allOf": [{"$ref": "#/$defs/a"}]}}}, "p.$ref"),
    ({"items": {"$ref": "#/anyOf/00"}, "anyOf": [{}]}, "p.items.$ref"),
    ({"items": {"$ref": "#/anyOf/\u0660"}, "anyOf": [{}]}, "p.items.$ref"),
    ({"$defs": _doubling(20)["$defs"]}, "p"),
    ({"pattern": "[\u0100-\uabcdx]" * 9}, "p.pattern"),
    ({"$ref": "#/x-hidden", "x-hidden": {"type": "x"}}, "p.$ref.type"),
    (_doubling(20), "p"),
    ({"description": "see <|im_start|>"}, "p"),
    ({"enum": [0] * 500, "x": [[0] * 900] * 4}, "p"),
    ({"description": "x" * 16_384}, "p"),
]  # fmt: skip


@pytest.mark.parametrize(("schema", "param"), BAD, ids=lambda value: str(value)[:60])
def test_bombs_and_malformed_schemas_are_refused_by_place(schema: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_schema(schema, "p", Limits(), Spent())
    assert (caught.value.status, caught.value.param) == (400, param)


def test_depth_is_bounded_by_the_settings() -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {}
        for _ in range(depth - 1):
            schema = {"not": schema}
        return schema

    check_schema(nested(16), "p", Limits(), Spent())
    with pytest.raises(ApiError):
        check_schema(nested(17), "p", Limits(), Spent())
    check_schema(nested(250), "p", Limits(schema_depth=250), Spent())


def test_a_long_chain_of_references_does_not_exhaust_the_stack() -> None:
    def chain(length: int) -> dict[str, Any]:
        links: dict[str, Any] = {f"d{i}": {"items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(length - 1)}
        return {"$ref": "#/$defs/d0", "$defs": links | {f"d{length - 1}": {}}}

    check_schema(chain(256), "p", Limits(schema_bytes=10**6), Spent())
    with pytest.raises(ApiError):
        check_schema(chain(257), "p", Limits(schema_bytes=10**6), Spent())


def _nested_references(leaves: int) -> dict[str, Any]:
    """Every level of a nest is the target of a reference of its own, and so is every leaf."""
    schema: dict[str, Any] = {"properties": {f"p{i}": {} for i in range(leaves)}}
    for _ in range(6):
        schema = {"anyOf": [schema]}
    paths = ["#" + "/anyOf/0" * level for level in range(1, 7)]
    paths += [f"{paths[-1]}/properties/p{i}" for i in range(leaves)]
    return schema | {"$defs": {f"r{i}": {"items": {"$ref": path}} for i, path in enumerate(paths)}}


def _wide(number: int) -> dict[str, Any]:
    """Patterns that differ, with a character class that Python needs a millisecond for."""
    return {"properties": {f"p{i}": {"pattern": f"[\u0100-\uabcdx]{number}a{i}"} for i in range(8)}}


def _long(number: int) -> dict[str, Any]:
    return {"properties": {f"p{i}": {"pattern": "(a?)" * 60 + f"{number}b{i}"} for i in range(20)}}


def _short(number: int) -> dict[str, Any]:
    return {"properties": {f"p{i}": {"pattern": f"{number:x}g{i}"} for i in range(400)}}


def _many(number: int) -> dict[str, Any]:
    return {"properties": {f"p{i}": {} for i in range(1500)}}


@pytest.mark.parametrize(
    "schema",
    [lambda number: _nested_references(100), _wide, _long, _short, _many],
    ids=["references", "wide", "long", "short", "many"],
)
def test_all_schemas_of_a_request_together_take_a_bounded_time(schema: Callable[[int], dict[str, Any]]) -> None:
    """64 of them cost less than 32 times one, though none is known from before."""

    def ask(start: int, number: int) -> dict[str, Any]:
        names = range(start, start + number)
        tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema(i)}} for i in names]
        return {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools}

    one = seconds(lambda request: check(CHAT, request, model()), [ask(100 + i, 1) for i in range(3)])

    def refuse(request: dict[str, Any]) -> None:
        with pytest.raises(ApiError) as caught:
            check(CHAT, request, model())
        assert "tools[" in str(caught.value.param)

    assert seconds(refuse, [ask(1000 * i, 64) for i in range(1, 4)]) < 32 * one


def test_tools_and_formats_share_what_schemas_may_hold() -> None:
    first, second = ({"type": "object"} | _wide(i) for i in range(2))
    tools = [{"type": "function", "function": {"name": "f", "parameters": first}}]
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": second}}
    request = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({"tools": tools, "response_format": form}, {}),
        ({"tools": tools, "structured_outputs": {"json": second}}, {"allow": ["structured_outputs"]}),
    ]
    for fields, limits in cases:
        for name in fields:
            check(CHAT, request | {name: fields[name]}, model(**limits))
        with pytest.raises(ApiError, match="regular expressions of a request"):
            check(CHAT, request | fields, model(**limits))


def test_many_ordinary_tools_pass() -> None:
    tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": DRUG}} for i in range(64)]
    check(CHAT, {"model": "m", "messages": [{"role": "user", "content": "x"}], "tools": tools}, model())


@pytest.mark.parametrize(
    "pattern",
    [r"^\d{4}-\d{2}-\d{2}$", "^[a-z0-9]+([-_][a-z0-9]{1,8}){0,9}$", r"^(?:a|b)*$", r"[]+*]+", r"[^\]+]*x\++", "a{,5}",
     "a{b}", "^.{1,1000}$", "(a{10}){100}", "x*?y+?", r"\(a+\)+"],
)  # fmt: skip
def test_plain_patterns_pass(pattern: str) -> None:
    check_pattern(pattern, "p")


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+", "(a*)*b", "((a+)b)*", "(?:x+y)+", "(a|b+)*", "(?:(?:a+){3})*", "([a-z]+){2,}", "a{1001}", "(a{10}){101}",
     "((a{10}){10}){11}", "(a{100}b{100}){9}(a{1000}b{1000}){1}(c{1000}d{1000})(e{1000}f{900})", r"(a)\1", r"(?P<n>a)",
     "(?=a)", "(?!a)", "(?<=a)b", "(?i)a", "(", ")", "[", "*a", "a**", "a{2}{3}", "\\", "a{2,1}", "x" * 257,
     "a{999999999}"],
    ids=lambda pattern: pattern[:30],
)  # fmt: skip
def test_dangerous_and_malformed_patterns_are_refused(pattern: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_pattern(pattern, "p")
    assert caught.value.code == "invalid_schema"
    assert pattern not in caught.value.message or len(pattern) == 1
