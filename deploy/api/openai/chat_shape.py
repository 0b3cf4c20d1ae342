"""ChatShape: the answers of /v1/chat/completions. Pure."""

from collections.abc import Callable, Iterable, Sequence

from deploy.api.openai.responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatLogprobs,
    ChatTokenLogprob,
    ChoiceStart,
    Delta,
    Function,
    Piece,
    ToolCall,
    TopLogprob,
    Vocabulary,
)
from deploy.api.openai.scores import finish_reason, finite
from deploy.api.reading.parts import CallArguments, CallBegun, Content, Part, Reader, Reasoning
from router.request import FinishReason, TokenLogprob


class ChatShape:
    """The shape of a chat's answers.

    new_reader: makes a reader for one answer. calls_finish: whether "tool_calls" is a reason to finish, which
    OpenAI does not give where the client named the tool.
    """

    id_prefix = "chatcmpl"
    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"

    def __init__(
        self, vocabulary: Vocabulary, *, new_reader: Callable[[], Reader], calls_finish: bool
    ) -> None:
        self._vocabulary = vocabulary
        self._new_reader = new_reader
        self._calls_finish = calls_finish

    def reader(self) -> Reader:
        return self._new_reader()

    def whole(self, start: ChoiceStart, piece: Piece) -> ChatChoice:
        called = any(isinstance(part, CallBegun) for part in piece.parts)
        return {
            "index": piece.index,
            "message": _message(piece.parts),
            "logprobs": self._logprobs(piece),
            "finish_reason": self._finish_reason(piece.finish, called=called),
            "stop_reason": piece.stop_reason,
        }

    def chunk(self, piece: Piece, *, called: bool) -> ChatChunkChoice:
        choice: ChatChunkChoice = {
            "index": piece.index,
            "delta": _delta(piece.parts),
            "logprobs": self._logprobs(piece),
            "finish_reason": self._finish_reason(piece.finish, called=called),
        }
        if piece.finish is not None:
            choice["stop_reason"] = piece.stop_reason
        return choice

    def first_chunk(self, start: ChoiceStart) -> ChatChunkChoice:
        delta: Delta = {"role": "assistant", "content": ""}
        return {"index": start.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def offset(self, start: ChoiceStart) -> int:
        return 0  # a chat has no offsets

    def num_chars(self, logprobs: Sequence[TokenLogprob]) -> int:
        return 0

    def _finish_reason(self, finish: FinishReason | None, *, called: bool) -> str | None:
        """Return OpenAI's word for the reason to finish.

        A tool call that the length limit cut off is no "tool_calls", for it must not be run.
        """
        return "tool_calls" if called and self._calls_finish and finish == "stop" else finish_reason(finish)

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
            "logprob": finite(logprob),
            "bytes": list(self._vocabulary.token_bytes(token)),
        }


def _message(parts: Sequence[Part]) -> AssistantMessage:
    text = "".join(part.text for part in parts if isinstance(part, Content))
    thoughts = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = _calls(parts)
    message: AssistantMessage = {"role": "assistant", "content": text, "refusal": None}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["content"] = text or None
        message["tool_calls"] = calls
    return message


def _calls(parts: Iterable[Part]) -> list[ToolCall]:
    calls: list[ToolCall] = []
    for part in parts:
        if isinstance(part, CallBegun):
            function: Function = {"name": part.name, "arguments": ""}
            calls.append({"id": part.id, "type": "function", "function": function})
        elif isinstance(part, CallArguments):
            calls[part.index]["function"]["arguments"] += part.text
    return calls


def _delta(parts: Sequence[Part]) -> Delta:
    delta: Delta = {}
    for part in parts:
        if isinstance(part, Content):
            delta["content"] = delta.get("content", "") + part.text
        elif isinstance(part, Reasoning):
            delta["reasoning_content"] = delta.get("reasoning_content", "") + part.text
        else:
            delta.setdefault("tool_calls", []).append(_call_delta(part))
    return delta


def _call_delta(part: CallBegun | CallArguments) -> ToolCall:
    if isinstance(part, CallArguments):
        return {"index": part.index, "function": {"arguments": part.text}}
    function: Function = {"name": part.name, "arguments": ""}
    return {"index": part.index, "id": part.id, "type": "function", "function": function}
