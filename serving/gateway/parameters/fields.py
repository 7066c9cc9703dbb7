"""Types that the requests' models share. Bounds here hold whatever a model's settings say."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

MAX_SEQUENCES = 128  # answers to one request: n, times the prompts of a completion
MAX_INPUTS = 2048  # texts of one embeddings request
INT64 = 2**63

Id = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Label = Annotated[str, Field(max_length=512)]
Reference = Annotated[str, Field(max_length=256)]  # an id that one message gives and another repeats
StopText = Annotated[str, Field(min_length=1, max_length=1024)]
Schema = Annotated[
    dict[str, Any],
    Field(description="A JSON schema. Its size, depth, patterns and counts are limited; $ref is local."),
]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class Object(BaseModel):
    """A part of a request. What it does not know, it refuses."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


_KINDS: dict[type, str] = {str: "<text>", list: "<list>", dict: "<object>"}


def _kind_of(value: Any) -> str | None:
    return _KINDS.get(type(value))


def either(expected: str) -> Discriminator:
    """Tells a string, an array and an object apart, so that an error is that of the one that was meant."""
    return Discriminator(_kind_of, custom_error_type="wrong_type", custom_error_message=f"must be {expected}")


def by_field(field: str, tags: Mapping[str | None, str]) -> Discriminator:
    """Tells objects apart by the value of one of their fields; ``None`` is the tag without it."""

    def tag(value: Any) -> str | None:
        if not isinstance(value, dict):
            return None
        name = value.get(field)
        return tags.get(name) if name is None or isinstance(name, str) else None

    names = ", ".join(name for name in tags if name)
    return Discriminator(
        tag, custom_error_type="wrong_kind", custom_error_message=f"must be an object whose {field} is one of: {names}"
    )  # fmt: skip


def _is_false(value: Any) -> Any:
    if value is not False:  # to Python, 0 is the same
        raise PydanticCustomError("unsupported", "must be false")
    return value


No = Annotated[Literal[False], BeforeValidator(_is_false)]
Stop = Annotated[
    Annotated[StopText, Tag("<text>")]
    | Annotated[list[StopText], Field(max_length=128, fail_fast=True), Tag("<list>")],
    either("a string or an array of strings"),
]
LogitBias = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
    Field(
        max_length=1024,
        description="Token ids, as strings, and what is added to their logits.",
        json_schema_extra={"additionalProperties": False},
    ),
]
Ids = Annotated[list[Id], Field(max_length=1024, fail_fast=True)]


class StreamOptions(Object):
    include_usage: bool | None = None
    include_obfuscation: bool | None = Field(None, description="Accepted; streams have no padding.")
    continuous_usage_stats: bool | None = None


class Sampling(Object):
    """What all routes that generate have."""

    model: str = Field(min_length=1, max_length=256)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    stream: bool | None = None


class Tuning(Sampling):
    """Sampling parameters of OpenAI and vLLM that cost the engine nothing."""

    min_p: float | None = Field(None, ge=0, le=1)
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: float | None = Field(None, ge=0.01, le=10)
    logit_bias: LogitBias | None = None
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    stop: Stop | None = Field(None, description="At most as many as the model's settings allow (16 by default).")
    stop_token_ids: Ids | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    user: Label | None = None


class Completing(Tuning):
    """What chat and completions share."""

    max_tokens: int | None = Field(
        None, ge=0, lt=2**31, description="At most what the model holds, or what its settings allow; 0 with echo only."
    )
    min_tokens: int | None = Field(None, ge=0, lt=2**31, description="At most max_tokens.")
    n: int | None = Field(
        None, ge=1, le=MAX_SEQUENCES, description="At most what the model's settings allow (8 by default)."
    )
    stream_options: StreamOptions | None = Field(None, description="Only with stream.")
    echo: bool | None = None
    add_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=2**31)
    truncation_side: Literal["left", "right"] | None = None
    allowed_token_ids: Annotated[list[Id], Field(min_length=1, max_length=4096, fail_fast=True)] | None = None
    bad_words: Annotated[list[StopText], Field(max_length=128, fail_fast=True)] | None = None
    prompt_logprobs: int | None = Field(
        None, ge=0, le=1000, description="At most what the model's settings allow (20 by default); not with stream."
    )
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None


class TextFormat(Object):
    type: Literal["text"]


class ObjectFormat(Object):
    type: Literal["json_object"]


class JsonSchema(Object):
    name: Name
    description: Annotated[str, Field(max_length=4096)] | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Object):
    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[ObjectFormat, Tag("<object>")]
    | Annotated[SchemaFormat, Tag("<schema>")],
    by_field("type", {"text": "<text>", "json_object": "<object>", "json_schema": "<schema>"}),
]


def requires(field: str, condition: dict[str, Any], other: str, value: Any = None) -> dict[str, Any]:
    """A rule of a schema: where ``field`` meets a condition, ``other`` must be there (with that value)."""
    needed = {"const": value} if value is not None else {"not": {"type": "null"}}
    return {
        "if": {"required": [field], "properties": {field: condition}},
        "then": {"required": [other], "properties": {other: needed}},
    }
