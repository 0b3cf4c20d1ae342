"""The objects of both endpoints' answers, and what they are made from. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NotRequired, Protocol

from typing_extensions import TypedDict  # pydantic makes no schema of typing's own before Python 3.12

from deploy.api.reading.parts import Part, Reader
from router.request import FinishReason, TokenLogprob


class Vocabulary(Protocol):
    """The text and the bytes of tokens.

    A token may be part of a character: its bytes are exact, its text is not.
    """

    def token_text(self, token_id: int, /) -> str: ...

    def token_bytes(self, token_id: int, /) -> bytes: ...


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]
    refusal: None


class CompletionLogprobs(TypedDict):
    """The logprobs of a completion as parallel lists, one entry per token.

    text_offset: where the token begins in the joined texts of all tokens. token_logprobs and top_logprobs are
    null for a prompt's first token, which nothing comes before.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(TypedDict):
    """The score of a prompt token, as in vLLM.

    rank: 1 is the likeliest; null: not among those that were asked for.
    """

    logprob: float
    rank: int | None
    decoded_token: str


class Function(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCall(TypedDict):
    """A tool call, or in a stream a part of one.

    index: in a stream only, where all parts of a call but the first have neither id, type nor name.
    """

    index: NotRequired[int]
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: Function


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class _Choice(TypedDict):
    """The fields that all choices have.

    stop_reason: the stop string or token that ended it, as in vLLM; a stream has it only at the end.
    """

    index: int
    finish_reason: str | None
    stop_reason: NotRequired[str | int | None]


class ChatChoice(_Choice):
    message: AssistantMessage
    logprobs: ChatLogprobs | None


class ChatChunkChoice(_Choice):
    delta: Delta
    logprobs: ChatLogprobs | None


class CompletionChoice(_Choice):
    """A choice of a completion, whole or one chunk of it."""

    text: str
    logprobs: CompletionLogprobs | None
    prompt_logprobs: NotRequired[list[dict[str, PromptLogprob] | None]]


Choice = ChatChoice | ChatChunkChoice | CompletionChoice


class Completion(TypedDict):
    """The envelope of every answer, whole or chunk, of both endpoints.

    usage: absent from a stream that did not ask for it; null in all but the last chunk of one that did.
    """

    id: str
    object: str
    created: int
    model: str
    system_fingerprint: None
    choices: Sequence[Choice]
    usage: NotRequired[Usage | None]


@dataclass(frozen=True)
class Piece:
    """A piece of one choice: everything that was generated for it, or a part of that.

    logprobs: None if the request asked for none. offset: Shape.num_chars of the tokens before this piece.
    """

    index: int
    parts: Sequence[Part] = ()
    logprobs: Sequence[TokenLogprob] | None = None
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    offset: int = 0


@dataclass(frozen=True)
class ChoiceStart:
    """The start of a choice, which tells of its prompt.

    prompt_logprobs: those of all tokens of the prompt but the first, if the engine was asked for them.
    """

    index: int
    prompt_logprobs: Sequence[TokenLogprob]


class Shape(Protocol):
    """The part of an answer that differs between the two endpoints."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def reader(self) -> Reader:
        """Return a new reader of one choice's text."""
        ...

    def whole(self, start: ChoiceStart, piece: Piece) -> Choice:
        """Return a choice of an answer that is not streamed."""
        ...

    def chunk(self, piece: Piece, *, called: bool) -> Choice:
        """Return a choice of a stream's chunk. called: whether a tool call came, in this piece or before."""
        ...

    def first_chunk(self, start: ChoiceStart) -> Choice | None:
        """Return a choice's first chunk, which comes before anything generated; None if there is none."""
        ...

    def offset(self, start: ChoiceStart) -> int:
        """Return the text offset of the first generated token."""
        ...

    def num_chars(self, logprobs: Sequence[TokenLogprob]) -> int:
        """Return by how much these tokens move the offset of the next one.

        The text itself may lag behind them.
        """
        ...
