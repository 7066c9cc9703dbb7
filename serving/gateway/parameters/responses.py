"""``/v1/responses``: a text, or the items of a conversation."""

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from serving.gateway.parameters.fields import (
    Effort,
    Label,
    Name,
    No,
    Object,
    Reference,
    Schema,
    Tuning,
    by_field,
    either,
)
from serving.gateway.parameters.messages import DATA_URL, MAX_MESSAGES

Status = Literal["in_progress", "completed", "incomplete"]


class InputText(Object):
    type: Literal["input_text"]
    text: str


class OutputText(Object):
    type: Literal["output_text"]
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: Annotated[list[Any], Field(max_length=0)] | None = None


class InputImage(Object):
    """Only where the model's settings allow images."""

    type: Literal["input_image"]
    image_url: str = Field(pattern=DATA_URL, description="The image itself as a data: URL; nothing is ever fetched.")
    detail: Literal["auto", "low", "high"] | None = None


Parts = Annotated[
    list[
        Annotated[
            Annotated[InputText, Tag("<input>")]
            | Annotated[OutputText, Tag("<output>")]
            | Annotated[InputImage, Tag("<image>")],
            by_field("type", {"input_text": "<input>", "output_text": "<output>", "input_image": "<image>"}),
        ]
    ],
    Field(min_length=1, max_length=1024, fail_fast=True),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[Parts, Tag("<list>")], either("a string or an array of parts")
]


class MessageItem(Object):
    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: Reference | None = None
    status: Status | None = None


class FunctionCall(Object):
    type: Literal["function_call"]
    call_id: Reference
    name: Name
    arguments: str
    id: Reference | None = None
    status: Status | None = None


class FunctionOutput(Object):
    type: Literal["function_call_output"]
    call_id: Reference
    output: str
    id: Reference | None = None
    status: Status | None = None


Items = Annotated[
    list[
        Annotated[
            Annotated[MessageItem, Tag("<message>")]
            | Annotated[FunctionCall, Tag("<call>")]
            | Annotated[FunctionOutput, Tag("<output>")],
            by_field(
                "type",
                {
                    None: "<message>",
                    "message": "<message>",
                    "function_call": "<call>",
                    "function_call_output": "<output>",
                },
            ),
        ]
    ],
    Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="At most what the model's settings allow (2048).",
        fail_fast=True,
    ),
]


class PlainFormat(Object):
    type: Literal["text", "json_object"]


class ResponsesSchemaFormat(Object):
    type: Literal["json_schema"]
    name: Name
    schema_: Schema = Field(alias="schema")
    description: Annotated[str, Field(max_length=4096)] | None = None
    strict: bool | None = None


class ResponsesText(Object):
    format: (
        Annotated[
            Annotated[PlainFormat, Tag("<plain>")] | Annotated[ResponsesSchemaFormat, Tag("<schema>")],
            by_field("type", {"text": "<plain>", "json_object": "<plain>", "json_schema": "<schema>"}),
        ]
        | None
    ) = None


class ResponsesTool(Object):
    type: Literal["function"]
    name: Name
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class ResponsesNamedTool(Object):
    type: Literal["function"]
    name: Name


class Reasoning(Object):
    effort: Effort | None = None
    summary: None = None


class ResponsesStreamOptions(Object):
    include_obfuscation: bool | None = Field(None, description="Accepted; streams have no padding.")


class ResponsesRequest(Tuning):
    """``/v1/responses``. Answers are not stored, and not computed in the background."""

    input: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[Items, Tag("<list>")], either("a string or an array of items")
    ]
    instructions: str | None = None
    max_output_tokens: int | None = Field(
        None, ge=1, lt=2**31, description="At most what the model holds, or what its settings allow."
    )
    text: ResponsesText | None = None
    tools: (
        Annotated[
            list[ResponsesTool],
            Field(
                max_length=1024,
                description="Functions only, at most what the model's settings allow (64).",
                fail_fast=True,
            ),
        ]
        | None
    ) = None
    tool_choice: (
        Annotated[
            Annotated[Literal["none", "auto", "required"], Tag("<text>")]
            | Annotated[ResponsesNamedTool, Tag("<object>")],
            either('"none", "auto", "required" or an object that names a function'),
        ]
        | None
    ) = None
    parallel_tool_calls: bool | None = None
    reasoning: Reasoning | None = None
    include_reasoning: bool | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=8)] | None = None
    top_logprobs: int | None = Field(
        None, ge=0, le=1000, description="At most what the model's settings allow (20 by default)."
    )
    metadata: Annotated[dict[Annotated[str, Field(max_length=64)], Label], Field(max_length=16)] | None = None
    truncation: Literal["disabled"] | None = None
    # What OpenAI's clients send; no engine needs it.
    stream_options: ResponsesStreamOptions | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    safety_identifier: Label | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority"] | None = None
    store: No | None = Field(None, description="Answers are never stored.")
    background: No | None = None
    previous_response_id: None = None
