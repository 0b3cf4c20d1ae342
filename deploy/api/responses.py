"""What OpenAI's clients are answered: the shapes of both endpoints. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, NotRequired, Protocol

from typing_extensions import TypedDict  # pydantic makes no schema of typing's own before Python 3.12

from router.request import FinishReason, TokenLogprob

_LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


class Vocabulary(Protocol):
    """How tokens look. A token may be part of a character: its bytes are exact, its text is not."""

    def token_text(self, token_id: int, /) -> str: ...

    def token_bytes(self, token_id: int, /) -> bytes: ...


class Usage(TypedDict):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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
    """Parallel lists, one entry per token. text_offset: where it begins in the texts of all tokens, joined."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AssistantMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class Delta(TypedDict):
    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]


class ChatChoice(TypedDict):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class ChatChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: str | None


class CompletionChoice(TypedDict):
    """Whole, or one chunk of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None


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
    """A part of one choice, or all of it.

    logprobs: None if the request asked for none. offset: Shape.num_chars of the tokens before this piece.
    """

    index: int
    text: str = ""
    logprobs: Sequence[TokenLogprob] | None = None
    finish: FinishReason | None = None
    offset: int = 0


class Shape(Protocol):
    """What differs between the answers of the two endpoints."""

    id_prefix: str
    whole_object: str
    chunk_object: str

    def whole(self, choice: Piece) -> Choice: ...

    def chunk(self, piece: Piece) -> Choice: ...

    def opening(self, index: int) -> Choice | None:
        """A choice's first chunk, before any text."""
        ...

    def num_chars(self, logprobs: Sequence[TokenLogprob]) -> int:
        """By how much these tokens move the offset of the next. The text itself may lag behind them."""
        ...


class ChatShape:
    """/v1/chat/completions."""

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def whole(self, choice: Piece) -> ChatChoice:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self._logprobs(choice),
            "finish_reason": choice.finish,
        }

    def chunk(self, piece: Piece) -> ChatChunkChoice:
        return self._chunk(piece, {"content": piece.text} if piece.text else {})

    def opening(self, index: int) -> ChatChunkChoice:
        return self._chunk(Piece(index), {"role": "assistant", "content": ""})

    def num_chars(self, logprobs: Sequence[TokenLogprob]) -> int:
        return 0  # a chat has no offsets

    def _chunk(self, piece: Piece, delta: Delta) -> ChatChunkChoice:
        return {
            "index": piece.index,
            "delta": delta,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish,
        }

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if piece.logprobs is None:
            return None
        content: list[ChatTokenLogprob] = [
            {
                **self._token(scored.token, scored.logprob),
                "top_logprobs": [self._token(*top) for top in scored.top],
            }
            for scored in piece.logprobs
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> TopLogprob:
        return {
            "token": self._vocabulary.token_text(token),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(self._vocabulary.token_bytes(token)),
        }


class CompletionShape:
    """/v1/completions."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def whole(self, choice: Piece) -> CompletionChoice:
        return self.chunk(choice)

    def chunk(self, piece: Piece) -> CompletionChoice:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish,
        }

    def opening(self, index: int) -> None:
        return None

    def num_chars(self, logprobs: Sequence[TokenLogprob]) -> int:
        return sum(len(self._vocabulary.token_text(scored.token)) for scored in logprobs)

    def _logprobs(self, piece: Piece) -> CompletionLogprobs | None:
        if piece.logprobs is None:
            return None
        tokens = [self._vocabulary.token_text(scored.token) for scored in piece.logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [max(scored.logprob, _LEAST_LOGPROB) for scored in piece.logprobs],
            "top_logprobs": [self._top(scored) for scored in piece.logprobs],
            "text_offset": list(accumulate(map(len, tokens[:-1]), initial=piece.offset)) if tokens else [],
        }

    def _top(self, scored: TokenLogprob) -> dict[str, float]:
        """By text, the chosen token's among them. Of tokens that look alike the likeliest counts."""
        by_text: dict[str, float] = {}
        for token, logprob in (*scored.top, (scored.token, scored.logprob)):
            by_text.setdefault(self._vocabulary.token_text(token), max(logprob, _LEAST_LOGPROB))
        return by_text
