"""Reply: gathers the outputs of a reply's requests into one object, or turns each into an event.

No I/O, no clock.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from deploy.api.openai.responses import Choice, ChoiceStart, Completion, Piece, Shape, Usage
from deploy.api.reading.parts import CallBegun, Content, Part, Reader
from router.request import RequestOutput, TokenLogprob

DONE = b"data: [DONE]\n\n"

# ASCII with escapes: some clients split events at U+2028 or U+0085, which JSON may hold as they are.
to_json = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode

_TEXT = "\0"  # stands for the text in a chunk's template; no model's name holds it


@dataclass
class _ChoiceState:
    """The state of one choice while its outputs come.

    before, after: the JSON of its chunks around the text, for chunks that hold nothing but text. called:
    whether a tool call has come. offset: Shape.num_chars of the tokens so far. parts, logprobs: kept for a
    reply that is not streamed.
    """

    reader: Reader
    before: str
    after: str
    first: RequestOutput | None = None
    last: RequestOutput | None = None
    called: bool = False
    num_tokens: int = 0
    offset: int = 0
    parts: list[Part] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    def take(self, output: RequestOutput) -> list[Part]:
        """Return the parts that an output adds to the answer."""
        self.first = self.first or output
        self.last = output
        self.num_tokens += len(output.tokens)
        parts = self.reader.push(output.text)
        if output.finish is not None:
            parts += self.reader.flush()
        self.called = self.called or any(isinstance(part, CallBegun) for part in parts)
        return parts


class Reply:
    """One reply to a request's body.

    Give every output either to `add` and then ask for `whole`, or to `event` and then ask for `ending`.
    prompt_tokens: the number of tokens of every prompt; each prompt has n choices in a row. logprobs: whether
    the body asked for them. include_usage: whether a stream tells the usage; a whole reply always does.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        reply_id: str,
        created: int,
        model: str,
        prompt_tokens: Sequence[int],
        n: int,
        logprobs: bool,
        include_usage: bool,
    ) -> None:
        self._shape = shape
        self._id = reply_id
        self._created = created
        self._model = model
        self._prompt_tokens = sum(prompt_tokens)
        self._n = n
        self._with_logprobs = logprobs
        self._include_usage = include_usage
        self._choices = [self._new_choice(index) for index in range(n * len(prompt_tokens))]

    def add(self, index: int, output: RequestOutput) -> None:
        """Keep an output for `whole`."""
        choice = self._choices[index]
        choice.parts += choice.take(output)
        choice.logprobs += output.logprobs

    def whole(self) -> bytes:
        """Return the JSON of everything that was added."""
        choices = [self._whole(index, choice) for index, choice in enumerate(self._choices)]
        reply = self._envelope(self._shape.whole_object, choices)
        reply["usage"] = self._usage()
        return to_json(reply).encode()

    def event(self, index: int, output: RequestOutput) -> bytes:
        """Return the events that show an output, b"" if there is nothing to show yet."""
        choice = self._choices[index]
        first = self._first_chunk(index, output) if choice.first is None else ""
        parts = choice.take(output)
        *before, last = parts or [Content("")]
        events = [self._part(index, part) for part in before]
        if output.finish is None and not output.logprobs:
            events.append(self._part(index, last) if parts else "")
        else:
            events.append(self._end(index, output, last if parts else None))
        return (first + "".join(events)).encode()

    def ending(self) -> bytes:
        """Return the events that end the stream, after those of the last output."""
        if not self._include_usage:
            return DONE
        chunk = self._envelope(self._shape.chunk_object, [])
        chunk["usage"] = self._usage()
        return server_sent(to_json(chunk)).encode() + DONE

    def _new_choice(self, index: int) -> _ChoiceState:
        template = self._chunk(self._shape.chunk(Piece(index, [Content(_TEXT)]), called=False))
        before, after = template.split(to_json(_TEXT))
        return _ChoiceState(self._shape.reader(), before, after)

    def _first_chunk(self, index: int, output: RequestOutput) -> str:
        start = ChoiceStart(index, output.prompt_logprobs)
        self._choices[index].offset = self._shape.offset(start)
        chunk = self._shape.first_chunk(start)
        return self._chunk(chunk) if chunk is not None else ""

    def _part(self, index: int, part: Part) -> str:
        """Return the event of a chunk that holds one part and nothing else."""
        if isinstance(part, Content):
            choice = self._choices[index]
            return f"{choice.before}{to_json(part.text)}{choice.after}"
        return self._chunk(self._shape.chunk(Piece(index, [part]), called=True))

    def _end(self, index: int, output: RequestOutput, part: Part | None) -> str:
        """Return the event of an output's last part, with its logprobs and its finish."""
        choice = self._choices[index]
        piece = Piece(
            index,
            [part] if part else [],
            self._asked_for(output.logprobs),
            output.finish,
            _stop_reason(output),
            choice.offset,
        )
        choice.offset += self._shape.num_chars(output.logprobs)
        return self._chunk(self._shape.chunk(piece, called=choice.called))

    def _whole(self, index: int, choice: _ChoiceState) -> Choice:
        assert choice.first is not None
        assert choice.last is not None
        start = ChoiceStart(index, choice.first.prompt_logprobs)
        logprobs = self._asked_for(choice.logprobs)
        stop_reason = _stop_reason(choice.last)
        piece = Piece(
            index, choice.parts, logprobs, choice.last.finish, stop_reason, self._shape.offset(start)
        )
        return self._shape.whole(start, piece)

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
            "prompt_tokens_details": {"cached_tokens": self._cached_tokens()},
        }

    def _cached_tokens(self) -> int:
        """Return the cached tokens of all prompts. A prompt counts once, as its first choice found it."""
        firsts = [choice.first for choice in self._choices[:: self._n]]
        return sum(first.num_cached for first in firsts if first is not None)

    def _asked_for(self, logprobs: Sequence[TokenLogprob]) -> Sequence[TokenLogprob] | None:
        return logprobs if self._with_logprobs else None


def server_sent(data: str) -> str:
    """Return JSON as a server-sent event."""
    return f"data: {data}\n\n"


def _stop_reason(output: RequestOutput) -> str | int | None:
    return "timeout" if output.finish == "timeout" else output.stop_reason
