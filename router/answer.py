"""Answer: what one request has been told so far, and when it is done."""

from collections.abc import Sequence

from router.request import FinishReason, Request, RequestOutput, TokenLogprob
from router.sampler import Sampled
from router.tokenizer import Detokenizer


class Answer:
    """Turns sampled tokens into output, and stops at an end token, a stop string or the length limit."""

    def __init__(
        self, request: Request, detokenizer: Detokenizer, *, eos: frozenset[int], max_model_len: int
    ) -> None:
        params = request.params
        self.request = request
        self._detokenizer = detokenizer
        self._ends = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos)
        room = max_model_len - len(request.prompt)
        self._max_tokens = room if params.max_tokens is None else min(room, params.max_tokens)
        self.num_tokens = 0
        """Sampled so far."""
        self._prompt_logprobs: list[TokenLogprob] = []
        self._num_scored = 0

    def score_prompt(self, start: int, logprobs: Sequence[TokenLogprob]) -> None:
        """Scores from the start-th on, kept until the first output. Ones that a preempted request got already are not new."""
        self._prompt_logprobs.extend(logprobs[max(0, self._num_scored - start) :])
        self._num_scored = max(self._num_scored, start + len(logprobs))

    def push(self, sampled: Sampled) -> RequestOutput:
        """The output of one more token. An end token is reported, but is not part of the text."""
        self.num_tokens += 1
        ended = sampled.token in self._ends
        text = "" if ended else self._detokenizer.push([sampled.token])
        finish = self._finish(ended)
        if finish and not self._detokenizer.stopped:
            text += self._detokenizer.flush()
        prompt_logprobs, self._prompt_logprobs = tuple(self._prompt_logprobs), []
        return RequestOutput(
            id=self.request.id,
            text=text,
            tokens=(sampled.token,),
            logprobs=(sampled.logprob,) if sampled.logprob else (),
            prompt_logprobs=prompt_logprobs,
            finish=finish,
        )

    def _finish(self, ended: bool) -> FinishReason | None:
        if ended or self._detokenizer.stopped:
            return "stop"
        return "length" if self.num_tokens >= self._max_tokens else None
