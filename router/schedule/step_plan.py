"""StepPlan: which tokens of which requests one step of the engine computes, and whose logits it needs. Frozen."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from router.model.attention import Chunk
from router.sampling.grammar import Guide
from router.sampling.sampler import prompt_logprobs
from router.schedule.running import RunningRequest


@dataclass(frozen=True, eq=False)
class PlannedChunk:
    """Consecutive tokens of one request in a step.

    samples: the request's next token is sampled from the chunk's last row. num_kept: how many of the chunk's rows, the
    last ones, need logits.
    """

    running: RunningRequest
    chunk: Chunk
    samples: bool
    num_kept: int

    @classmethod
    def of(cls, running: RunningRequest, count: int) -> Self:
        """Plan the next `count` tokens of a request that holds the blocks for them."""
        assert running.row is not None
        start, num_tokens = running.num_computed, len(running.tokens)
        samples = start + count == num_tokens
        scored = running.request.params.prompt_logprobs is not None and start < len(running.request.prompt)
        return cls(running, Chunk(running.row, start, count), samples, count if scored else int(samples))

    def score_prompt(self, logits_CV: Tensor) -> None:
        """Add the logprobs of the prompt's tokens that this chunk predicts to the request's answer.

        logits_CV: of all rows of the chunk. Row i gives the logprob of the token after it; the last row of a prompt
        gives that of the answer's first token, which is sampled instead.
        """
        prompt, start = self.running.request.prompt, self.chunk.start
        num_top = self.running.request.params.prompt_logprobs
        assert num_top is not None
        next_tokens = prompt[start + 1 : start + self.chunk.count + 1]
        if next_tokens:
            scores = prompt_logprobs(logits_CV[: len(next_tokens)], next_tokens, num_top=num_top)
            self.running.answer.score_prompt(start, scores)


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The rows of one step. A step that loses a shard is run again from its plan; nothing is committed before it succeeds.

    parts: in row order; those of one token, which attend as decoding rows, come first. chunks: theirs. tokens, positions:
    of each row. kept_rows: the rows whose logits are needed, ascending. guides: of the requests that are sampled and have
    a grammar.
    """

    parts: tuple[PlannedChunk, ...]
    chunks: list[Chunk]
    tokens: list[int]
    positions: list[int]
    kept_rows: list[int]
    guides: list[Guide]

    @classmethod
    def of(cls, counts: Iterable[tuple[RunningRequest, int]]) -> Self:
        """Plan the next tokens of these requests, so many of each."""
        parts = (PlannedChunk.of(running, count) for running, count in counts)
        return cls._of_parts(sorted(parts, key=lambda part: part.chunk.count > 1))

    @classmethod
    def _of_parts(cls, parts: Iterable[PlannedChunk]) -> Self:
        parts = tuple(parts)
        tokens: list[int] = []
        positions: list[int] = []
        kept_rows: list[int] = []
        for part in parts:
            start, end = part.chunk.start, part.chunk.start + part.chunk.count
            tokens += part.running.tokens[start:end]
            positions += range(start, end)
            kept_rows += range(len(tokens) - part.num_kept, len(tokens))
        guides = [part.running.guide for part in parts if part.samples and part.running.guide]
        return cls(parts, [part.chunk for part in parts], tokens, positions, kept_rows, guides)

    def one_by_one(self) -> list[Self]:
        """Return a plan for each request of this one."""
        return [self._of_parts([part]) for part in self.parts]

    def without(self, running: RunningRequest) -> Self | None:
        """Return the plan less one request; None if nothing is left."""
        parts = [part for part in self.parts if part.running is not running]
        return self._of_parts(parts) if parts else None
