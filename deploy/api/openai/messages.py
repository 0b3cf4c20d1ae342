"""The messages of a chat and its tools: as clients send them, and as chat templates read them."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError, from_json, to_json

from deploy.api.openai.fields import NotServed, OpenAIBaseModel, accept_only
from deploy.api.openai.limits import (
    MAX_MESSAGES,
    MAX_PARTS,
    MAX_TEMPLATE_KWARGS,
    MAX_TOOLS,
    MAX_TOOLS_BYTES,
)


class TextPart(OpenAIBaseModel):
    type: Annotated[str, accept_only("text")]
    text: str


def _text_of(content: str | list[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _as_object(arguments: object) -> object:
    """Return a call's arguments as a dict.

    OpenAI's clients send them as the model wrote them: JSON in a string.
    """
    try:
        # Not json.loads, which would take any depth: this one has the same bound as a body.
        value = from_json(arguments or "{}") if isinstance(arguments, str) else arguments
    except ValueError as error:
        raise ValueError(f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError("must be a JSON object")
    return value


class CalledFunction(OpenAIBaseModel):
    name: str
    arguments: Annotated[dict[str, Any], BeforeValidator(_as_object)]


class SentCall(OpenAIBaseModel):
    """A call that the model made earlier in the chat."""

    id: str = ""
    type: Annotated[str, accept_only("function")] = "function"
    function: CalledFunction


class Message(OpenAIBaseModel):
    role: Annotated[str, accept_only("system", "developer", "user", "assistant", "tool")]
    tool_calls: Annotated[list[SentCall], Field(default_factory=list, max_length=MAX_PARTS, fail_fast=True)]
    content: str | Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)] | None = Field(
        default=None, validate_default=True
    )
    reasoning_content: str | None = None
    tool_call_id: str | None = None
    function_call: NotServed = None
    audio: NotServed = None

    @field_validator("content")
    @classmethod
    def _calls_need_no_text(cls, content: object, info: ValidationInfo) -> object:
        if content is None and not info.data.get("tool_calls"):
            raise PydanticCustomError("missing", "Field required")
        return content

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates read it.

        The role "developer", OpenAI's newer name, becomes "system", which templates know. A call's arguments
        become a mapping, which all templates take, while some cannot take JSON in a string. No content
        becomes the empty string, because templates would print None.
        """
        message: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": _text_of(self.content or ""),
        }
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump(include=_CALL) for call in self.tool_calls]
        for name in ("reasoning_content", "tool_call_id"):
            if (value := getattr(self, name)) is not None:
                message[name] = value
        return message


Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
TemplateKwargs = Annotated[dict[str, Any], Field(default_factory=dict, max_length=MAX_TEMPLATE_KWARGS)]
"""Further variables of the model's chat template."""

_CALL: Any = {"id": True, "type": True, "function": {"name", "arguments"}}


class OfferedFunction(OpenAIBaseModel):
    """A function that the model may call.

    parameters: JSON schema of an object; empty: the function takes none.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")
    description: str = ""
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool = False


class Tool(OpenAIBaseModel):
    type: Annotated[str, accept_only("function")]
    function: OfferedFunction

    def for_template(self) -> dict[str, Any]:
        """Return the tool as chat templates read it."""
        return self.model_dump(include=_TOOL, exclude_unset=True)


def _not_too_long(tools: list[Tool]) -> list[Tool]:
    num_bytes = len(to_json([tool.for_template() for tool in tools]))
    if num_bytes > MAX_TOOLS_BYTES:
        raise ValueError(f"all tools together may have {MAX_TOOLS_BYTES} bytes of JSON, not {num_bytes}")
    return tools


Tools = Annotated[
    list[Tool],
    Field(default_factory=list, max_length=MAX_TOOLS, fail_fast=True),
    AfterValidator(_not_too_long),
]

_TOOL: Any = {"type": True, "function": {"name", "description", "parameters", "strict"}}


class NamedFunction(OpenAIBaseModel):
    name: str


class NamedTool(OpenAIBaseModel):
    """A tool_choice that names the tool that has to be called."""

    type: Annotated[str, accept_only("function")]
    function: NamedFunction


ToolChoice = Annotated[str, accept_only("none", "auto", "required")] | NamedTool
