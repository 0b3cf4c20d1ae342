"""Whatever arrives, leaves and fails, and however small the memory: every token is the one that transformers
gives."""

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from experts.fabric.faulty import FaultyFabric, Lost
from experts.fabric.local import LocalFabric
from experts.shard import ExpertShard
from router.config import KVCacheConfig, RouterConfig
from router.request import Request, SamplingParams
from router.schedule.roster import MAX_FAILURES
from tests.support.families import VOCAB_SIZE, write_nvfp4
from tests.support.in_process import in_process
from tests.support.oracle import Continuation, Oracle, assert_same_tokens

NUM_SHARDS, NUM_LAYERS = 2, 3
NUM_TOKENS = 16
BYTES_PER_TOKEN = 768
LENGTHS = (1, 2, 3, 8, 15, 16, 17, 31, 32, 33, 48, 60)


def text(seed: int) -> list[int]:
    return [(seed * n * n + 31 * n + seed) % VOCAB_SIZE for n in range(LENGTHS[-1])]


# Most begin alike, up to the middle of a block or its end.
PROMPTS = [text(5)[:length] for length in LENGTHS]
PROMPTS += [text(5)[:length] + text(7)[: 60 - length] for length in LENGTHS[2:-1]]
PROMPTS += [text(7)[:length] for length in LENGTHS[::3]]


@dataclass(frozen=True)
class Arrival:
    """A request that arrives. prompt: its place in PROMPTS."""

    prompt: int
    num_tokens: int
    priority: int
    scored: int | None


ARRIVALS = st.builds(
    Arrival,
    prompt=st.integers(0, len(PROMPTS) - 1),
    num_tokens=st.integers(1, NUM_TOKENS),
    priority=st.sampled_from([0, 0, 0, 1, -1]),
    scored=st.sampled_from([None, None, None, 1]),
)


@functools.cache
def model() -> Path:
    return write_nvfp4("qwen3_moe", Path(tempfile.mkdtemp()) / "qwen3_moe")


@functools.cache
def expected() -> list[Continuation]:
    return Oracle(model()).generate(PROMPTS, NUM_TOKENS)


class Clients(RuleBasedStateMachine):
    """Clients that come and go in any order between the steps of an engine that runs in this thread."""

    @initialize(
        max_requests=st.integers(1, 5),
        budget=st.sampled_from([5, 6, 9, 16, 33, 200]),
        block_size=st.sampled_from([1, 3, 4, 8, 16]),
        spare_tokens=st.sampled_from([0, 0, 10, 50, 400]),
    )
    def start(self, max_requests: int, budget: int, block_size: int, spare_tokens: int) -> None:
        """Start an engine whose pool holds the longest request, and so many tokens more."""
        num_blocks = -(-(LENGTHS[-1] + NUM_TOKENS) // block_size) + spare_tokens // block_size
        memory_gib = (num_blocks + 0.5) * block_size * BYTES_PER_TOKEN / 2**30
        self.in_process = in_process(
            model(),
            num_shards=NUM_SHARDS,
            config=RouterConfig(
                max_requests=max_requests,
                max_batch_tokens=budget,
                kv_cache=KVCacheConfig(block_size=block_size, memory_gib=memory_gib),
            ),
            fabric=self.make_fabric,
        )
        self.server = self.in_process.__enter__()
        self.prompt_of: dict[str, int] = {}

    def make_fabric(self, shards: Sequence[ExpertShard]) -> FaultyFabric:
        self.fabric = FaultyFabric(LocalFabric(shards), [])
        return self.fabric

    @rule(some=st.lists(ARRIVALS, min_size=1, max_size=4))
    def arrive(self, some: list[Arrival]) -> None:
        for one in some:
            name = str(len(self.prompt_of))
            self.prompt_of[name] = one.prompt
            params = SamplingParams(
                max_tokens=one.num_tokens, temperature=0, ignore_eos=True, prompt_logprobs=one.scored
            )
            prompt = tuple(PROMPTS[one.prompt])
            self.server.submit(Request(name, prompt, params, priority=one.priority))

    @precondition(lambda self: any(not answer.finish for answer in self.server.answers.values()))
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        live = [name for name, answer in self.server.answers.items() if not answer.finish]
        self.server.cancel(data.draw(st.sampled_from(live)))

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.server.engine.turn(wait_s=0)

    @precondition(lambda self: self.server.engine._roster.num_failures < MAX_FAILURES - 1)
    @rule(rank=st.integers(0, NUM_SHARDS - 1), layer=st.integers(0, NUM_LAYERS - 1))
    def lose_a_shard(self, rank: int, layer: int) -> None:
        """Lose a shard in the next step that there is, unless that may make the engine give a request up. Layer 1 is dense: nothing
        is lost there."""
        next_step = self.server.engine.status().num_steps
        self.fabric.pending[:] = [Lost(rank=rank, step=next_step, layer=layer)]

    def teardown(self) -> None:
        if not hasattr(self, "server"):
            return
        try:
            self.finish()
        finally:
            self.server.engine.stop()

    def finish(self) -> None:
        for _ in range(2000):
            if all(answer.finish for answer in self.server.answers.values()):
                break
            self.server.engine.turn(wait_s=0)
        self.server.engine.turn(wait_s=0)  # the last cancellations
        status = self.server.engine.status()
        assert (status.num_running, status.num_waiting) == (0, 0), "somebody waits for ever"
        assert status.num_free_blocks == status.num_blocks
        for name, answer in self.server.answers.items():
            assert answer.finish in ("length", "cancelled"), answer.error
            prompt = self.prompt_of[name]
            assert_same_tokens(answer.tokens, expected()[prompt], what=f"prompt {prompt}")
            scored = [one.token for one in answer.prompt_logprobs]
            assert scored in ([], PROMPTS[prompt][1:])


@pytest.mark.parametrize("num_runs", [12, pytest.param(120, marks=pytest.mark.slow)])
def test_every_token_is_transformers(num_runs: int) -> None:
    run_state_machine_as_test(Clients, settings=settings(max_examples=num_runs, stateful_step_count=30))
