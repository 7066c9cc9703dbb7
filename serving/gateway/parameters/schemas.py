"""JSON schemas that engines compile to grammars: bounded in every direction that has crashed or stalled one.

Recursion by ``$ref`` is allowed where every turn of it goes through a property or an item (trees, linked lists); a
schema that refers to itself without that, or whose references multiply when written out, is refused.
"""

import re
from collections.abc import Container, Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

import orjson

from serving.gateway.parameters.control import has_control, has_media
from serving.gateway.parameters.patterns import cost, problem
from serving.gateway.parameters.refusals import dotted, wrong
from serving.gateway.settings import Limits

MAX_NODES = 4096  # objects, arrays and values of a schema
MAX_EXPANDED = 20_000  # subschemas after references are written out, each recursion once
MAX_COUNT = 4096  # of minItems, maxLength and the like
MAX_COUNTS = 65_536  # of them all together
MAX_ENUM = 512
MAX_REFERENCES = 256  # different ones
# Of all schemas of a request: what a worker can look at in some 40 ms.
MAX_SCHEMAS = 16  # times the bytes that one may have
MAX_ALL_NODES = 16_384
MAX_PATTERNS = 12_288  # of different patterns, as patterns.cost counts them: their characters, for most
_TYPES = frozenset(("null", "boolean", "object", "array", "number", "integer", "string"))
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
# Keywords by what they hold; those of the first two rows apply to the same value as the schema around them.
_SAME = ("not", "if", "then", "else")
_SAME_LISTS = ("allOf", "anyOf", "oneOf")
_INNER = ("additionalProperties", "unevaluatedProperties", "unevaluatedItems", "additionalItems", "contains",
          "propertyNames")  # fmt: skip
_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_WRITTEN_OUT = _MAPS[:3]  # definitions count where they are used
_REFUSED = ("$id", "id", "$anchor", "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor")

_LISTS = frozenset((*_SAME_LISTS, "prefixItems"))
_ONE = frozenset((*_SAME, *_INNER))
_CHECKED = frozenset((
    "type", *_COUNTS, *_NUMBERS, "enum", "required", "format", "pattern", "$ref", *_LISTS, *_REFUSED, *_MAPS,
    "dependentRequired",
))  # fmt: skip
_INDEX = re.compile(r"0|[1-9][0-9]{0,4}", re.ASCII)

# Where a schema lies: where the one around it lies, and the keys from there.
Place = tuple["Place | None", tuple[object, ...]]


class Spent:
    """What the schemas that were checked so far have used up of what they may hold together."""

    __slots__ = ("nodes", "pattern_cost", "patterns", "size")

    def __init__(self) -> None:
        self.size = self.nodes = self.pattern_cost = 0
        self.patterns: set[str] = set()


def check_schema(schema: dict[str, Any], param: str, limits: Limits, spent: Spent) -> None:
    """Refuses a schema that an engine should not compile, or a worker not look at.

    Args:
        param: the request's field that it is, such as ``response_format.json_schema.schema``.
        spent: by those of the same request before it; this one is added.

    Raises:
        ApiError: 400, ``param`` extended by the place within the schema.
    """
    spent.nodes += _count_nodes(schema, param, limits)
    if spent.nodes > MAX_ALL_NODES:
        message = f"and the schemas before it have more than {MAX_ALL_NODES:,} nodes together"
        raise wrong(param, message, "schema_too_large")
    text = orjson.dumps(schema)
    if len(text) > limits.schema_bytes:
        raise wrong(param, f"has {len(text):,} bytes; {limits.schema_bytes:,} are allowed", "schema_too_large")
    spent.size += len(text)
    if spent.size > MAX_SCHEMAS * limits.schema_bytes:
        message = f"and the schemas before it have more than {MAX_SCHEMAS * limits.schema_bytes:,} bytes together"
        raise wrong(param, message, "schema_too_large")
    decoded = text.decode()
    if has_media(decoded) if limits.control_tokens else has_control(decoded):
        raise wrong(param, "holds something like a control token", "control_token")
    _Guard(schema, param, spent).check()


