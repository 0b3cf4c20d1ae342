"""Tests that what goes wrong for one request does not touch the others."""

import pkgutil
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experts.fabric import Membership, PeerLost, ShardFailed, StepHeader, Ticket
from experts.fabric.faulty import Lost
from experts.fabric.local import LocalFabric, local_membership
from experts.shard import ExpertShard
from router.config import KVCacheConfig, RouterConfig
from router.engine import QueueFull
from router.request import Request, SamplingParams
from router.schedule.roster import MAX_FAILURES
from tests.support.families import VOCAB_SIZE, write_nvfp4
from tests.support.in_process import Joined, faulty, greedy, in_process

NUM_TOKENS = 12
PROMPTS = [[(7 * n + 5 * i) % VOCAB_SIZE for i in range(length)] for n, length in enumerate((3, 20, 9))]
REQUESTS = [greedy(str(n), prompt, num_tokens=NUM_TOKENS) for n, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_nvfp4("qwen3_moe", tmp_path_factory.mktemp("model") / "qwen3_moe")


@pytest.fixture(scope="module")
def undisturbed(model: Path) -> dict[str, Joined]:
    with in_process(model, num_shards=2) as server:
        return server.run(REQUESTS)


class PoisonFabric(LocalFabric):
    """A fabric in which the experts' output of one row of one step is NaN, and with it what later layers
    write to the KV cache."""

    def __init__(self, shards: Sequence[ExpertShard], *, step: int, row: int) -> None:
        super().__init__(shards)
        self._poison = (step, row)
        self._step = -1

    def begin(self, header: StepHeader) -> None:
        self._step = header.step
        super().begin(header)

    def combine(self, ticket: Ticket, out_TD: Tensor) -> None:
        super().combine(ticket, out_TD)
        step, row = self._poison
        if self._step == step and ticket.layer == 0:
            out_TD[row] = torch.nan


class FragileFabric(LocalFabric):
    """A fabric in which a step of so many rows or more goes wrong, every time."""

    def __init__(
        self, shards: Sequence[ExpertShard], *, rows: int, error: type[PeerLost | ShardFailed]
    ) -> None:
        super().__init__(shards)
        self._rows = rows
        self._error = error
        self.num_failures = 0

    def combine(self, ticket: Ticket, out_TD: Tensor) -> None:
        super().combine(ticket, out_TD)
        if ticket.rows >= self._rows:
            self.num_failures += 1
            raise self._error([0], epoch=1, step=0, layer=0, elapsed_s=0.0, why="out of memory")


@pytest.mark.parametrize("error", [PeerLost, ShardFailed])
def test_a_request_that_shards_fail_in_again_and_again_is_given_up(
    model: Path, undisturbed: dict[str, Joined], error: type[PeerLost | ShardFailed]
) -> None:
    """The second one's prompt of 20 tokens is too much, alone and together with the others.

    One that says why it failed lives: it is only reported, and replaced, if that happens twice.
    """
    fabrics: list[FragileFabric] = []

    def fragile(shards: Sequence[ExpertShard]) -> LocalFabric:
        fabrics.append(FragileFabric(shards, rows=20, error=error))
        return fabrics[0]

    with in_process(model, num_shards=2, fabric=fragile) as server:
        answers = server.run(REQUESTS, failing={"1"})
        assert len(server.losses) == (MAX_FAILURES if error is PeerLost else 1)
    assert fabrics[0].num_failures == MAX_FAILURES
    assert answers["1"].error == "the expert shards failed in each of its steps"
    for name in ("0", "2"):
        assert answers[name].tokens == undisturbed[name].tokens


def test_logits_that_are_not_finite_fail_one_request(model: Path, undisturbed: dict[str, Joined]) -> None:
    """Of three that decode, the one with the longest prompt.

    A fourth then gets its block, the only one that is free.
    """
    config = RouterConfig(kv_cache=KVCacheConfig(block_size=40, memory_gib=3.5 * 40 * 768 / 2**30))
    again = greedy("again", PROMPTS[1], num_tokens=NUM_TOKENS)
    fabric = partial(PoisonFabric, step=4, row=2)
    with in_process(model, num_shards=2, config=config, fabric=fabric) as server:
        server.engine.at_step[5] = partial(server.submit, again)
        answers = server.run(REQUESTS, failing={"1"})
    assert answers["1"].error == "the model computed logits that are not finite"
    assert answers["1"].tokens == undisturbed["1"].tokens[:4]
    for name, same_as in (("0", "0"), ("2", "2"), ("again", "1")):
        assert answers[name].tokens == undisturbed[same_as].tokens


def test_a_prompt_that_can_never_run_is_refused(model: Path) -> None:
    with in_process(model, num_shards=2) as server:
        for prompt, why in (
            ((), "has 0 tokens; at least 1 and at most 511 fit"),
            ((1,) * 512, "has 512 tokens"),
            ((1, VOCAB_SIZE), "outside the vocabulary of 256"),
            ((-1,), "outside the vocabulary"),
        ):
            with pytest.raises(ValueError, match=why):
                server.engine.prepare(greedy("x", prompt, num_tokens=1))


def test_one_more_than_the_queue_holds_is_refused(model: Path) -> None:
    config = RouterConfig(max_requests=2, max_queue=1)
    with in_process(model, num_shards=2, config=config) as server:
        for request in REQUESTS:
            server.submit(request)
        with pytest.raises(QueueFull):
            server.engine.submit(server.engine.prepare(greedy("one more", [1], num_tokens=1)))
        answers = server.run([])
        assert all(answer.finish == "length" for answer in answers.values())


@pytest.mark.parametrize("part", ["router.model.trunk.Trunk.forward", "router.engine.sample"])
def test_a_step_that_raises_fails_its_requests_and_the_engine_goes_on(
    model: Path, undisturbed: dict[str, Joined], monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    undisturbed_part, calls = pkgutil.resolve_name(part), iter(range(100))

    def failing(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return undisturbed_part(*args, **kwargs)

    monkeypatch.setattr(part, failing)
    with in_process(model, num_shards=2) as server:
        answers = server.run(REQUESTS[:2], failing={"0", "1"})
        assert answers["0"].error == "a step failed; the router's log says why"
        assert answers["0"].tokens == undisturbed["0"].tokens[:3]
        assert server.run(REQUESTS[2:], failing={"0", "1"})["2"].tokens == undisturbed["2"].tokens


def test_what_fails_outside_a_step_does_not_end_the_thread(
    model: Path, undisturbed: dict[str, Joined], monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_process(model, num_shards=2) as server:
        adopt, fails = server.engine._dispatcher.adopt, [KeyError("an epoch that nobody expects")]

        def adopt_later(members: Membership) -> None:
            if fails:
                raise fails.pop()
            adopt(members)

        monkeypatch.setattr(server.engine._dispatcher, "adopt", adopt_later)
        server.engine.start()
        while fails:
            time.sleep(0.01)
        server.engine.adopt(local_membership(server._placement))
        assert server.run(REQUESTS)["0"].tokens == undisturbed["0"].tokens


def test_requests_fail_when_the_shards_stay_away(model: Path) -> None:
    config = RouterConfig(stall_limit_s=0.05)
    fabric = partial(faulty, faults=[Lost(rank=0, step=2, layer=0)])
    with in_process(model, num_shards=2, config=config, fabric=fabric) as server:
        server.engine._dispatcher._on_lost = lambda loss: None
        answers = server.run(REQUESTS, failing={"0", "1", "2"})
    assert "the expert shards have been away for" in str(answers["0"].error)


def test_a_prompt_is_scored_once_although_it_was_preempted(model: Path) -> None:
    """Its tokens are those of an undisturbed run, and so is every score."""
    params = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True, prompt_logprobs=0)
    requests = [Request(str(n), tuple(prompt), params) for n, prompt in enumerate(PROMPTS)]
    with in_process(model, num_shards=2) as server:
        roomy = server.run(requests)
    config = RouterConfig(
        max_requests=3,
        max_batch_tokens=6,
        kv_cache=KVCacheConfig(block_size=4, memory_gib=15.5 * 4 * 768 / 2**30),
    )
    with in_process(model, num_shards=2, config=config) as server:
        tight = server.run(requests)
        assert server.engine.preempted
    for name, prompt in enumerate(PROMPTS):
        ours, theirs = tight[str(name)], roomy[str(name)]
        assert ours.tokens == theirs.tokens
        assert [one.token for one in ours.prompt_logprobs] == prompt[1:]
        assert [one.logprob for one in ours.prompt_logprobs] == pytest.approx(
            [one.logprob for one in theirs.prompt_logprobs], abs=1e-4
        )
