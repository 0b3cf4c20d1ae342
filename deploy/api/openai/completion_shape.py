"""CompletionShape: the answers of /v1/completions. Pure."""

from collections.abc import Sequence
from itertools import accumulate

from deploy.api.openai.requests import CompletionRequest
from deploy.api.openai.responses import (
    ChoiceStart,
    CompletionChoice,
    CompletionLogprobs,
    Piece,
    PromptLogprob,
    Vocabulary,
)
from deploy.api.openai.scores import finish_reason, finite
from deploy.api.reading.parts import Content, Part, PlainReader, Reader
from router.request import TokenLogprob


class CompletionShape:
    """The shape of a completion's answers. prompts: the body's prompts as token ids."""

    id_prefix = "cmpl"
    whole_object = chunk_object = "text_completion"

    def __init__(
        self, vocabulary: Vocabulary, body: CompletionRequest, *, prompts: Sequence[Sequence[int]]
    ) -> None:
        self._vocabulary = vocabulary
        self._body = body
        self._prompts = prompts

    def reader(self) -> Reader:
        return PlainReader()

    def whole(self, start: ChoiceStart, piece: Piece) -> CompletionChoice:
        choice = self.chunk(piece, called=False)
        if echoed := self.first_chunk(start):
            choice["text"] = echoed["text"] + choice["text"]
            choice["logprobs"] = _in_a_row(echoed["logprobs"], choice["logprobs"])
        choice["stop_reason"] = piece.stop_reason
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = self._prompt_logprobs(start, self._body.prompt_logprobs)
        return choice

    def chunk(self, piece: Piece, *, called: bool) -> CompletionChoice:
        choice: CompletionChoice = {
            "index": piece.index,
            "text": _text(piece.parts),
            "logprobs": None if piece.logprobs is None else self._logprobs(piece.logprobs, piece.offset),
            "finish_reason": finish_reason(piece.finish),
        }
        if piece.finish is not None:
            choice["stop_reason"] = piece.stop_reason
        return choice

    def first_chunk(self, start: ChoiceStart) -> CompletionChoice | None:
        if not self._body.echo:
            return None
        return {
            "index": start.index,
            "text": self._prompt_text(start.index),
            "logprobs": self._echoed(start),
            "finish_reason": None,
        }

    def offset(self, start: ChoiceStart) -> int:
        if not self._body.echo:
            return 0
        return sum(len(self._vocabulary.token_text(token)) for token in self._tokens(start.index))

    def num_chars(self, logprobs: Sequence[TokenLogprob]) -> int:
        return sum(len(self._vocabulary.token_text(scored.token)) for scored in logprobs)

    def _tokens(self, index: int) -> Sequence[int]:
        """Return the prompt tokens of a choice."""
        return self._prompts[index // self._body.n]

    def _prompt_text(self, index: int) -> str:
        """Return the text of a choice's prompt: as it was sent, or decoded if it was sent as tokens."""
        sent = self._body.prompt[index // self._body.n]
        if isinstance(sent, str):
            return sent
        return b"".join(map(self._vocabulary.token_bytes, sent)).decode(errors="replace")

    def _echoed(self, start: ChoiceStart) -> CompletionLogprobs | None:
        """Return the logprobs of an echoed prompt. Its first token has none."""
        if self._body.logprobs is None:
            return None
        first = self._vocabulary.token_text(self._tokens(start.index)[0])
        num_top = self._body.logprobs
        scored = [TokenLogprob(s.token, s.logprob, s.top[:num_top]) for s in start.prompt_logprobs]
        alone: CompletionLogprobs = {
            "tokens": [first],
            "token_logprobs": [None],
            "top_logprobs": [None],
            "text_offset": [0],
        }
        return _in_a_row(alone, self._logprobs(scored, len(first)))

    def _logprobs(self, logprobs: Sequence[TokenLogprob], offset: int) -> CompletionLogprobs:
        tokens = [self._vocabulary.token_text(scored.token) for scored in logprobs]
        return {
            "tokens": tokens,
            "token_logprobs": [finite(scored.logprob) for scored in logprobs],
            "top_logprobs": [self._top(scored) for scored in logprobs],
            "text_offset": list(accumulate(map(len, tokens[:-1]), initial=offset)) if tokens else [],
        }

    def _top(self, scored: TokenLogprob) -> dict[str, float]:
        """Return the top logprobs by text, with the chosen token's.

        Of tokens that look alike the likeliest counts.
        """
        by_text: dict[str, float] = {}
        for token, logprob in (*scored.top, (scored.token, scored.logprob)):
            by_text.setdefault(self._vocabulary.token_text(token), finite(logprob))
        return by_text

    def _prompt_logprobs(self, start: ChoiceStart, num_top: int) -> list[dict[str, PromptLogprob] | None]:
        """Return the prompt_logprobs of vLLM.

        They are null for the first token, and for the others by token id, the prompt's own first.
        """
        return [None, *(self._ranked(scored, num_top) for scored in start.prompt_logprobs)]

    def _ranked(self, scored: TokenLogprob, num_top: int) -> dict[str, PromptLogprob]:
        ranks = {token: rank for rank, (token, _) in enumerate(scored.top, start=1)}
        return {
            str(token): {
                "logprob": finite(logprob),
                "rank": ranks.get(token),
                "decoded_token": self._vocabulary.token_text(token),
            }
            for token, logprob in ((scored.token, scored.logprob), *scored.top[:num_top])
        }


def _text(parts: Sequence[Part]) -> str:
    return "".join(part.text for part in parts if isinstance(part, Content))


def _in_a_row(first: CompletionLogprobs | None, then: CompletionLogprobs | None) -> CompletionLogprobs | None:
    """Return the logprobs of two pieces joined."""
    if first is None or then is None:
        return None
    return {
        "tokens": first["tokens"] + then["tokens"],
        "token_logprobs": first["token_logprobs"] + then["token_logprobs"],
        "top_logprobs": first["top_logprobs"] + then["top_logprobs"],
        "text_offset": first["text_offset"] + then["text_offset"],
    }
