"""Scheduler: whatever arrives and leaves, no step is too large, blocks are conserved and everybody who
decodes goes on."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.cache.block_tables import BlockTables
from router.request import Request, SamplingParams
from router.schedule.running import Answer, RunningRequest
from router.schedule.scheduler import Scheduler
from router.schedule.step_plan import StepPlan

NUM_BLOCKS, BLOCK_SIZE, MAX_REQUESTS = 8, 4, 3
MAX_TOKENS = NUM_BLOCKS * BLOCK_SIZE


class FakeAnswer(Answer):
    """An answer that counts. num_cached: as the scheduler told it."""

    def __init__(self) -> None:
        self.num_cached: int | None = None

    def begin(self, *, num_cached: int, queued_s: float) -> None:
        assert self.num_cached is None
        self.num_cached = num_cached


@dataclass(frozen=True)
class Client:
    """A client that arrives before a step, wants so many tokens, and leaves some steps later if it is not done by then.

    shared: so many of its prompt's first tokens are those of everybody.
    """

    arrives: int
    prompt: int
    shared: int
    wants: int
    patience: int
    scored: bool
    priority: int


@st.composite
def clients(draw: st.DrawFn) -> Client:
    prompt = draw(st.integers(1, MAX_TOKENS - 1))
    return Client(
        arrives=draw(st.integers(0, 20)),
        prompt=prompt,
        shared=draw(st.integers(0, prompt)),
        wants=draw(st.integers(1, MAX_TOKENS - prompt)),
        patience=draw(st.sampled_from([2, 5, 1000])),
        scored=draw(st.booleans()),
        priority=draw(st.sampled_from([0, 0, 0, 1, -1])),
    )


def request(
    name: str, prompt: int, *, shared: int = 0, scored: bool = False, priority: int = 0
) -> RunningRequest:
    params = SamplingParams(prompt_logprobs=0 if scored else None)
    tokens = [*range(shared), *(hash((name, place)) for place in range(prompt - shared))]
    return RunningRequest(Request(name, tuple(tokens), params, priority=priority), FakeAnswer(), seed=0)


def num_cached(live: RunningRequest) -> int | None:
    assert isinstance(live.answer, FakeAnswer)
    return live.answer.num_cached


def scheduler(
    *, max_batch_tokens: int, num_blocks: int = NUM_BLOCKS, max_requests: int = MAX_REQUESTS
) -> Scheduler:
    tables = BlockTables(
        num_blocks=num_blocks,
        block_size=BLOCK_SIZE,
        max_requests=max_requests,
        max_tokens=num_blocks * BLOCK_SIZE,
    )
    return Scheduler(tables, max_batch_tokens=max_batch_tokens)


def check_plan(plan: StepPlan, sched: Scheduler, *, max_batch_tokens: int) -> None:
    """Assert that each part is its request's next tokens, and rows and logits are where the engine looks for them."""
    assert 1 <= len(plan.tokens) <= max_batch_tokens
    assert len(plan.positions) == len(plan.tokens)
    assert len({chunk.row for chunk in plan.chunks}) == len(plan.parts)
    counts = [chunk.count for chunk in plan.chunks]
    assert counts == sorted(counts, key=lambda count: count > 1)
    assert len(plan.kept_rows) == sum(part.num_kept for part in plan.parts)
    end = 0
    for part in plan.parts:
        live, chunk = part.running, part.chunk
        end += chunk.count
        assert live in sched.running
        assert chunk.row == live.row
        assert chunk.start == live.num_computed
        assert chunk.count >= 1
        assert part.samples == (chunk.start + chunk.count == len(live.tokens))
        assert not part.samples or end - 1 in plan.kept_rows


def commit(sched: Scheduler, plan: StepPlan) -> list[RunningRequest]:
    """Commit a step as the engine does; returns who has a new token."""
    sampled = []
    for part in plan.parts:
        part.running.num_computed += part.chunk.count
        if part.samples:
            sched.prove(part.running)
            part.running.tokens.append(len(part.running.tokens))
            sampled.append(part.running)
    return sampled


