"""One reply: gathers the outputs of its requests into one object, or turns each into an event. No I/O, no clock."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from deploy.api.responses import Choice, Completion, Piece, Shape, Usage
from router.request import FinishReason, RequestOutput, TokenLogprob

DONE = b"data: [DONE]\n\n"

# ASCII with escapes: some clients split events at U+2028 or U+0085, which JSON may hold as they are.
to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

_TEXT = "\0"  # stands for the text in a chunk's template; no model's name holds it


@dataclass
class _Progress:
    """Of one choice. before, after: its chunks' JSON around their text, as long as they hold only that."""

    before: str
    after: str
    opened: bool = False
    num_tokens: int = 0
    offset: int = 0
    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: FinishReason | None = None


class Reply:
    """Give every output either to `add` and then ask for `whole`, or to `event` and then ask for `ending`."""

    def __init__(
        self,
        shape: Shape,
        *,
        reply_id: str,
        created: int,
        model: str,
        prompt_tokens: int,
        num_choices: int,
        logprobs: bool,
        include_usage: bool,
    ) -> None:
        """logprobs: whether they were asked for. include_usage: in a stream; a whole reply always has it."""
        self._shape = shape
        self._id = reply_id
        self._created = created
        self._model = model
        self._prompt_tokens = prompt_tokens
        self._with_logprobs = logprobs
        self._include_usage = include_usage
        self._choices = [self._progress(index) for index in range(num_choices)]

    def add(self, index: int, output: RequestOutput) -> None:
        """Keep an output for `whole`."""
        choice = self._choices[index]
        choice.num_tokens += len(output.tokens)
        choice.texts.append(output.text)
        choice.logprobs += output.logprobs
        choice.finish = output.finish

    def whole(self) -> bytes:
        """The JSON of everything added."""
        choices = [
            self._shape.whole(Piece(i, "".join(c.texts), self._asked_for(c.logprobs), c.finish))
            for i, c in enumerate(self._choices)
        ]
        reply = self._envelope(self._shape.whole_object, choices)
        reply["usage"] = self._usage()
        return to_json(reply).encode()

    def event(self, index: int, output: RequestOutput) -> bytes:
        """The events that show an output; none if there is nothing to show yet."""
        choice = self._choices[index]
        choice.num_tokens += len(output.tokens)
        opening = "" if choice.opened else self._open(index)
        if output.finish is None and not output.logprobs:
            piece = f"{choice.before}{to_json(output.text)}{choice.after}" if output.text else ""
        else:
            logprobs = self._asked_for(output.logprobs)
            piece = self._chunk(
                self._shape.chunk(Piece(index, output.text, logprobs, output.finish, choice.offset))
            )
            choice.offset += self._shape.num_chars(output.logprobs)
        return (opening + piece).encode()

    def ending(self) -> bytes:
        """The events after the last output's."""
        if not self._include_usage:
            return DONE
        chunk = self._envelope(self._shape.chunk_object, [])
        chunk["usage"] = self._usage()
        return server_sent(to_json(chunk)).encode() + DONE

    def _progress(self, index: int) -> _Progress:
        template = self._chunk(self._shape.chunk(Piece(index, _TEXT)))
        before, after = template.split(to_json(_TEXT))
        return _Progress(before, after)

    def _open(self, index: int) -> str:
        self._choices[index].opened = True
        opening = self._shape.opening(index)
        return self._chunk(opening) if opening is not None else ""

    def _chunk(self, choice: Choice) -> str:
        chunk = self._envelope(self._shape.chunk_object, [choice])
        if self._include_usage:
            chunk["usage"] = None
        return server_sent(to_json(chunk))

    def _envelope(self, kind: str, choices: list[Choice]) -> Completion:
        return {
            "id": self._id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
            "choices": choices,
        }

    def _usage(self) -> Usage:
        completion_tokens = sum(choice.num_tokens for choice in self._choices)
        return {
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self._prompt_tokens + completion_tokens,
        }

    def _asked_for(self, logprobs: Sequence[TokenLogprob]) -> Sequence[TokenLogprob] | None:
        return logprobs if self._with_logprobs else None


def server_sent(data: str) -> str:
    """An event around JSON."""
    return f"data: {data}\n\n"
