"""The bodies of /v1/chat/completions and /v1/completions, as far as we serve them.

Fields beyond OpenAI's have vLLM's names.
"""

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictInt, ValidationInfo, field_validator

from deploy.api.openai.fields import NotServed, OpenAIBaseModel, accept_only
from deploy.api.openai.limits import (
    MAX_LOGIT_BIAS,
    MAX_PROMPTS,
    MAX_STOP_CHARS,
    MAX_STOP_TOKEN_IDS,
    MAX_STOPS,
)
from deploy.api.openai.messages import Messages, NamedTool, TemplateKwargs, Tool, ToolChoice, Tools
from deploy.api.openai.structured import StructuredOutputFields
from router.request import SamplingParams

_DEFAULT = SamplingParams()
_MODELS_OWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Fields whose defaults are the model's own: see router.text.tokenizer.sampling_defaults."""


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _as_prompts(value: object) -> object:
    """Return a batch of prompts: a single string, or a single list of token ids, is a batch of one."""
    alone = isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int))
    return [value] if alone else value


# fail_fast, or a long list of wrong values would become a list of errors, hundreds of times its size.
TokenIds = Annotated[list[StrictInt], Field(fail_fast=True)]
Prompts = Annotated[
    list[str | TokenIds],
    Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True),
    BeforeValidator(
        _as_prompts,
        json_schema_input_type=str | Annotated[list[str | int | list[int]], Field(min_length=1)],
    ),
]
StopString = Annotated[str, Field(max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[
    tuple[StopString, ...],
    Field(max_length=MAX_STOPS),
    BeforeValidator(
        _listed, json_schema_input_type=StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS)]
    ),
]
Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]


class StreamOptions(OpenAIBaseModel):
    include_usage: bool = False