class Simulation:
    """The scheduler driven as the engine drives it, every invariant checked at every step.

    computed: the tokens whose keys and values stand in a slot, as a step wrote them.
    """

    def __init__(self, all_clients: list[Client], *, max_batch_tokens: int) -> None:
        self.scheduler = scheduler(max_batch_tokens=max_batch_tokens)
        self.clients = sorted(all_clients, key=lambda client: client.arrives)
        self.max_batch_tokens = max_batch_tokens
        self.live: dict[RunningRequest, Client] = {}
        self.computed: dict[int, tuple[int, ...]] = {}
        self.now = 0

    def run(self) -> None:
        while self.live or self.clients:
            while self.clients and self.clients[0].arrives <= self.now:
                self.arrive(self.clients.pop(0))
            for live, client in list(self.live.items()):
                if self.now > client.arrives + client.patience:
                    self.leave(live)
            if self.live:
                self.step()
            self.now += 1
            assert self.now < 5000, "somebody waits for ever"
        assert self.scheduler.tables.num_free_blocks == NUM_BLOCKS

    def arrive(self, client: Client) -> None:
        name = str(len(self.clients))
        live = request(
            name, client.prompt, shared=client.shared, scored=client.scored, priority=client.priority
        )
        self.live[live] = client
        self.scheduler.add(live)

    def step(self) -> None:
        plan = self.scheduler.plan()
        self.scheduler.tables.check_integrity()
        check_plan(plan, self.scheduler, max_batch_tokens=self.max_batch_tokens)
        self.check_order(plan)
        self.write(plan)
        for live in commit(self.scheduler, plan):
            if len(live.tokens) == self.live[live].prompt + self.live[live].wants:
                self.leave(live)

    def check_order(self, plan: StepPlan) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        assert len(running) <= MAX_REQUESTS
        assert {*running, *waiting} == set(self.live)
        for ones in (running, waiting):
            assert ones == sorted(ones, key=lambda live: live.rank)
        planned = [part.running for part in plan.parts]
        assert all(live in planned for live in running if live.num_left == 1), "who decodes goes on"

    def write(self, plan: StepPlan) -> None:
        """Write into the slots what attention would; then each part must find its whole context there."""
        tables = self.scheduler.tables
        for part in plan.parts:
            chunk, tokens = part.chunk, part.running.tokens
            end = chunk.start + chunk.count
            for position, slot in zip(
                range(chunk.start, end), tables.slots(chunk.row, chunk.start, end), strict=True
            ):
                self.computed[int(slot)] = tuple(tokens[: position + 1])
        for part in plan.parts:
            end = part.chunk.start + part.chunk.count
            context = [self.computed[int(slot)] for slot in tables.slots(part.chunk.row, 0, end)]
            assert context == [tuple(part.running.tokens[: n + 1]) for n in range(end)]

    def leave(self, live: RunningRequest) -> None:
        self.scheduler.remove(live)
        del self.live[live]
        self.scheduler.tables.check_integrity()


@settings(max_examples=300)
@given(st.lists(clients(), min_size=1, max_size=8), st.sampled_from([3, 4, 7, 16, 100]))
def test_whatever_arrives_and_leaves(all_clients: list[Client], max_batch_tokens: int) -> None:
    Simulation(all_clients, max_batch_tokens=max_batch_tokens).run()


def test_decoding_goes_on_beside_a_long_prompt() -> None:
    sched = scheduler(max_batch_tokens=6)
    old, new = request("old", 2), request("new", 20)
    sched.add(old)
    commit(sched, sched.plan())
    sched.add(new)
    plan = sched.plan()
    assert [(part.running, part.chunk.count, part.samples) for part in plan.parts] == [
        (old, 1, True),
        (new, 5, False),
    ]


def test_a_short_prompt_overtakes_a_flood_of_long_ones() -> None:
    """It has its token in the next step, although the first long one is amid its prompt and many others wait."""
    sched = scheduler(max_batch_tokens=8, num_blocks=1000, max_requests=8)
    for n in range(50):
        sched.add(request(f"long {n}", 60))
    commit(sched, sched.plan())
    short = request("short", 5)
    sched.add(short)
    assert short in commit(sched, sched.plan())


