"""Scheduler: whatever arrives and leaves, no step is too large, blocks are conserved and the oldest goes on."""

from dataclasses import dataclass
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.answer import Answer
from router.kv_cache import BlockTables
from router.request import Request, SamplingParams
from router.scheduler import RunningRequest, Scheduler, StepPlan

NUM_BLOCKS, BLOCK_SIZE, MAX_REQUESTS = 8, 4, 3
MAX_TOKENS = NUM_BLOCKS * BLOCK_SIZE

NO_ANSWER = cast(Answer, None)  # the scheduler never looks at it


@dataclass(frozen=True)
class Client:
    """Arrives before a step, wants so many tokens, and leaves some steps later if it is not done by then."""

    arrives: int
    prompt: int
    wants: int
    patience: int
    scored: bool


@st.composite
def clients(draw: st.DrawFn) -> Client:
    prompt = draw(st.integers(1, MAX_TOKENS - 1))
    return Client(
        arrives=draw(st.integers(0, 20)),
        prompt=prompt,
        wants=draw(st.integers(1, MAX_TOKENS - prompt)),
        patience=draw(st.sampled_from([2, 5, 1000])),
        scored=draw(st.booleans()),
    )


def request(name: str, prompt: int, *, scored: bool = False) -> RunningRequest:
    params = SamplingParams(prompt_logprobs=0 if scored else None)
    return RunningRequest(Request(name, tuple(range(prompt)), params), NO_ANSWER, seed=0)


def scheduler(*, max_batch_tokens: int) -> Scheduler:
    tables = BlockTables(
        num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE, max_requests=MAX_REQUESTS, max_tokens=MAX_TOKENS
    )
    return Scheduler(tables, max_batch_tokens=max_batch_tokens)


def check_plan(plan: StepPlan, sched: Scheduler, *, max_batch_tokens: int) -> None:
    """Each part is its request's next tokens, and rows and logits are where the engine looks for them."""
    assert 1 <= plan.num_tokens <= max_batch_tokens
    assert len(plan.tokens()) == len(plan.positions()) == plan.num_tokens
    assert len({chunk.row for chunk in plan.chunks}) == len(plan.parts)
    counts = [chunk.count for chunk in plan.chunks]
    assert counts == sorted(counts, key=lambda count: count > 1)
    assert len(plan.kept_rows()) == sum(part.num_kept for part in plan.parts)
    end = 0
    for part in plan.parts:
        live, chunk = part.running, part.chunk
        end += chunk.count
        assert live in sched.running
        assert chunk.row == live.row
        assert chunk.start == live.num_computed
        assert chunk.count >= 1
        assert part.samples == (chunk.start + chunk.count == len(live.tokens))
        assert not part.samples or end - 1 in plan.kept_rows()


class Simulation:
    """The scheduler driven as the engine drives it, every invariant checked at every step."""

    def __init__(self, all_clients: list[Client], *, max_batch_tokens: int) -> None:
        self.scheduler = scheduler(max_batch_tokens=max_batch_tokens)
        self.clients = sorted(all_clients, key=lambda client: client.arrives)
        self.max_batch_tokens = max_batch_tokens
        self.live: dict[RunningRequest, Client] = {}
        self.now = 0

    def run(self) -> None:
        while self.live or self.clients:
            while self.clients and self.clients[0].arrives <= self.now:
                client = self.clients.pop(0)
                live = request(str(len(self.clients)), client.prompt, scored=client.scored)
                self.live[live] = client
                self.scheduler.add(live)
            for live, client in list(self.live.items()):
                if self.now > client.arrives + client.patience:
                    self.leave(live)
            if self.live:
                self.step()
            self.now += 1
            assert self.now < 5000
        assert self.scheduler.tables.num_free_blocks == NUM_BLOCKS

    def step(self) -> None:
        plan = self.scheduler.plan()
        self.scheduler.tables.check_integrity()
        check_plan(plan, self.scheduler, max_batch_tokens=self.max_batch_tokens)
        assert len(self.scheduler.running) <= MAX_REQUESTS
        assert [*self.scheduler.running, *self.scheduler.waiting] == list(self.live)  # in order of arrival
        assert next(iter(self.live)) in [part.running for part in plan.parts]  # so nobody starves
        for part in plan.parts:
            part.running.num_computed += part.chunk.count
            if part.samples:
                part.running.tokens.append(0)
            if len(part.running.tokens) == self.wanted(part.running):
                self.leave(part.running)

    def wanted(self, live: RunningRequest) -> int:
        return self.live[live].prompt + self.live[live].wants

    def leave(self, live: RunningRequest) -> None:
        self.scheduler.remove(live)
        del self.live[live]
        self.scheduler.tables.check_integrity()


@settings(max_examples=200)
@given(st.lists(clients(), min_size=1, max_size=8), st.sampled_from([1, 2, 3, 7, 16, 100]))
def test_whatever_arrives_and_leaves(all_clients: list[Client], max_batch_tokens: int) -> None:
    Simulation(all_clients, max_batch_tokens=max_batch_tokens).run()


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    sched = scheduler(max_batch_tokens=6)
    old, new = request("old", 2), request("new", 20)
    sched.add(old)
    sched.plan()
    old.num_computed, old.tokens = 2, [*old.tokens, 9]
    sched.add(new)
    plan = sched.plan()
    assert [(part.running, part.chunk.count, part.samples) for part in plan.parts] == [
        (old, 1, True),
        (new, 5, False),
    ]


def test_the_youngest_makes_room_and_comes_back_first() -> None:
    sched = scheduler(max_batch_tokens=100)
    first, second, third = (request(name, 12) for name in ("first", "second", "third"))
    for live in (first, second, third):
        sched.add(live)
    plan = sched.plan()
    assert [part.running for part in plan.parts] == [first, second]  # 3 blocks each, 2 are left
    for live in (first, second):
        live.num_computed, live.tokens = 12, live.tokens + [0] * 5  # both want 2 more blocks
    plan = sched.plan()
    assert [part.running for part in plan.parts] == [first]
    assert list(sched.waiting) == [second, third]
    assert second.num_computed == 0


@pytest.mark.parametrize(("scored", "rows"), [(False, [5]), (True, [0, 1, 2, 3, 4, 5])])
def test_logits_are_kept_for_what_is_sampled_or_scored(scored: bool, rows: list[int]) -> None:
    sched = scheduler(max_batch_tokens=100)
    sched.add(request("one", 6, scored=scored))
    assert sched.plan().kept_rows() == rows


def test_a_plan_loses_who_leaves() -> None:
    sched = scheduler(max_batch_tokens=100)
    one, other = request("one", 3), request("other", 3)
    sched.add(one)
    sched.add(other)
    plan = sched.plan().without(one)
    assert plan is not None
    assert [part.running for part in plan.parts] == [other]
    assert plan.without(other) is None