def _count_nodes(schema: dict[str, Any], param: str, limits: Limits) -> int:
    """Depth and number of nodes, level by level, before anything recurses."""
    level: list[Any] = [schema]
    nodes = 0
    for _ in range(limits.schema_depth):
        inside = [v for node in level for v in (node.values() if isinstance(node, dict) else node)]
        nodes += len(inside)
        if nodes > MAX_NODES:
            raise wrong(param, f"has more than {MAX_NODES:,} nodes", "schema_too_large")
        level = [v for v in inside if isinstance(v, dict | list)]
        if not level:
            return nodes
    raise wrong(param, f"is nested more than {limits.schema_depth} deep", "schema_too_large")


class _Guard:
    """One schema being checked. Nothing here recurses by the client's will: work that is left lies in lists, and no
    object is looked at twice, however many references lead to it."""

    def __init__(self, root: dict[str, Any], param: str, spent: Spent) -> None:
        self.root, self.param, self.spent = root, param, spent
        self.counts = 0
        self.references: dict[str, Any] = {}
        self.seen: dict[int, dict[str, Any]] = {}
        self.left: list[tuple[Any, Place | None]] = [(root, None)]

    def check(self) -> None:
        while self.left:
            self._subschema(*self.left.pop())
        if not self.references:
            return
        self._no_empty_loops()
        self._no_explosion()

    def _wrong(self, place: Place | None, keyword: object, message: str) -> Exception:
        path = [] if keyword is None else [keyword]
        while place is not None:
            place, keys = place
            path += reversed(keys)
        return wrong(dotted([self.param, *reversed(path)]), message, "invalid_schema")

    def _subschema(self, schema: Any, place: Place | None) -> None:
        if isinstance(schema, bool):
            return
        if not isinstance(schema, dict):
            raise self._wrong(place, None, "must be a schema: an object, true or false")
        if id(schema) in self.seen:
            return
        self.seen[id(schema)] = schema
        for keyword, value in schema.items():
            if keyword in _CHECKED:
                self._check_keyword(keyword, value, place)
        if self.counts > MAX_COUNTS:
            raise self._wrong(place, None, f"has lengths and counts that add up to more than {MAX_COUNTS:,}")
        self.left += [(inner, (place, keys)) for inner, keys in _children(schema)]

    def _check_keyword(self, keyword: str, value: Any, place: Place | None) -> None:
        reason = None
        if keyword == "type":
            kinds = value if isinstance(value, list) else [value]
            if not kinds or len(kinds) > len(_TYPES) or not all(isinstance(k, str) and k in _TYPES for k in kinds):
                reason = f"must be one of {', '.join(sorted(_TYPES))}, or an array of these"
        elif keyword in _COUNTS:
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_COUNT:
                reason = f"must be an integer from 0 to {MAX_COUNT:,}"
            else:
                self.counts += value
        elif keyword in _NUMBERS:
            # Booleans are draft 4's exclusiveMinimum.
            if not isinstance(value, int | float):
                reason = "must be a number"
            elif keyword == "multipleOf" and not value > 0:
                reason = "must be above 0"
        elif keyword == "enum":
            if not (isinstance(value, list) and 0 < len(value) <= MAX_ENUM):
                reason = f"must be an array of 1 to {MAX_ENUM} values"
        elif keyword == "required":
            if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
                reason = "must be an array of strings"
        elif keyword == "format":
            if not (isinstance(value, str) and len(value) <= 64):
                reason = "must be a string of at most 64 characters"
        elif keyword == "pattern":
            reason = self._pattern_problem(value)
        elif keyword == "$ref":
            reason = self._reference_problem(value, place)
        elif keyword in _LISTS:
            if not (isinstance(value, list) and value):
                reason = "must be an array of schemas"
        elif keyword in _REFUSED:
            if isinstance(value, str):
                reason = "is not allowed in a schema"
        elif not isinstance(value, dict):
            reason = "must be an object"
        elif keyword == "patternProperties":
            reason = next(filter(None, map(self._pattern_problem, value)), None)
        if reason:
            raise self._wrong(place, keyword, reason)

    def _pattern_problem(self, pattern: Any) -> str | None:
        spent = self.spent
        if not isinstance(pattern, str):
            return problem(pattern)
        if pattern in spent.patterns:  # and was no problem
            return None
        spent.patterns.add(pattern)
        spent.pattern_cost += cost(pattern)
        if spent.pattern_cost > MAX_PATTERNS:
            return f"is beyond the {MAX_PATTERNS:,} characters that the regular expressions of a request may have"
        return problem(pattern)

    def _reference_problem(self, reference: Any, place: Place | None) -> str | None:
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            return 'must be local: "#" or "#/..."'
        if reference in self.references:
            return None
        target: Any = self.root
        for part in reference.split("/")[1:]:
            part = part.replace("~1", "/").replace("~0", "~")
            if isinstance(target, list) and _INDEX.fullmatch(part) and int(part) < len(target):
                target = target[int(part)]
            elif isinstance(target, dict) and part in target:
                target = target[part]
            else:
                return "refers to nothing in the schema"
        if len(self.references) == MAX_REFERENCES:
            return f"is one of more than {MAX_REFERENCES} different references"
        self.references[reference] = target
        self.left.append((target, (place, ("$ref",))))  # it may lie where no schema was looked for
        return None

    def _no_empty_loops(self) -> None:
        """References that come back to themselves without a property or an item between describe nothing."""
        graph = {}
        for key, schema in self.seen.items():
            inner = [schema[keyword] for keyword in _SAME if keyword in schema]
            for keyword in _SAME_LISTS:
                inner += schema.get(keyword, ())
            if "$ref" in schema:
                inner.append(self.references[schema["$ref"]])
            if inner:
                graph[key] = [id(child) for child in inner if isinstance(child, dict)]
        try:
            TopologicalSorter(graph).prepare()
        except CycleError:
            message = "refers to itself without a property or an item between"
            raise self._wrong(None, "$ref", message) from None

    def _no_explosion(self) -> None:
        """Number of subschemas when references are written out, of the whole and of every definition; one within
        itself counts once."""
        sizes: dict[int, int] = {}
        left: list[tuple[Any, list[int] | None]] = [(schema, None) for schema in self.seen.values()]
        while left:
            schema, inside = left.pop()
            if inside is not None:
                sizes[id(schema)] = 1 + sum(sizes.get(key, 1) for key in inside)
            elif id(schema) not in sizes:
                sizes[id(schema)] = 1  # while it is being counted
                if isinstance(schema, dict):
                    children = [child for child, _ in _children(schema, _WRITTEN_OUT)]
                    if "$ref" in schema:
                        children.append(self.references[schema["$ref"]])
                    left.append((schema, [id(child) for child in children]))
                    left += [(child, None) for child in children]
        if max(sizes.values()) > MAX_EXPANDED:
            message = f"has more than {MAX_EXPANDED:,} parts when its $ref are written out"
            raise wrong(self.param, message, "schema_too_large")


def _children(schema: dict[str, Any], maps: Container[str] = _MAPS) -> Iterator[tuple[Any, tuple[object, ...]]]:
    """Subschemas and where they lie. Keywords nobody knows are annotations."""
    for keyword, value in schema.items():
        if keyword in _ONE or (keyword == "items" and not isinstance(value, list)):
            yield value, (keyword,)
        elif keyword in _LISTS or keyword == "items":
            yield from ((inner, (keyword, i)) for i, inner in enumerate(value))
        elif keyword in maps:
            yield from ((inner, (keyword, name)) for name, inner in value.items())
