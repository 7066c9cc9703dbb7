"""Fields of vLLM that a model's settings may allow, and those that nothing can."""

from collections.abc import Mapping
from typing import Annotated, Any

import orjson
from pydantic import BeforeValidator, Field, StrictBool, StrictStr, TypeAdapter, ValidationError
from pydantic_core import PydanticCustomError

from serving.gateway.errors import ApiError
from serving.gateway.parameters.conversation import check_text
from serving.gateway.parameters.fields import INT64, Id, Object
from serving.gateway.parameters.patterns import check_pattern
from serving.gateway.parameters.refusals import from_validation, unknown, wrong
from serving.gateway.parameters.schemas import Spent, check_schema
from serving.gateway.settings import Limits

# Code or templates to run, memory to take over, hosts to connect to: whatever the settings say.
NEVER: frozenset[str] = frozenset((
    "chat_template", "prompt_embeds", "mm_payload", "mm_processor_kwargs", "media_io_kwargs", "return_mm_kwargs",
    "kv_transfer_params", "ec_transfer_params", "vllm_xargs", "logits_processors", "structural_tag", "extra_args",
    "guided_decoding_backend", "previous_input_messages", "enable_response_messages",
))  # fmt: skip


def _is_scalar(value: Any) -> Any:
    if not isinstance(value, bool | int | float | str) or (isinstance(value, str) and len(value) > 1024):
        raise PydanticCustomError("wrong_type", "must be a boolean, a number or a string of at most 1,024 characters")
    return value


_Scalar = Annotated[Any, BeforeValidator(_is_scalar)]
_Short = Annotated[str, Field(strict=True, min_length=1, max_length=1024)]
_Int64 = Annotated[int, Field(strict=True, ge=-INT64, lt=INT64)]


class StructuredOutputs(Object):
    """Of its fields, exactly one."""

    json_: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[_Short], Field(min_length=1, max_length=512)] | None = None
    grammar: Annotated[str, Field(max_length=16_384)] | None = None
    json_object: bool | None = None


class RepetitionDetection(Object):
    max_pattern_size: int | None = Field(None, ge=0, le=4096)
    min_pattern_size: int | None = Field(None, ge=0, le=4096)
    min_count: int | None = Field(None, ge=0, le=4096)


_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    "structured_outputs": TypeAdapter(StructuredOutputs),
    "use_beam_search": TypeAdapter(StrictBool),
    "length_penalty": TypeAdapter(Annotated[float, Field(strict=True, ge=-10, le=10, allow_inf_nan=False)]),
    "best_of": TypeAdapter(Annotated[int, Field(strict=True, ge=1)]),
    "priority": TypeAdapter(_Int64),
    "request_id": TypeAdapter(Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]),
    "session_id": TypeAdapter(Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_.:-]{1,128}$")]),
    "cache_salt": TypeAdapter(_Short),
    # Flat: a template that loops over what a request brings has kept a renderer busy for ever.
    "chat_template_kwargs": TypeAdapter(Annotated[dict[_Short, _Scalar | None], Field(max_length=32)]),
    "documents": TypeAdapter(Annotated[list[dict[_Short, StrictStr]], Field(max_length=256, fail_fast=True)]),
    "logprob_token_ids": TypeAdapter(
        Annotated[list[Annotated[Id, Field(strict=True)]], Field(max_length=128, fail_fast=True)]
    ),
    "thinking_token_budget": TypeAdapter(Annotated[int, Field(strict=True, ge=-1, lt=2**31)]),
    "stream_interval": TypeAdapter(Annotated[int, Field(strict=True, ge=1, lt=2**31)]),
    "repetition_detection": TypeAdapter(RepetitionDetection),
}
# Any other server's: a value, or a list of values.
_VALUES: TypeAdapter[Any] = TypeAdapter(Annotated[list[_Scalar], Field(strict=True, max_length=1024, fail_fast=True)])
_VALUE: TypeAdapter[Any] = TypeAdapter(_Scalar)

OPTIONAL: frozenset[str] = frozenset(_ADAPTERS)


def take(request: Mapping[str, Any], names: set[str], limits: Limits, spent: Spent) -> dict[str, Any]:
    """Those of a request's further fields that go upstream.

    Args:
        names: fields that the route's model does not have.
        spent: by the request's schemas, of what they may hold together.

    Raises:
        ApiError: 400, one is not allowed, or its value is wrong.
    """
    taken = {}
    for name in request:  # in the request's order: the first mistake is the one reported
        if name not in names:
            continue
        if name in NEVER or name not in limits.allow:
            if name not in OPTIONAL:
                raise unknown(name)
            if request[name] is None:
                continue
            raise ApiError(400, f"the parameter {name} is not allowed for this model", "unknown_parameter", name)
        value = request[name]
        if value is None:
            continue
        try:
            _ADAPTERS.get(name, _VALUES if isinstance(value, list) else _VALUE).validate_python(value)
        except ValidationError as e:
            raise from_validation(e, (name,)) from None
        _bound(name, value, limits, spent)
        taken[name] = value
    return taken


def _bound(name: str, value: Any, limits: Limits, spent: Spent) -> None:
    if name == "best_of" and value > limits.n:
        raise wrong(name, f"must be at most {limits.n}, not {value}")
    if name in ("documents", "chat_template_kwargs"):  # templates render them
        check_text(orjson.dumps(value).decode(), name, limits)
    if name == "structured_outputs":
        given = [field for field, inner in value.items() if inner is not None]
        if len(given) != 1:
            raise wrong(name, "must have exactly one of json, regex, choice, grammar and json_object")
        if value.get("json") is not None:
            check_schema(value["json"], f"{name}.json", limits, spent)
        if value.get("regex") is not None:
            check_pattern(value["regex"], f"{name}.regex")