def test_a_flood_of_short_prompts_does_not_starve_a_long_one() -> None:
    """While 60 tokens of others are computed, as many as it has itself, it may be overtaken; then no more."""
    sched = scheduler(max_batch_tokens=8, num_blocks=1000, max_requests=8)
    long = request("long", 60)
    sched.add(long)
    for n in range(25):
        sched.add(request(f"short {n}", 8))
        for live in commit(sched, sched.plan()):
            sched.remove(live)
            if live is long:
                assert n >= 7
                return
    raise AssertionError("still overtaken")


def test_the_last_in_rank_makes_room_and_comes_back_first() -> None:
    sched = scheduler(max_batch_tokens=100)
    first, second, third = (request(name, 12) for name in ("first", "second", "third"))
    for live in (first, second, third):
        sched.add(live)
    plan = sched.plan()
    assert [part.running for part in plan.parts] == [first, second]  # 3 blocks each, 2 are left
    while sched.num_preempted == 0:
        commit(sched, plan)
        plan = sched.plan()
    assert [part.running for part in plan.parts] == [first]
    assert sched.waiting == [second, third]
    assert second.num_computed == 0


def test_what_is_put_back_finds_what_it_had_computed() -> None:
    """All but its last block, in part full, and the block that the first one took."""
    sched = scheduler(max_batch_tokens=100, num_blocks=8)
    first, second = request("first", 15), request("second", 15)
    sched.add(first)
    sched.add(second)
    while sched.num_preempted == 0:
        plan = sched.plan()
        commit(sched, plan)
    sched.remove(first)
    sched.plan()
    assert second.num_computed == 12


def test_a_better_priority_need_not_wait() -> None:
    """For a row or for blocks, it takes those of the last in rank; among equals nobody is put back to let one
    in."""
    sched = scheduler(max_batch_tokens=100)
    ordinary = [request(name, 4) for name in ("a", "b", "c")]
    for live in ordinary:
        sched.add(live)
    commit(sched, sched.plan())
    sched.add(request("equal", 4))
    urgent = request("urgent", 12, priority=-1)
    sched.add(urgent)
    assert urgent in commit(sched, sched.plan())
    assert sched.running == [urgent, *ordinary[:2]]
    assert sched.num_preempted == 1


def test_a_prefix_is_computed_once() -> None:
    """By the first of many that arrive together; the others wait for it, and compute what follows."""
    sched = scheduler(max_batch_tokens=100, num_blocks=1000, max_requests=10)
    first, *others = [request("first", 20, shared=20)] + [request(str(n), 22, shared=20) for n in range(9)]
    for live in (first, *others):
        sched.add(live)
    commit(sched, plan := sched.plan())
    assert [part.running for part in plan.parts] == [first]
    commit(sched, plan := sched.plan())
    assert [num_cached(live) for live in (first, *others)] == [0] + [20] * 9
    assert len(plan.tokens) == 1 + 9 * 2


def test_the_last_token_is_always_computed() -> None:
    """Its logits are what the next one is sampled from."""
    sched = scheduler(max_batch_tokens=100, num_blocks=1000)
    for name in ("first", "same"):
        sched.add(live := request(name, 20, shared=20))
        commit(sched, sched.plan())
    assert num_cached(live) == 16


def test_scores_need_every_row() -> None:
    """Of a prompt whose tokens are to be scored nothing is looked up."""
    sched = scheduler(max_batch_tokens=100, num_blocks=1000)
    sched.add(request("first", 20, shared=20))
    commit(sched, sched.plan())
    scored = request("scored", 20, shared=20, scored=True)
    sched.add(scored)
    sched.plan()
    assert num_cached(scored) == 0


@pytest.mark.parametrize(("scored", "rows"), [(False, [5]), (True, [0, 1, 2, 3, 4, 5])])
def test_logits_are_kept_for_what_is_sampled_or_scored(scored: bool, rows: list[int]) -> None:
    sched = scheduler(max_batch_tokens=100)
    sched.add(request("one", 6, scored=scored))
    assert sched.plan().kept_rows == rows


def test_a_plan_loses_who_leaves() -> None:
    sched = scheduler(max_batch_tokens=100)
    one, other = request("one", 3), request("other", 3)
    sched.add(one)
    sched.add(other)
    plan = sched.plan().without(one)
    assert plan is not None
    assert [part.running for part in plan.parts] == [other]
    assert plan.without(other) is None
