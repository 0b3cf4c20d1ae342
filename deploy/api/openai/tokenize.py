"""The bodies and answers of /tokenize and /detokenize, as vLLM has them."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from pydantic import ConfigDict, Field, model_validator
from typing_extensions import TypedDict  # pydantic makes no schema of typing's own before Python 3.12

from deploy.api.openai.fields import OpenAIBaseModel
from deploy.api.openai.limits import MAX_MESSAGES
from deploy.api.openai.messages import Message, TemplateKwargs, Tools
from deploy.api.openai.requests import TokenIds


class TokenizerLike(Protocol):
    """The part of router.text.tokenizer.Tokenizer that /tokenize and /detokenize need.

    Used from any thread.
    """

    def encode(
        self, text: str, /, *, add_special_tokens: bool = True, at_most: int | None = None
    ) -> list[int]:
        """Return the tokens of a text. Raises TooLong for one of more than at_most."""
        ...

    def encode_rendered(self, text: str, /, *, at_most: int | None = None) -> list[int]: ...

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any],
    ) -> str:
        """Render a chat with the model's template.

        Raises ValueError for messages that the template refuses.
        """
        ...

    def decode_long(self, token_ids: Sequence[int], /, *, skip_special_tokens: bool = True) -> str: ...

    def pieces(self, token_ids: Sequence[int], /) -> list[str]: ...


class TokenizeRequest(OpenAIBaseModel):
    """A request for the tokens of a text, or of a chat as the model's template writes it."""

    model_config = ConfigDict(
        json_schema_extra={"oneOf": [{"required": ["prompt"]}, {"required": ["messages"]}]}
    )

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(
        default=None, min_length=1, max_length=MAX_MESSAGES, fail_fast=True
    )
    tools: Tools
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateKwargs
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _text_or_chat(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages must be given")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens=true is for a prompt: a chat's template writes them itself")
        if self.messages is None and self.tools:
            raise ValueError("tools are for messages: only a chat's template can write them")
        return self


class DetokenizeRequest(OpenAIBaseModel):
    model: str | None = None
    tokens: TokenIds


class TokenizeResponse(TypedDict):
    """The tokens of a text. token_strs: the vocabulary's own names of the tokens, if they were asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(TypedDict):
    prompt: str


def tokenize(body: TokenizeRequest, tokenizer: TokenizerLike, *, max_model_len: int) -> TokenizeResponse:
    """Return the answer of /tokenize.

    Raises ValueError for messages that the model's template refuses, TooLong for more tokens than
    max_model_len.
    """
    tokens = _encode(body, tokenizer, at_most=max_model_len)
    return {
        "count": len(tokens),
        "max_model_len": max_model_len,
        "tokens": tokens,
        "token_strs": tokenizer.pieces(tokens) if body.return_token_strs else None,
    }


def _encode(body: TokenizeRequest, tokenizer: TokenizerLike, *, at_most: int) -> list[int]:
    if body.prompt is not None:
        special = body.add_special_tokens is not False
        return tokenizer.encode(body.prompt, add_special_tokens=special, at_most=at_most)
    assert body.messages is not None
    text = tokenizer.render_chat(
        [message.for_template() for message in body.messages],
        tools=[tool.for_template() for tool in body.tools],
        add_generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs,
    )
    return tokenizer.encode_rendered(text, at_most=at_most)
