"""RunningRequest: a request inside the engine, waiting or running, and its Answer: what its client has been told so far."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from router.request import FinishReason, Request, RequestOutput, TokenLogprob
from router.sampling.grammar import Guide
from router.sampling.sampler import Sampled, SamplingRow
from router.text.detokenizer import Detokenizer


@dataclass(eq=False)
class RunningRequest:
    """One request from its arrival at the engine to its last output. Lives in the engine's thread.

    tokens: the prompt's, then the answer's; num_computed of them have their keys and values in the KV cache.
    seed: of the sampling noise, for the request's whole life. guide: of its grammar, if it has one.
    came_at, deadline: seconds on the monotonic clock. began: it has been scheduled at least once.
    block_keys: prefix cache keys of its full blocks, as far as they were needed, see extend_keys.
    rank: its place in the order of all requests, lower ones first. row: of the block tables; None while it waits.
    """

    request: Request
    answer: "Answer"
    seed: int
    guide: Guide | None = None
    came_at: float = 0.0
    deadline: float = math.inf
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    began: bool = False
    block_keys: list[bytes] = field(default_factory=list)
    rank: tuple[int, int, int] = (0, 0, 0)
    row: int | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def num_left(self) -> int:
        """The number of tokens to compute until the next one can be sampled: 1 while the request decodes."""
        return len(self.tokens) - self.num_computed

    def begin(self) -> None:
        """Note the first scheduling: what is computed by now was found in the prefix cache."""
        self.began = True
        self.answer.begin(num_cached=self.num_computed, queued_s=time.monotonic() - self.came_at)

    def sampling_row(self) -> SamplingRow:
        """Return what the sampler must know. With a grammar it is the grammar that decides when a text may end."""
        return SamplingRow(
            self.request.params,
            self.seed,
            tokens=self.tokens,
            num_prompt=len(self.request.prompt),
            banned=frozenset() if self.guide else self.answer.banned,
            allowed=self.guide.allowed() if self.guide else None,
        )


class Answer:
    """One request's output: turns sampled tokens into text and stops at an end token, a stop string or the length limit."""

    def __init__(
        self, request: Request, detokenizer: Detokenizer, *, eos: frozenset[int], max_model_len: int
    ) -> None:
        params = request.params
        self.request = request
        self.num_tokens = 0  # sampled so far
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
        """The tokens that may not come next: before min_tokens, those that would end the text."""
        return self._ends if self.num_tokens < self.request.params.min_tokens else frozenset()

    def begin(self, *, num_cached: int, queued_s: float) -> None:
        """Note what the first output is to tell, see RequestOutput."""
        self._num_cached, self._queued_s = num_cached, queued_s

    def score_prompt(self, start: int, logprobs: Sequence[TokenLogprob]) -> None:
        """Keep the prompt's logprobs from the start-th on for the first output.

        A preempted request computes its prompt again: scores that it has already are left out.
        """
        self._prompt_logprobs.extend(logprobs[max(0, self._num_scored - start) :])
        self._num_scored = max(self._num_scored, start + len(logprobs))

    def push(self, sampled: Sampled, *, complete: bool = False) -> RequestOutput:
        """Return the output of one more token. An end token is reported, but is not part of the text.

        complete: the request's grammar lets nothing follow. With max_tokens=0 the token is not reported.
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
        """Return the last output of a request whose time is up: the text that is kept back."""
        return self._output(text=self._detokenizer.flush(), finish="timeout")

    def _read(self, token: int) -> str:
        return self._detokenizer.push([token], may_stop=self.num_tokens > self.request.params.min_tokens)

    def _finish(self, ended: bool) -> FinishReason | None:
        if ended or self._detokenizer.stopped:
            return "stop"
        return "length" if self.num_tokens >= self._max_tokens else None

    def _stop_reason(self, token: int) -> str | int | None:
        """Return the stop string, or the end token if the request, not the model, calls it one."""
        asked_for = (
            token in self.request.params.stop_token_ids and self.num_tokens > self.request.params.min_tokens
        )
        return token if asked_for else self._detokenizer.stopped

    def _output(self, **parts: Any) -> RequestOutput:
        """Return an output, and in the first one what there is to tell of the prompt."""
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
