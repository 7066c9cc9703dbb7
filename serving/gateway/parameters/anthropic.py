"""``/v1/messages``: Anthropic's shape of a conversation."""

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from serving.gateway.parameters.fields import (
    Label,
    Name,
    Object,
    Reference,
    Sampling,
    Schema,
    StopText,
    by_field,
    either,
)
from serving.gateway.parameters.messages import MAX_MESSAGES


class CacheControl(Object):
    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Object):
    cache_control: CacheControl | None = Field(None, description="Accepted; engines cache every prefix.")


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


class ImageSource(Object):
    type: Literal["base64"]
    media_type: Literal["image/png", "image/jpeg", "image/webp", "image/gif"]
    data: str


class ImageBlock(Block):
    """Only where the model's settings allow images."""

    type: Literal["image"]
    source: ImageSource


class ThinkingBlock(Object):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: Reference
    name: Name
    input: dict[str, Any]


_Text = Annotated[TextBlock, Tag("<text>")]
_TextBlocks = Annotated[list[TextBlock], Field(min_length=1, max_length=1024, fail_fast=True)]
TextContent = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[_TextBlocks, Tag("<list>")], either("a string or an array of text blocks")
]


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: Reference
    content: TextContent | None = None
    is_error: bool | None = None


_Blocks = Annotated[
    list[
        Annotated[
            _Text
            | Annotated[ImageBlock, Tag("<image>")]
            | Annotated[ThinkingBlock, Tag("<thinking>")]
            | Annotated[ToolUseBlock, Tag("<use>")]
            | Annotated[ToolResultBlock, Tag("<result>")],
            by_field(
                "type",
                {
                    "text": "<text>",
                    "image": "<image>",
                    "thinking": "<thinking>",
                    "tool_use": "<use>",
                    "tool_result": "<result>",
                },
            ),
        ]
    ],
    Field(min_length=1, max_length=1024, fail_fast=True),
]


class AnthropicMessage(Object):
    role: Literal["user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[_Blocks, Tag("<list>")], either("a string or an array of blocks")
    ]


class AnthropicTool(Object):
    type: Literal["custom"] | None = None
    name: Name
    description: Annotated[str, Field(max_length=16_384)] | None = None
    input_schema: Schema
    strict: bool | None = None
    cache_control: CacheControl | None = None


class AnyToolChoice(Object):
    type: Literal["auto", "any", "none"]
    disable_parallel_tool_use: bool | None = None


class NamedToolChoice(Object):
    type: Literal["tool"]
    name: Name
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Object):
    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(Object):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Thinking(Object):
    type: Literal["enabled"]
    budget_tokens: int = Field(ge=1024, lt=2**31)


class OtherThinking(Object):
    type: Literal["disabled", "adaptive"]


class UserMetadata(Object):
    user_id: Label | None = None


class MessagesRequest(Sampling):
    """``/v1/messages``."""

    messages: Annotated[
        list[AnthropicMessage],
        Field(
            min_length=1,
            max_length=MAX_MESSAGES,
            description="At most what the model's settings allow (2048).",
            fail_fast=True,
        ),
    ]
    max_tokens: int = Field(ge=1, lt=2**31, description="At most what the model holds, or what its settings allow.")
    system: TextContent | None = None
    stop_sequences: Annotated[list[StopText], Field(max_length=128, fail_fast=True)] | None = Field(
        None, description="At most as many as the model's settings allow (16 by default)."
    )
    tools: (
        Annotated[
            list[AnthropicTool],
            Field(max_length=1024, description="At most what the model's settings allow (64).", fail_fast=True),
        ]
        | None
    ) = None
    tool_choice: (
        Annotated[
            Annotated[AnyToolChoice, Tag("<any>")] | Annotated[NamedToolChoice, Tag("<tool>")],
            by_field("type", {"auto": "<any>", "any": "<any>", "none": "<any>", "tool": "<tool>"}),
        ]
        | None
    ) = None
    output_config: OutputConfig | None = None
    thinking: (
        Annotated[
            Annotated[Thinking, Tag("<enabled>")] | Annotated[OtherThinking, Tag("<other>")],
            by_field("type", {"enabled": "<enabled>", "disabled": "<other>", "adaptive": "<other>"}),
        ]
        | None
    ) = None
    # What Anthropic's clients send; no engine needs it.
    metadata: UserMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
