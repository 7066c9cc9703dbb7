"""Messages of a conversation and the tools it may call, in OpenAI's shape."""

from typing import Annotated, Any, Literal

from pydantic import Field, Tag

from serving.gateway.parameters.fields import Name, Object, Reference, Schema, by_field, either

DATA_URL = r"^data:image/(png|jpeg|webp|gif);base64,"
MAX_MESSAGES = 65_536
Author = Annotated[str, Field(min_length=1, max_length=64)]


class TextPart(Object):
    type: Literal["text"]
    text: str


class RefusalPart(Object):
    type: Literal["refusal"]
    refusal: str


class ImageUrl(Object):
    url: str = Field(pattern=DATA_URL, description="The image itself as a data: URL; nothing is ever fetched.")
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Object):
    """Only where the model's settings allow images."""

    type: Literal["image_url"]
    image_url: ImageUrl


_Text = Annotated[TextPart, Tag("<text>")]
TextParts = Annotated[
    list[Annotated[_Text | Annotated[RefusalPart, Tag("<refusal>")],
                   by_field("type", {"text": "<text>", "refusal": "<refusal>"})]],
    Field(min_length=1, max_length=1024, fail_fast=True),
]  # fmt: skip
Parts = Annotated[
    list[Annotated[_Text | Annotated[ImagePart, Tag("<image>")],
                   by_field("type", {"text": "<text>", "image_url": "<image>"})]],
    Field(min_length=1, max_length=1024, fail_fast=True),
]  # fmt: skip
_EXPECTED = either("a string or an array of parts")
TextContent = Annotated[Annotated[str, Tag("<text>")] | Annotated[TextParts, Tag("<list>")], _EXPECTED]
Content = Annotated[Annotated[str, Tag("<text>")] | Annotated[Parts, Tag("<list>")], _EXPECTED]


class SystemMessage(Object):
    role: Literal["system", "developer"]
    content: TextContent
    name: Author | None = None


class UserMessage(Object):
    role: Literal["user"]
    content: Content
    name: Author | None = None


class CalledFunction(Object):
    name: Name
    arguments: str


class ToolCall(Object):
    id: Reference
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(Object):
    """What answers hold may be sent back as it came."""

    role: Literal["assistant"]
    content: TextContent | None = None
    name: Author | None = None
    refusal: str | None = None
    tool_calls: Annotated[list[ToolCall], Field(max_length=128, fail_fast=True)] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None


class ToolMessage(Object):
    role: Literal["tool"]
    content: TextContent
    tool_call_id: Reference
    name: Author | None = None


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")],
    by_field(
        "role",
        {"system": "<system>", "developer": "<system>", "user": "<user>", "assistant": "<assistant>", "tool": "<tool>"},
    ),
]
Messages = Annotated[
    list[Message],
    Field(
        min_length=1,
        max_length=MAX_MESSAGES,
        description="At most what the model's settings allow (2048).",
        fail_fast=True,
    ),
]


class Function(Object):
    name: Name
    description: Annotated[str, Field(max_length=16_384)] | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Object):
    type: Literal["function"]
    function: Function


Tools = Annotated[
    list[Tool],
    Field(min_length=1, max_length=1024, description="At most what the model's settings allow (64).", fail_fast=True),
]


class FunctionName(Object):
    name: Name


class NamedTool(Object):
    type: Literal["function"]
    function: FunctionName


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<text>")] | Annotated[NamedTool, Tag("<object>")],
    either('"none", "auto", "required" or an object that names a function'),
]
