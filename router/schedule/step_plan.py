"""StepPlan: which tokens of which requests one step computes, and whose logits it needs. Frozen."""

from dataclasses import dataclass, replace

from router.model.attention import Chunk
from router.schedule.running import RunningRequest


@dataclass(frozen=True, eq=False)
class PlannedChunk:
    """A chunk of a request's tokens; `samples` if the token after it is unknown yet."""

    running: RunningRequest
    chunk: Chunk
    samples: bool

    @property
    def num_kept(self) -> int:
        """How many of its rows, at its end, need logits."""
        prompt_rows = len(self.running.request.prompt) - self.chunk.start
        if self.running.request.params.prompt_logprobs is not None and prompt_rows > 0:
            return self.chunk.count
        return int(self.samples)


@dataclass(frozen=True, eq=False)
class StepPlan:
    """Frozen: a step that loses a shard is run again from it, and nothing is committed before it succeeds.

    parts in row order: those of one token, which attend as decoding rows, come first.
    """

    parts: tuple[PlannedChunk, ...]

    @property
    def chunks(self) -> list[Chunk]:
        return [part.chunk for part in self.parts]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.count for chunk in self.chunks)

    def tokens(self) -> list[int]:
        return [
            token
            for part in self.parts
            for token in part.running.tokens[part.chunk.start : part.chunk.start + part.chunk.count]
        ]

    def positions(self) -> list[int]:
        return [
            position for chunk in self.chunks for position in range(chunk.start, chunk.start + chunk.count)
        ]

    def kept_rows(self) -> list[int]:
        """Indices of the rows whose logits are needed."""
        rows: list[int] = []
        end = 0
        for part in self.parts:
            end += part.chunk.count
            rows.extend(range(end - part.num_kept, end))
        return rows

    def one_by_one(self) -> "list[StepPlan]":
        """A plan for each request."""
        return [StepPlan(parts=(part,)) for part in self.parts]

    def without(self, running: RunningRequest) -> "StepPlan | None":
        """The plan less one request; None if nothing is left."""
        parts = tuple(part for part in self.parts if part.running is not running)
        return replace(self, parts=parts) if parts else None