class _Body(StructuredOutputFields):
    """The fields that both endpoints take."""

    model: str
    user: str | None = None
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: Int32 = 0

    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    presence_penalty: float = _DEFAULT.presence_penalty
    frequency_penalty: float = _DEFAULT.frequency_penalty
    logit_bias: dict[int, float] = Field(default_factory=dict, max_length=MAX_LOGIT_BIAS)
    stop: StopStrings = ()
    stop_token_ids: TokenIds = Field(default_factory=list, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool = False
    min_tokens: int = _DEFAULT.min_tokens

    bad_words: Annotated[Any, accept_only([])] = None
    allowed_token_ids: NotServed = None
    use_beam_search: Annotated[Any, accept_only(False)] = None
    truncate_prompt_tokens: NotServed = None
    include_stop_str_in_output: Annotated[Any, accept_only(False)] = None
    skip_special_tokens: Annotated[Any, accept_only(True)] = None

    @field_validator("top_k")
    @classmethod
    def _all_is_zero(cls, top_k: int) -> int:
        return 0 if top_k == -1 else top_k  # vLLM's older way to keep all tokens

    @field_validator("stream_options")
    @classmethod
    def _options_of_a_stream(cls, options: StreamOptions, info: ValidationInfo) -> StreamOptions:
        if not info.data.get("stream"):
            raise ValueError("only allowed with stream=true")
        return options

    @property
    def include_usage(self) -> bool:
        """Return whether a stream has to tell the usage at its end."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(
        self,
        choice: int,
        defaults: SamplingParams,
        *,
        grammar: str | None,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None,
    ) -> SamplingParams:
        """Return the sampling parameters of the choice-th of n answers.

        A seed makes each answer repeatable; it does not make them equal.
        """
        asked = {name: getattr(self, name) for name in _MODELS_OWN if getattr(self, name) is not None}
        return replace(
            defaults,
            **asked,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            seed=None if self.seed is None else self.seed + choice,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            stop=self.stop,
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            grammar=grammar,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class ChatCompletionRequest(_Body):
    messages: Messages
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: TemplateKwargs
    tools: Tools
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True

    functions: Annotated[Any, accept_only([])] = None
    function_call: Annotated[Any, accept_only("none", "auto")] = None
    modalities: Annotated[Any, accept_only(["text"])] = None
    audio: NotServed = None
    web_search_options: NotServed = None
    chat_template: NotServed = None
    add_generation_prompt: Annotated[Any, accept_only(True)] = None
    continue_final_message: Annotated[Any, accept_only(False)] = None
    echo: Annotated[Any, accept_only(False)] = None
    prompt_logprobs: NotServed = None

    @field_validator("top_logprobs")
    @classmethod
    def _top_needs_logprobs(cls, top: int, info: ValidationInfo) -> int:
        if not info.data.get("logprobs"):
            raise ValueError("only allowed with logprobs=true")
        return top

    @field_validator("tool_choice")
    @classmethod
    def _is_offered(cls, choice: str | NamedTool, info: ValidationInfo) -> str | NamedTool:
        names = [tool.function.name for tool in info.data.get("tools", [])]
        if isinstance(choice, NamedTool) and choice.function.name not in names:
            raise ValueError(f"{choice.function.name[:100]!r} is not among the tools")
        if choice == "required" and not names:
            raise ValueError("'required' needs tools")
        return choice

    @property
    def token_limit(self) -> int | None:
        """Return the limit of generated tokens; max_completion_tokens, the newer name, wins over max_tokens."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def offered(self) -> list[Tool]:
        """Return the tools that the model may call."""
        return [] if self.tool_choice == "none" else self.tools

    @property
    def forced(self) -> list[Tool]:
        """Return the tools of which one has to be called; empty if the model may answer in words."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return self.tools if self.tool_choice == "required" else []

    @property
    def names_tool(self) -> bool:
        """Return whether the client named the tool that has to be called."""
        return isinstance(self.tool_choice, NamedTool)

    def sampling(self, choice: int, defaults: SamplingParams, *, grammar: str | None) -> SamplingParams:
        """Return the sampling parameters of one choice.

        Raises ValueError that begins with the field's name.
        """
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(
            choice,
            defaults,
            grammar=grammar,
            max_tokens=self.token_limit,
            logprobs=logprobs,
            prompt_logprobs=None,
        )


class CompletionRequest(_Body):
    """The body of /v1/completions. With `echo` the text begins with the prompt, and so do its logprobs."""

    prompt: Prompts
    echo: bool = False
    max_tokens: int = Field(default=16, ge=0, validate_default=True)  # OpenAI's default
    logprobs: int | None = Field(default=None, ge=0, le=20)
    prompt_logprobs: int | None = Field(default=None, ge=0, le=20)
    best_of: int | None = None

    suffix: Annotated[Any, accept_only("")] = None

    @field_validator("max_tokens")
    @classmethod
    def _none_with_echo(cls, max_tokens: int, info: ValidationInfo) -> int:
        if not max_tokens and not info.data.get("echo"):
            raise ValueError("0 is only allowed with echo=true, else it must be at least 1")
        return max_tokens

    @field_validator("prompt_logprobs")
    @classmethod
    def _not_streamed(cls, prompt_logprobs: int, info: ValidationInfo) -> int:
        if info.data.get("stream"):
            raise ValueError("not allowed with stream=true (echo=true with logprobs is)")
        return prompt_logprobs

    @field_validator("best_of")
    @classmethod
    def _best_of_is_n(cls, best_of: int, info: ValidationInfo) -> int:
        if best_of != info.data.get("n"):
            raise ValueError(f"{best_of} is not supported (only n={info.data.get('n')})")
        return best_of

    @property
    def token_limit(self) -> int:
        """Return the limit of generated tokens."""
        return self.max_tokens

    @property
    def _scored(self) -> int | None:
        """Return how many alternatives of each prompt token the engine has to tell, None for no scores."""
        asked = [self.prompt_logprobs, self.logprobs if self.echo else None]
        if not self.max_tokens:
            asked.append(0)  # the engine generates nothing only where it has the prompt to score
        return max((number for number in asked if number is not None), default=None)

    def sampling(self, choice: int, defaults: SamplingParams, *, grammar: str | None) -> SamplingParams:
        """Return the sampling parameters of one choice.

        Raises ValueError that begins with the field's name.
        """
        return self._sampling(
            choice,
            defaults,
            grammar=grammar,
            max_tokens=self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self._scored,
        )
