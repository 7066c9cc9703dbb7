"""What each route takes: models for validation and for the OpenAPI document."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from serving.gateway.parameters import anthropic, responses
from serving.gateway.parameters.fields import (
    MAX_INPUTS,
    MAX_SEQUENCES,
    Completing,
    Effort,
    Label,
    No,
    Object,
    ResponseFormat,
    requires,
)
from serving.gateway.parameters.messages import Messages, ToolChoice, Tools

Metadata = Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)]
ServiceTier = Literal["auto", "default", "flex", "scale", "priority"]


def _texts_or_ids(most: int, least: int = 0) -> dict[str, Any]:
    """The schema of a prompt. Validation is by hand (text.py): a hundred thousand ids cost pydantic a copy."""
    ids = {
        "type": "array",
        "items": {"type": "integer", "minimum": 0, "exclusiveMaximum": 2**31},
        "minItems": 1,
        "description": "Token ids of the model's vocabulary.",
    }
    text = {"type": "string", "minLength": least}
    lists = [{"type": "array", "items": kind, "minItems": 1, "maxItems": most} for kind in (text, ids)]
    return {"anyOf": [text, ids, *lists]}


class ChatRequest(Completing):
    """``/v1/chat/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                requires("stream_options", {"type": "object"}, "stream", True),
                requires("top_logprobs", {"type": "integer"}, "logprobs", True),
                requires("tool_choice", {"not": {"enum": [None, "none"]}}, "tools"),
            ]
        }
    )
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31, description="As max_tokens, and goes before it.")
    max_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="At most what the model holds, or what its settings allow."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(
        None, ge=0, le=1000, description="At most what the model's settings allow (20 by default); needs logprobs."
    )
    response_format: ResponseFormat | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = Field(None, description="Other than none, only with tools.")
    parallel_tool_calls: bool | None = None
    reasoning_effort: Effort | None = None
    include_reasoning: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    # What OpenAI's clients send; no engine needs it.
    metadata: Metadata | None = None
    modalities: Annotated[list[Literal["text"]], Field(max_length=1)] | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    safety_identifier: Label | None = None
    service_tier: ServiceTier | None = None
    store: No | None = None


class CompletionRequest(Completing):
    """``/v1/completions``."""

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                requires("stream_options", {"type": "object"}, "stream", True),
                requires("max_tokens", {"const": 0}, "echo", True),
            ]
        }
    )
    prompt: Annotated[Any, WithJsonSchema(_texts_or_ids(MAX_SEQUENCES))] = Field(
        description=f"A text, token ids, or several of either: prompts times n may be {MAX_SEQUENCES}."
    )
    logprobs: int | None = Field(
        None, ge=0, le=1000, description="At most what the model's settings allow (20 by default)."
    )
    suffix: str | None = None
    response_format: ResponseFormat | None = None


class EmbeddingRequest(Object):
    """``/v1/embeddings``."""

    model: str = Field(min_length=1, max_length=256)
    input: Annotated[Any, WithJsonSchema(_texts_or_ids(MAX_INPUTS, 1))]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1, le=65_536)
    truncate_prompt_tokens: int | None = Field(None, ge=-1, lt=2**31)
    add_special_tokens: bool | None = None
    user: Label | None = None


class TokenizeRequest(Object):
    """``/tokenize``: of a prompt or of messages."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"required": [one], "properties": {one: {"not": {"type": "null"}}, **{n: {"type": "null"} for n in no}}}
                for one, no in (
                    ("prompt", ("messages", "tools", "add_generation_prompt", "continue_final_message")),
                    ("messages", ("prompt",)),
                )
            ]
        }
    )
    model: str = Field(min_length=1, max_length=256)
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    tools: Tools | None = None


ROUTES: Mapping[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/v1/responses": responses.ResponsesRequest,
    "/v1/messages": anthropic.MessagesRequest,
    "/tokenize": TokenizeRequest,
}
