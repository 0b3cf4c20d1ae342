"""Answer: what one request has been told so far, and when it is done."""

from collections.abc import Sequence
from typing import Any

from router.request import FinishReason, Request, RequestOutput, TokenLogprob
from router.sampling.sampler import Sampled
from router.text.tokenizer import Detokenizer


class Answer:
    """Turns sampled tokens into output, and stops at an end token, a stop string or the length limit."""

    def __init__(
        self, request: Request, detokenizer: Detokenizer, *, eos: frozenset[int], max_model_len: int
    ) -> None:
        params = request.params
        self.request = request
        self.num_tokens = 0
        """Sampled so far."""
        self._detokenizer = detokenizer
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
        room = max_model_len - len(request.prompt)
        self._max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self._prompt_logprobs: list[TokenLogprob] = []
        self._num_scored = 0
        self._num_cached = 0
        self._queued_s = 0.0

    @property
    def banned(self) -> frozenset[int]:
        """Tokens that may not come next: before min_tokens, those that would end it."""
        return self._ends if self.num_tokens < self.request.params.min_tokens else frozenset()

    def begin(self, *, num_cached: int, queued_s: float) -> None:
        """What the first output tells, see RequestOutput."""
        self._num_cached, self._queued_s = num_cached, queued_s

    def score_prompt(self, start: int, logprobs: Sequence[TokenLogprob]) -> None:
        """Scores from the start-th on, kept until the first output. Ones that a preempted request got already are not new."""
        self._prompt_logprobs.extend(logprobs[max(0, self._num_scored - start) :])
        self._num_scored = max(self._num_scored, start + len(logprobs))

    def push(self, sampled: Sampled, *, complete: bool = False) -> RequestOutput:
        """The output of one more token. An end token is reported, but is not part of the text.

        complete: a grammar lets nothing follow. With max_tokens=0 the token is not told of.
        """
        if self._max_tokens == 0:
            return self._output(finish="length")
        self.num_tokens += 1
        ended = sampled.token in self._ends and self.num_tokens > self.request.params.min_tokens
        text = "" if ended else self._read(sampled.token)
        finish = self._finish(ended or complete)
        if finish and not self._detokenizer.stopped:
            text += self._detokenizer.flush()
        return self._output(
            text=text,
            tokens=(sampled.token,),
            logprobs=(sampled.logprob,) if sampled.logprob else (),
            finish=finish,
            stop_reason=self._stop_reason(sampled.token),
        )

    def expire(self) -> RequestOutput:
        """The last output of a request whose time is up."""
        return self._output(text=self._detokenizer.flush(), finish="timeout")

    def _read(self, token: int) -> str:
        return self._detokenizer.push([token], may_stop=self.num_tokens > self.request.params.min_tokens)

    def _finish(self, ended: bool) -> FinishReason | None:
        if ended or self._detokenizer.stopped:
            return "stop"
        return "length" if self.num_tokens >= self._max_tokens else None

    def _stop_reason(self, token: int) -> str | int | None:
        """A stop string, or a token that the request, not the model, calls an end."""
        asked_for = (
            token in self.request.params.stop_token_ids and self.num_tokens > self.request.params.min_tokens
        )
        return token if asked_for else self._detokenizer.stopped

    def _output(self, **parts: Any) -> RequestOutput:
        """With what the first output tells of the prompt."""
        prompt_logprobs, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        num_cached, queued_s = self._num_cached, self._queued_s
        self.begin(num_cached=0, queued_s=0.0)
        return RequestOutput(
            id=self.request.id,
            prompt_logprobs=prompt_logprobs,
            num_cached=num_cached,
            queued_s=queued_s,
            **parts,
        )
