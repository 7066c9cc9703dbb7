"""Reading a settings file, and saying what is wrong in it: YAML or JSON, one line per problem, with the key's name.

Stricter than YAML has to be: no key twice, no tags, numbers and booleans as in YAML 1.2 (``1e-3`` is a number, ``no``
is text), keys always text.
"""

import difflib
import json
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

try:  # ten times as quick; reading holds up a worker's requests
    from yaml import CSafeLoader as _Yaml
except ImportError:
    from yaml import SafeLoader as _Yaml

MAX_BYTES = 4 * 2**20
_MAX_DEPTH = 32
_SHOWN = 20
_TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
_MESSAGES = {
    "greater_than_equal": "must be at least {ge:g}",
    "greater_than": "must be above {gt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "model_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "tuple_type": "must be a list",
    "frozen_set_type": "must be a list",
}


class Problems(ValueError):
    """Several faults found together. Each is a sentence that begins with the key, relative to where it is raised."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("\n".join(lines))
        self.lines = list(lines)


class _Loader(_Yaml):
    """Without YAML 1.1's dates, sexagesimal numbers, octals, and booleans such as ``off``."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}


for _name, _pattern, _first in (
    ("merge", r"<<", "<"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9_]{0,18})", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
     "-+.0123456789"),
):  # fmt: skip
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"(?:{_pattern})$"), list(_first))


def read(path: Path) -> bytes:
    """What the file holds, as JSON.

    Raises:
        ValueError: it is no regular file, too large, not UTF-8, or not YAML; the message names the file and the line.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path}: must be a regular file")
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"{path}: must be at most {MAX_BYTES // 2**20} MiB")
    try:
        text = content.decode("utf-8-sig")
        # JSON is YAML, but for its tabs and some escapes.
        data = json.loads(text, object_pairs_hook=_pairs) if path.suffix == ".json" else _parse(text)
        if data is None:
            raise ValueError("is empty")
        return _encode(data)
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: must be UTF-8 text; byte {e.start} is not") from None
    except json.JSONDecodeError as e:
        raise ValueError(f"{path}: line {e.lineno}: {e.msg}") from None
    except yaml.MarkedYAMLError as e:
        line = f"line {e.problem_mark.line + 1}: " if e.problem_mark else ""
        raise ValueError(f"{path}: {line}{e.problem or e.context}") from None
    except yaml.YAMLError as e:  # a character that YAML does not allow
        raise ValueError(f"{path}: {str(e).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError(f"{path}: nested too deeply") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def _parse(text: str) -> Any:
    depth = 0
    for event in yaml.parse(text, _Loader):  # libyaml composes nodes recursively, and crashes with too many
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            raise ValueError(f"line {event.start_mark.line + 1}: nested too deeply")
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _check_nodes(root: yaml.Node) -> None:
    """Refuses what would be lost or misread when the nodes become objects, and makes every key text."""
    waiting, seen = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        line = node.start_mark.line + 1
        if node.tag not in _TAGS:
            raise ValueError(f"line {line}: the tag {node.tag.removeprefix('tag:yaml.org,2002:')!r} has no use here")
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            keys: set[str] = set()
            for key, value in node.value:
                line = key.start_mark.line + 1
                if not isinstance(key, yaml.ScalarNode):
                    raise ValueError(f"line {line}: a key must be text")
                if key.value in keys:
                    raise ValueError(f"line {line}: {key.value} is given twice")
                keys.add(key.value)
                if key.tag != "tag:yaml.org,2002:merge":
                    key.tag = "tag:yaml.org,2002:str"
                inside.append(value)
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        waiting += [child for child in inside if id(child) not in seen]
        seen.update(map(id, inside))


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is given twice")
        found[key] = value
    return found


def _encode(data: Any) -> bytes:
    """As JSON. YAML's references can stand for far more than the file's bytes, so its length is bounded again."""
    pieces: list[str] = []
    length = 0
    for piece in json.JSONEncoder(ensure_ascii=False).iterencode(data):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_BYTES:
            raise ValueError("its references (*name) repeat too much")
    return "".join(pieces).encode()


def explain(error: ValidationError, schema: type[BaseModel]) -> list[str]:
    """One sentence per problem, beginning with the dotted key. Values that may be secret are not repeated."""
    lines: list[str] = []
    for problem in error.errors(include_url=False):
        where = [part for part in problem["loc"] if part not in ("<name>", "<shares>")]
        key = ""
        for part in where:
            key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else part
        kind, context = problem["type"], problem.get("ctx", {})
        cause = context.get("error")
        if isinstance(cause, Problems):
            lines += [f"{key}.{line}" if key else line for line in cause.lines]
        elif kind == "value_error":
            lines.append(f"{key} {cause}".strip())
        elif kind == "extra_forbidden":
            lines.append(f"{key} is not known; {_suggestion(where, schema)}")
        elif kind == "missing":
            lines.append(f"{key} is missing")
        else:
            wanted = _MESSAGES[kind].format(**context) if kind in _MESSAGES else problem["msg"]
            lines.append(f"{key or 'the file'} {wanted}, got {_shown(problem['input'])}")
    return lines[:_SHOWN] + ([f"and {len(lines) - _SHOWN} more problems"] if len(lines) > _SHOWN else [])


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, bool | str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _suggestion(where: Sequence[int | str], schema: type[BaseModel]) -> str:
    known = list(_section(where[:-1], schema).model_fields)
    near = difflib.get_close_matches(str(where[-1]), known, 1)
    return f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}"


def _section(where: Sequence[int | str], schema: type[BaseModel]) -> type[BaseModel]:
    """The section at that place. Names of models and positions in lists lie between a field and its section."""
    parts = iter(where)
    for part in parts:
        annotation = schema.model_fields[str(part)].annotation
        inner = next(_sections(annotation))
        if annotation is not inner:
            next(parts)
        schema = inner
    return schema


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _sections(argument)
