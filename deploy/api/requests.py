"""What OpenAI's clients send, as far as we serve it.

A field that would change the answer and is not served is refused by name. One that we do not know is ignored, and
`ignored_fields` names it for the log. Null is the same as absent. Field names beyond OpenAI's are vLLM's.
"""

import reprlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import CoreSchema, core_schema

from router.request import SamplingParams

_DEFAULT = SamplingParams()
_MODELS_OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields that are the model's own where a body does not say: see router.tokenizer.sampling_defaults."""


@dataclass(frozen=True, eq=False)
class _Only:
    """Refuses every value but these. They ask for nothing that we do not do anyway."""

    served: tuple[Any, ...]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return handler(schema) | {"enum": [*self.served] or [None]}

    def _check(self, value: object) -> object:
        if value not in self.served:
            others = f" (only {', '.join(map(repr, self.served))})" if self.served else ""
            raise ValueError(f"{reprlib.repr(value)} is not supported{others}")
        return value


def _only(*served: Any) -> _Only:
    return _Only(served)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: object) -> object:
    """A string, or one list of token ids, is a batch of one."""
    alone = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
    return [value] if alone else value


# fail_fast: or a long list of rubbish becomes a list of errors, hundreds of times its size.
TokenIds = Annotated[list[StrictInt], Field(fail_fast=True)]
Prompts = Annotated[
    list[str | TokenIds],
    Field(min_length=1, fail_fast=True),
    BeforeValidator(
        _as_prompts,
        json_schema_input_type=str | Annotated[list[str | int | list[int]], Field(min_length=1)],
    ),
]
StopStrings = Annotated[
    tuple[str, ...],
    Field(max_length=16),
    BeforeValidator(_listed, json_schema_input_type=str | Annotated[list[str], Field(max_length=16)]),
]
NotServed = Annotated[Any, _only()]


class _Sent(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        if isinstance(data, dict):
            return {name: value for name, value in data.items() if value is not None}
        return data


def ignored_fields(sent: BaseModel) -> Iterator[str]:
    """Dotted names of what a body holds and we do not know, without list positions; may repeat."""
    yield from sent.model_extra or ()
    for name in type(sent).model_fields:
        value = getattr(sent, name)
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, BaseModel):
                yield from (f"{name}.{ignored}" for ignored in ignored_fields(inner))


class StreamOptions(_Sent):
    include_usage: bool = False


class TextPart(_Sent):
    type: Annotated[str, _only("text")]
    text: str


class Message(_Sent):
    role: Annotated[str, _only("system", "developer", "user", "assistant")]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    tool_calls: Annotated[Any, _only([])] = None
    function_call: NotServed = None
    audio: NotServed = None

    def for_template(self) -> dict[str, str]:
        """What chat templates read. "developer" is OpenAI's newer name for "system", which templates know."""
        role = "system" if self.role == "developer" else self.role
        text = self.content if isinstance(self.content, str) else "\n".join(p.text for p in self.content)
        return {"role": role, "content": text}


class _Body(_Sent):
    """What both endpoints take."""

    model: str
    user: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = Field(default=None, lt=2**31)
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    presence_penalty: float = _DEFAULT.presence_penalty
    frequency_penalty: float = _DEFAULT.frequency_penalty
    stop: StopStrings = ()
    stop_token_ids: TokenIds = []
    ignore_eos: bool = False

    logit_bias: Annotated[Any, _only({})] = None
    echo: Annotated[Any, _only(False)] = None
    min_tokens: Annotated[Any, _only(0)] = None
    bad_words: Annotated[Any, _only([])] = None
    allowed_token_ids: NotServed = None
    use_beam_search: Annotated[Any, _only(False)] = None
    prompt_logprobs: NotServed = None
    truncate_prompt_tokens: NotServed = None
    include_stop_str_in_output: Annotated[Any, _only(False)] = None
    skip_special_tokens: Annotated[Any, _only(True)] = None
    structured_outputs: NotServed = None
    guided_json: NotServed = None
    guided_regex: NotServed = None
    guided_choice: NotServed = None
    guided_grammar: NotServed = None

    @field_validator("top_k")
    @classmethod
    def _all_is_zero(cls, top_k: int) -> int:
        return 0 if top_k == -1 else top_k  # vLLM's older way to keep all

    @field_validator("stream_options")
    @classmethod
    def _options_of_a_stream(cls, options: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if not info.data.get("stream"):
            raise ValueError("only allowed with stream=true")
        return options

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(
        self, choice: int, defaults: SamplingParams, *, max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        """For the choice-th of n answers: a seed makes each repeatable, not all of them equal."""
        asked = {name: getattr(self, name) for name in _MODELS_OWN if getattr(self, name) is not None}
        return replace(
            defaults,
            **asked,
            max_tokens=max_tokens,
            seed=None if self.seed is None else self.seed + choice,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
        )


class ChatCompletionRequest(_Body):
    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = {}

    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    modalities: Annotated[Any, _only(["text"])] = None
    audio: NotServed = None
    web_search_options: NotServed = None
    chat_template: NotServed = None
    add_generation_prompt: Annotated[Any, _only(True)] = None
    continue_final_message: Annotated[Any, _only(False)] = None

    @field_validator("top_logprobs")
    @classmethod
    def _top_needs_logprobs(cls, top: int, info: ValidationInfo) -> int:
        if not info.data.get("logprobs"):
            raise ValueError("only allowed with logprobs=true")
        return top

    @property
    def token_limit(self) -> int | None:
        """max_completion_tokens, the newer name, before max_tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def sampling(self, choice: int, defaults: SamplingParams) -> SamplingParams:
        """Raises ValueError that begins with the field's name."""
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(choice, defaults, max_tokens=self.token_limit, logprobs=logprobs)


class CompletionRequest(_Body):
    prompt: Prompts
    max_tokens: int = Field(default=16, ge=1)  # OpenAI's default
    logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = None

    suffix: Annotated[Any, _only("")] = None

    @field_validator("best_of")
    @classmethod
    def _best_of_is_n(cls, best_of: int, info: ValidationInfo) -> int:
        if best_of != info.data.get("n"):
            raise ValueError(f"{best_of} is not supported (only n={info.data.get('n')})")
        return best_of

    @property
    def token_limit(self) -> int:
        return self.max_tokens

    def sampling(self, choice: int, defaults: SamplingParams) -> SamplingParams:
        """Raises ValueError that begins with the field's name."""
        return self._sampling(choice, defaults, max_tokens=self.max_tokens, logprobs=self.logprobs)
