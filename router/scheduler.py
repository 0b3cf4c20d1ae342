"""Scheduler: which tokens of which requests are computed in the next step.

Continuous batching: decoding requests and chunks of prompts share a step of at most `max_batch_tokens` tokens.
Oldest first; when blocks run out the youngest running request is put back and recomputed later.
"""

from collections import deque
from dataclasses import dataclass, field, replace

from router.answer import Answer
from router.attention import Chunk
from router.kv_cache import BlockTables
from router.request import Request


@dataclass(eq=False)
class RunningRequest:
    """A request inside the engine. tokens: prompt, then answer; num_computed of them are in the KV cache.

    seed: of its sampling noise, for its whole life. row: of the block tables; None while it waits.
    """

    request: Request
    answer: Answer
    seed: int
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    row: int | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)


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


class Scheduler:
    """Owns the queue and the block tables. running: in the order of admission, oldest first."""

    def __init__(self, tables: BlockTables, *, max_batch_tokens: int) -> None:
        self.tables = tables
        self.waiting: deque[RunningRequest] = deque()
        self.running: list[RunningRequest] = []
        self._max_batch_tokens = max_batch_tokens

    def add(self, live: RunningRequest) -> None:
        self.waiting.append(live)

    def plan(self) -> StepPlan:
        """The next step, not empty if there is a request. Takes rows and blocks, and may preempt."""
        parts: list[PlannedChunk] = []
        budget = self._max_batch_tokens
        num_running = len(self.running)
        for live in list(self.running):
            # A younger one may have been preempted by now.
            if budget and live.row is not None and self._make_room(live, budget):
                parts.append(_part(live, budget))
                budget -= parts[-1].chunk.count
        preempted = (
            len(self.running) < num_running
        )  # who was put back must not come in again by the next line
        while budget and not preempted and self.waiting and self._admit(self.waiting[0], budget):
            parts.append(_part(self.running[-1], budget))
            budget -= parts[-1].chunk.count
        parts.sort(key=lambda part: part.chunk.count > 1)  # stable: decoding rows first
        return StepPlan(parts=tuple(parts))

    def remove(self, live: RunningRequest) -> None:
        """Take a request out, finished or not; its row and blocks are free at once."""
        if live.row is None:
            self.waiting.remove(live)
        else:
            self._stop(live)

    def _admit(self, live: RunningRequest, budget: int) -> bool:
        """Let the first in the queue run, if there are a row and the blocks for its first chunk."""
        live.row = self.tables.take_row()
        if live.row is None:
            return False
        if not self._reserve(live, budget):
            self.tables.release(live.row)
            live.row = None
            return False
        self.waiting.popleft()
        self.running.append(live)
        return True

    def _make_room(self, live: RunningRequest, budget: int) -> bool:
        """Blocks for a running request's next chunk, if need be the youngest one's. False: it was the youngest."""
        while not self._reserve(live, budget):
            youngest = self.running[-1]
            self._stop(youngest)
            youngest.num_computed = 0
            self.waiting.appendleft(youngest)
            if youngest is live:
                return False
        return True

    def _reserve(self, live: RunningRequest, budget: int) -> bool:
        assert live.row is not None
        return self.tables.reserve(live.row, live.num_computed + _count(live, budget))

    def _stop(self, live: RunningRequest) -> None:
        assert live.row is not None
        self.tables.release(live.row)
        live.row = None
        self.running.remove(live)


def _count(live: RunningRequest, budget: int) -> int:
    return min(len(live.tokens) - live.num_computed, budget)


def _part(live: RunningRequest, budget: int) -> PlannedChunk:
    """The next tokens of a request that holds the blocks for them."""
    assert live.row is not None
    start, count = live.num_computed, _count(live, budget)
    chunk = Chunk(row=live.row, start=start, count=count)
    return PlannedChunk(running=live, chunk=chunk, samples=start + count == len(live.tokens))
