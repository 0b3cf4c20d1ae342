"""Lanes on a CPU, one thread an end: whatever is posted is summed, and a stop ends everything."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.fabric.mailbox import words
from experts.fabric.mailbox.host import HostRouterLane, HostShardLane
from experts.fabric.mailbox.region import LaneShape, Region
from experts.fabric.mailbox.words import StopWord
from experts.placement import EMPTY

Experts = Callable[[Tensor, Tensor, Tensor], Tensor]


def weighted(rank: int) -> Experts:
    """Stand for the experts of a rank: x times the weights of the ids that are congruent to the rank, modulo 3."""

    def compute(x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor) -> Tensor:
        own_TK = (ids_TK >= 0) & (ids_TK % 3 == rank)
        return x_TD * torch.where(own_TK, w_TK, 0).sum(-1, keepdim=True).to(x_TD.dtype)

    return compute


class Shard:
    """One shard of a lane: a thread that serves steps of `layers` layers as they are begun."""

    def __init__(self, shape: LaneShape, outbox: Region, rank: int) -> None:
        self.inbox = Region.create(shape.inbox_bytes)
        self.stop = StopWord(pinned=False)
        self.taken: list[Tensor] = []
        self._lane = HostShardLane(shape, outbox, self.inbox, self.stop)
        self._shape, self._experts = shape, weighted(rank)

    @contextmanager
    def serving(self, *, first: int, rows: int, posted: int, layers: int) -> Iterator[None]:
        """Serve one step. posted: rows that the router posts, of which `rows` are real."""
        self._lane.begin(first=first, rows=rows)
        thread = threading.Thread(target=self._serve, args=(posted, layers))
        thread.start()
        yield
        thread.join(20)
        assert not thread.is_alive()

    def _serve(self, posted: int, layers: int) -> None:
        shape = self._shape
        x_TD = torch.empty(posted, shape.hidden, dtype=shape.dtype)
        ids_TK = torch.empty(posted, shape.top_k, dtype=torch.int32)
        w_TK = torch.empty(posted, shape.top_k)
        for position in range(layers):
            self._lane.take(position, x_TD, ids_TK, w_TK)
            self.taken.append(ids_TK.clone())
            self._lane.post(position, self._experts(x_TD, ids_TK, w_TK))


@given(
    rows=st.integers(1, 12),
    fillers=st.integers(0, 4),
    num_shards=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    own=st.booleans(),
    first=st.sampled_from([1, 2**31 - 2, 2**40]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=40)
def test_every_layer_of_every_step_is_the_sum_in_rank_order(
    rows: int, fillers: int, num_shards: int, dtype: torch.dtype, own: bool, first: int, seed: int
) -> None:
    shape = LaneShape(rows=16, hidden=24, top_k=3, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    outbox, stop = Region.create(shape.outbox_bytes), StopWord(pinned=False)
    router = HostRouterLane(shape, outbox, stop)
    shards = [Shard(shape, outbox, rank) for rank in range(num_shards)]
    posted, layers = rows + fillers, 3
    for step in range(2):
        begins_at = first + step * layers
        router.begin(first=begins_at, rows=rows, inboxes=[shard.inbox for shard in shards])
        with ExitStack() as serving:
            for shard in shards:
                serving.enter_context(shard.serving(first=begins_at, rows=rows, posted=posted, layers=layers))
            for position in range(layers):
                x_TD = torch.randn(posted, shape.hidden, generator=generator).to(dtype)
                ids_TK = torch.randint(-1, 9, (posted, 3), generator=generator, dtype=torch.int32)
                w_TK = torch.rand(posted, 3, generator=generator)
                own_TD = torch.randn(posted, shape.hidden, generator=generator).to(dtype) if own else None
                out_TD = torch.full_like(x_TD, torch.nan)
                router.post(position, x_TD, ids_TK, w_TK)
                before_TD = None if own_TD is None else own_TD.clone()
                router.take_sum(position, own_TD, out_TD)
                assert own_TD is None or before_TD is None or torch.equal(own_TD, before_TD)
                ids_TK[rows:] = EMPTY
                truth_TD = torch.zeros(posted, shape.hidden) if own_TD is None else own_TD.float().clone()
                for rank in range(num_shards):
                    truth_TD += weighted(rank)(x_TD, ids_TK, w_TK).float()
                assert torch.equal(out_TD[:rows], truth_TD[:rows].to(dtype))
                assert all(torch.equal(shard.taken[-1], ids_TK) for shard in shards)


@pytest.fixture
def shape() -> LaneShape:
    return LaneShape(rows=4, hidden=16, top_k=2, dtype=torch.float32)


def test_a_stop_ends_a_step_that_nobody_answers_and_raises_no_flag(shape: LaneShape) -> None:
    outbox, inbox, stop = (
        Region.create(shape.outbox_bytes),
        Region.create(shape.inbox_bytes),
        StopWord(pinned=False),
    )
    router = HostRouterLane(shape, outbox, stop)
    router.begin(first=10, rows=2, inboxes=[inbox])
    x_TD, ids_TK, w_TK = torch.ones(2, 16), torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2)

    def step() -> None:
        for position in range(5):
            router.post(position, x_TD, ids_TK, w_TK)
            router.take_sum(position, None, torch.empty(2, 16))

    thread = threading.Thread(target=step)
    thread.start()
    assert words.wait(outbox.address, StopWord(pinned=False).address, 10), "the first layer is posted"
    stop.raise_to(10 + 5 - 1)
    thread.join(20)
    assert not thread.is_alive()
    assert words.read(outbox.address) == 10, "layers behind the stop raise no flag"


def test_a_flag_of_a_stopped_step_is_none_of_the_next(shape: LaneShape) -> None:
    """Values only rise: a shard that was stopped in the middle left its inbox's flag below the next step's first."""
    outbox = Region.create(shape.outbox_bytes)
    shard, stop = Shard(shape, outbox, 0), StopWord(pinned=False)
    router = HostRouterLane(shape, outbox, stop)
    x_TD, ids_TK, w_TK = torch.ones(2, 16), torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2)
    router.begin(first=1, rows=2, inboxes=[shard.inbox])
    with shard.serving(first=1, rows=2, posted=2, layers=3):
        router.post(0, x_TD, ids_TK, w_TK)
        router.take_sum(0, None, torch.empty(2, 16))
        shard.stop.raise_to(3)
    stop.raise_to(3)
    router.begin(first=4, rows=2, inboxes=[shard.inbox])
    with shard.serving(first=4, rows=2, posted=2, layers=1):
        out_TD = torch.empty(2, 16)
        router.post(0, x_TD * 5, ids_TK, w_TK)
        router.take_sum(0, None, out_TD)
    assert out_TD.tolist() == torch.full((2, 16), 10.0).tolist()
