"""Scheduler: which tokens of which requests are computed in the next step.

A step has at most `max_batch_tokens` tokens: one of each request that decodes, and with what is left chunks of prompts.
Requests are served in the order of their rank: (priority, due). `due` counts tokens: those of all prompts computed by the
time a request came, plus its own. So a short prompt overtakes long ones, and no request is overtaken by more prompt
tokens than it has itself: a flood of long prompts delays a short one little, a flood of short ones no long one for ever.

A request is admitted when there are blocks for all its tokens. When decoding runs out of blocks, the running request of
the last rank is preempted; what it had computed it finds in the prefix cache, unless its blocks were needed.
"""

from bisect import insort

from router.cache.block_tables import BlockTables, extend_keys
from router.schedule.running import RunningRequest
from router.schedule.step_plan import StepPlan


class Scheduler:
    """Owns the queue and the block tables. running and waiting are sorted by rank.

    It counts, since the start: num_preempted, requests that were preempted; num_looked_up, tokens looked up in the prefix
    cache; num_found, those of them that were there.
    """

    def __init__(self, tables: BlockTables, *, max_batch_tokens: int) -> None:
        self.tables = tables
        self.waiting: list[RunningRequest] = []
        self.running: list[RunningRequest] = []
        self.num_preempted = 0
        self.num_looked_up = 0
        self.num_found = 0
        self._max_batch_tokens = max_batch_tokens
        self._num_prompt_tokens = 0  # planned so far: the clock of `due`
        self._num_added = 0

    def add(self, live: RunningRequest) -> None:
        """Queue a request."""
        due = self._num_prompt_tokens + len(live.tokens)
        self._num_added += 1
        live.rank = (live.request.priority, due, self._num_added)
        insort(self.waiting, live, key=_rank)

    def plan(self) -> StepPlan:
        """Return the next step, not empty if there is a request. Takes rows and blocks, and may preempt requests."""
        self._admit_waiting()
        decoding: list[RunningRequest] = []
        prompts: list[RunningRequest] = []
        for live in self.running:
            (decoding if live.num_left == 1 else prompts).append(live)
        # One of a later rank may be preempted to make room for an earlier one.
        counts = [(live, 1) for live in decoding if live.row is not None and self._make_room(live)]
        budget = self._max_batch_tokens - len(counts)
        for live in prompts:
            if live.row is not None and budget > 0:
                count = min(live.num_left, budget)
                counts.append((live, count))
                budget -= count
                self._num_prompt_tokens += count
        return StepPlan.of(counts)

    def prove(self, live: RunningRequest) -> None:
        """Let other requests share the full blocks of one whose logits were finite: all that it computed is sound."""
        assert live.row is not None
        self.tables.prove(live.row, live.num_computed, live.block_keys, live.tokens)

    def remove(self, live: RunningRequest) -> None:
        """Take a request out, finished or not; its row and blocks are free at once."""
        if live.row is None:
            self.waiting.remove(live)
        else:
            self._stop(live)

    def _admit_waiting(self) -> None:
        """Start waiting requests as long as the next step has tokens to spare for the first of them."""
        while self.waiting:
            first = self.waiting[0]
            ahead = sum(
                live.num_left for live in self.running if live.num_left == 1 or live.rank < first.rank
            )
            if ahead >= self._max_batch_tokens or not (
                self.tables.num_free_rows or self._may_preempt_for(first)
            ):
                return
            keys = self._keys_to_find(first)
            num_found = self.tables.num_found(keys)
            if self._is_being_computed(first, keys[num_found : num_found + 1], place=num_found):
                return
            while not self._admit(first, keys[:num_found]):
                if not self._may_preempt_for(first):
                    return
                self._preempt(self.running[-1])

    def _may_preempt_for(self, first: RunningRequest) -> bool:
        """Return whether a request of a later priority runs."""
        return bool(self.running) and self.running[-1].request.priority > first.request.priority

    def _admit(self, live: RunningRequest, found: list[bytes]) -> bool:
        """Let the first of the queue run, if there are a row and blocks for all its tokens, and some to spare for others."""
        row = self.tables.take_row()
        if row is None:
            return False
        self.tables.share(row, found)
        spare = self.tables.num_blocks // 100 if self.running else 0
        if not self.tables.reserve(row, len(live.tokens), spare=spare):
            self.tables.release(row)
            return False
        live.row = row
        live.num_computed = len(found) * self.tables.block_size
        if not live.began:
            live.begin()
            self.num_looked_up += len(live.tokens)
            self.num_found += live.num_computed
        self.waiting.remove(live)
        insort(self.running, live, key=_rank)
        return True

    def _keys_to_find(self, live: RunningRequest) -> list[bytes]:
        """Return the keys of the blocks that need not be computed, if they are cached.

        The last token's block is never among them; none is, if the logits of all rows are wanted.
        """
        if live.request.params.prompt_logprobs is not None:
            return []
        extend_keys(live.block_keys, live.tokens, self.tables.block_size)
        return live.block_keys[: (len(live.tokens) - 1) // self.tables.block_size]

    def _is_being_computed(self, live: RunningRequest, next_key: list[bytes], *, place: int) -> bool:
        """Return whether a running prompt computes the request's next block: many may begin with the same text."""
        return bool(next_key) and any(
            other.num_left > 1 and other.rank < live.rank and other.block_keys[place : place + 1] == next_key
            for other in self.running
        )

    def _make_room(self, live: RunningRequest) -> bool:
        """Reserve a block for a running request's next token, if need be from the last one. False: it was the last."""
        assert live.row is not None
        while not self.tables.reserve(live.row, len(live.tokens)):
            last = self.running[-1]
            self._preempt(last)
            if last is live:
                return False
        return True

    def _preempt(self, live: RunningRequest) -> None:
        self._stop(live)
        live.num_computed = 0
        insort(self.waiting, live, key=_rank)
        self.num_preempted += 1

    def _stop(self, live: RunningRequest) -> None:
        assert live.row is not None
        self.tables.release(live.row)
        live.row = None
        self.running.remove(live)


def _rank(live: RunningRequest) -> tuple[int, int, int]:
    return live.rank
