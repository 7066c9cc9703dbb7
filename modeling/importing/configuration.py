"""A published configuration, in whichever names it has, as one of ours; what it lacks is read off the tensors.

Configurations come from files that anyone may have written: every value is looked at before a model is built of it.
"""

import difflib
import functools
import inspect
import json
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modeling.importing.layout import Shapes
from modeling.importing.recognition import Recognised

# Settings that have no bearing on what the model computes here, or that are dealt with elsewhere.
HARMLESS = frozenset((
    "model_type", "architectures", "auto_map", "torch_dtype", "dtype", "transformers_version", "_name_or_path",
    "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout",
    "attention_probs_dropout_prob", "attn_dropout", "head_size", "tokenizer_type", "tiktoken_model", "name", "license",
))  # fmt: skip
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
LARGEST = 2**31 - 1


@dataclass
class Gathered:
    """What is known of a configuration.

    Attributes:
        values: fields of ours.
        origins: field -> where its value is from, in words.
        missing: fields that nothing tells -> how to find out.
        warnings: what the user should know.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def gather(found: Recognised, given: Mapping[str, Any] | None, settings: Mapping[str, Any], shapes: Shapes) -> Gathered:
    """Collects the fields, of descending authority: ``settings``, ``given``, the tensors, the layout's defaults.

    Args:
        given: the configuration as published.
        settings: what the user gave beside, in published names or ours.
        shapes: bare name -> shape.

    Raises:
        ValueError: a value is of a wrong type or size, or contradicts another.
    """
    layout, fields = found.layout, _fields(found.arch.config_class())
    result = Gathered()
    published = _translate(found, given or {}, "the configuration", result.warnings, strict=False)
    chosen = _translate(found, settings, "--set", result.warnings, strict=True)
    # Two ways to say the same: what is chosen must not meet what was published in the other way.
    if "num_key_value_heads" in chosen:
        published.pop("gqa_groups", None)
    if "gqa_groups" in chosen:
        published.pop("num_key_value_heads", None)
    zero = getattr(found.arch.config_class(), "may_be_zero", ())
    for name, value in (published | chosen).items():
        if name in fields:
            _check(name, value, fields[name], zero=name in zero)
    result.values = layout.settle(published | chosen)
    for name, value in result.values.items():
        _check(name, value, fields[name], zero=name in zero)
        result.origins[name] = "--set" if name in chosen else "the configuration"
    sizes = layout.sizes(shapes, result.values)
    doubtful = set(layout.doubtful(given or {})) - set(chosen)
    for name, size in sizes.items():
        if name in result.values and not (name in doubtful and result.values[name] != size):
            continue
        if name in result.values:
            result.warnings.append(
                f"the configuration says {name} = {result.values[name]}, the tensors have {size}: the tensors are right"
            )
        result.values[name], result.origins[name] = size, "the tensors"
    for name, value in layout.defaults.items():
        if name not in result.values:
            result.values[name], result.origins[name] = value, "as published"
    for name, annotation in fields.items():
        if annotation is int and name not in result.values:
            result.missing[name] = layout.asked.get(name, "no tensor in the file tells it")
    for name, other in layout.derived.items():
        if other in result.missing:
            result.missing.pop(name, None)
    if (layers := result.values.get("num_hidden_layers", 1)) > len(shapes):
        raise ValueError(
            f"num_hidden_layers is {layers} ({result.origins['num_hidden_layers']}), but the file has only "
            f"{len(shapes)} tensors"
        )
    return result


def build(found: Recognised, gathered: Gathered) -> Any:
    """The configuration object.

    Raises:
        ValueError: fields are missing (the message says which ``--set`` to add), or do not fit together.
    """
    if gathered.missing:
        wanted = "; ".join(f"{name}: {how}" for name, how in gathered.missing.items())
        options = " ".join(f"--set {name}=..." for name in gathered.missing)
        raise ValueError(
            f"neither the configuration nor the tensors of this {found.arch.model_type} tell "
            f"{' and '.join(gathered.missing)}. Give {'it' if len(gathered.missing) == 1 else 'them'} with {options} "
            f"({wanted})"
        )
    tokens = {name: None for name in TOKENS}
    try:
        return found.arch.config_class()(**(tokens | gathered.values))
    except ValueError:
        raise
    except Exception as e:  # transformers checks types with errors of its own
        raise ValueError(f"the configuration is refused: {' '.join(str(e).split())[:300]}") from None


def parse_settings(pairs: list[str] | None) -> dict[str, Any]:
    """``["num_attention_heads=8", "causal=true"]`` as a dictionary; values are JSON, or else strings.

    Raises:
        ValueError: a pair has no ``=``.
    """
    settings = {}
    for pair in pairs or []:
        name, equals, text = pair.partition("=")
        if not equals or not name.strip():
            raise ValueError(f"--set takes KEY=VALUE, such as --set num_attention_heads=8; got {pair!r}")
        try:
            settings[name.strip()] = json.loads(text)
        except (ValueError, RecursionError):
            settings[name.strip()] = text.strip()
    return settings


def contradictions(found: Recognised, gathered: Gathered, shapes: Shapes) -> list[str]:
    """Fields for which the tensors tell another value than the one they were given."""
    sizes = found.layout.sizes(shapes, gathered.values)
    return [
        f"{gathered.origins[name]} says {name} = {gathered.values[name]}, the tensors say {size}"
        for name, size in sizes.items()
        if gathered.values.get(name) != size
    ]


def _fields(config_class: Any) -> dict[str, Any]:
    """The fields that an architecture's configuration adds to Hugging Face's, and their types."""
    from transformers import PreTrainedConfig

    fields: dict[str, Any] = {}
    for cls in reversed(config_class.__mro__):
        if issubclass(cls, PreTrainedConfig) and cls is not PreTrainedConfig:
            fields |= inspect.get_annotations(cls)
    return {name: kind for name, kind in fields.items() if name not in TOKENS and typing.get_origin(kind) is not
            typing.ClassVar}  # fmt: skip


def _translate(
    found: Recognised, given: Mapping[str, Any], where: str, warnings: list[str], *, strict: bool
) -> dict[str, Any]:
    """Settings under our names; those that mean nothing here are left out, with a warning, or refused."""
    layout, fields = found.layout, _fields(found.arch.config_class())
    known = {**layout.aliases, **{name: name for name in fields}}
    ignorable = HARMLESS | _inherited()
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, value in given.items():
        if name not in known:
            if strict:
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"{where}: a {found.arch.model_type} has no setting {name!r}"
                    + (f"; did you mean {near[0]}?" if near else f"; it has {', '.join(fields)}")
                )
            if name not in ignorable:
                warnings.append(f"{where} has {name[:80]!r}, which means nothing here and is ignored")
            continue
        target = known[name]
        if value is None:
            continue
        if target in values and values[target] != value:
            raise ValueError(
                f"{where} contradicts itself: {sources[target]} = {_short(values[target])} and {name} = "
                f"{_short(value)} are the same setting"
            )
        values[target], sources[target] = value, name
    return values


@functools.cache
def _inherited() -> frozenset[str]:
    from transformers import PreTrainedConfig

    return frozenset(PreTrainedConfig().to_dict())


def _check(name: str, value: Any, annotation: Any, *, zero: bool) -> None:
    union = isinstance(annotation, types.UnionType)
    kinds = set(typing.get_args(annotation)) if union else {annotation}
    wanted = ""
    if int in kinds:
        if isinstance(value, bool) or not isinstance(value, int) or not (not zero) <= value <= LARGEST:
            wanted = f"a whole number from {0 if zero else 1} to {LARGEST}"
    elif float in kinds:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
            wanted = "a number that is not negative"
        elif name.endswith("_eps") and not 0 < value < 1:
            wanted = "a number between 0 and 1"
    elif bool in kinds and not isinstance(value, bool):
        wanted = "true or false"
    elif str in kinds and not isinstance(value, str):
        wanted = "a string"
    elif name == "rope_parameters" and isinstance(value, dict):
        theta = value.get("rope_theta", 10000.0)
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 1 < theta < 1e12:
            wanted = "a dictionary whose rope_theta is a number above 1"
    if wanted and not (value is None and type(None) in kinds):
        raise ValueError(f"{name} must be {wanted}, got {_short(value)}")


def _short(value: Any) -> str:
    """What a value looks like, however large or nested it is."""
    if isinstance(value, int) and not -(10**30) < value < 10**30:
        return "a number of more than 30 digits"
    if isinstance(value, str):
        return repr(value[:60])
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"a {type(value).__name__}"
