"""Backends against the reference, and shards against one that holds everything.

T tokens, D hidden, K top-k, E logical experts, P physical slots.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from experts.backends import ExpertBackend, KernelSettings
from experts.backends.registry import BACKENDS
from experts.nvfp4 import quantize
from experts.placement import EMPTY, ExpertPlacement, even_placement
from experts.shard import ExpertShard, slots_of
from experts.weights import ExpertWeights, MoEShape

CPU = torch.device("cpu")
FAST = ["torch", "cpu"]
SHAPE = MoEShape(num_layers=2, moe_layers=(1,), num_experts=7, hidden=32, intermediate=48)
LAYER = 1
ONE_RANK = even_placement((LAYER,), num_layers=2, num_experts=7, num_ranks=1)


@cache
def weights(expert: int) -> ExpertWeights:
    generator = torch.Generator().manual_seed(expert)
    gate, up, down = (
        quantize(torch.randn(rows, cols, generator=generator) / cols**0.5)
        for rows, cols in ((48, 32), (48, 32), (32, 48))
    )
    return ExpertWeights(gate, up, down, input_scale=None, down_input_scale=None)


def make_shard(
    placement: ExpertPlacement,
    rank: int,
    backend: str,
    dtype: torch.dtype,
    *,
    shape: MoEShape = SHAPE,
    expert_of: Callable[[int], ExpertWeights] = weights,
) -> ExpertShard:
    """Return a shard. expert_of: the weights of a logical expert, the same in every layer."""
    shard = ExpertShard(
        shape,
        rank=rank,
        slots_per_rank=placement.slots_per_rank,
        backend=backend,
        dtype=dtype,
        device=CPU,
    )
    for layer, slot, expert in slots_of(placement, rank):
        shard.write_slot(layer, slot, expert_of(expert))
    return shard


@cache
def whole(backend: str, dtype: torch.dtype) -> ExpertShard:
    return make_shard(ONE_RANK, 0, backend, dtype)


def forward(shard: ExpertShard, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> Tensor:
    """Run a shard's forward into a buffer full of NaN: every row must be written."""
    out_TD = torch.full_like(x_TD, torch.nan)
    shard.forward(LAYER, x_TD, phys_TK, w_TK, out_TD=out_TD)
    return out_TD


def assert_near(ours: Tensor, truth: Tensor) -> None:
    """Assert that ours is as near as its dtype allows."""
    rtol, atol = (1e-4, 1e-4) if ours.dtype == torch.float32 else (2e-2, 5e-2)
    torch.testing.assert_close(ours.float(), truth, rtol=rtol, atol=atol)


@dataclass(frozen=True)
class Call:
    """A call as the gate makes it. logical_TK: int32, EMPTY where there is no expert."""

    x_TD: Tensor
    logical_TK: Tensor
    w_TK: Tensor


def call(logical: list[list[int]], *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Call:
    generator = torch.Generator().manual_seed(seed)
    logical_TK = torch.tensor(logical, dtype=torch.int32)
    x_TD = torch.randn(len(logical), SHAPE.hidden, generator=generator).to(dtype)
    return Call(x_TD, logical_TK, torch.rand(logical_TK.shape, generator=generator))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    top_k = draw(st.integers(1, 4))
    row = st.lists(st.integers(EMPTY, SHAPE.num_experts - 1), min_size=top_k, max_size=top_k)
    return call(draw(st.lists(row, min_size=1, max_size=9)), seed=draw(st.integers(0, 99)))


@st.composite
def splits(draw: st.DrawFn) -> ExpertPlacement:
    """Each expert on any rank, in any slot: shares may be unequal, or empty."""
    num_ranks = draw(st.integers(1, 5))
    rank_of = draw(st.lists(st.integers(0, num_ranks - 1), min_size=7, max_size=7))
    slots_per_rank = max(map(rank_of.count, range(num_ranks))) + draw(st.integers(0, 2))
    row_P = [EMPTY] * (num_ranks * slots_per_rank)
    for expert in draw(st.permutations(range(7))):
        own = range(rank_of[expert] * slots_per_rank, (rank_of[expert] + 1) * slots_per_rank)
        row_P[next(slot for slot in own if row_P[slot] == EMPTY)] = expert
    slots_LP = np.array([[EMPTY] * len(row_P), row_P], np.int32)
    return ExpertPlacement(slots_LP=slots_LP, slots_per_rank=slots_per_rank)


SHAPES_OF_LOAD = [
    pytest.param([[0, 3, 6]], id="one token"),
    pytest.param([[5]], id="one token, one expert"),
    pytest.param([[t % 7, (t + 3) % 7] for t in range(300)], id="many tokens"),
    pytest.param([[4]] * 50, id="all on one expert"),
    pytest.param([[2, 2, 2]] * 3, id="the same expert thrice"),
    pytest.param([[EMPTY, EMPTY]] * 4, id="nothing here"),
    pytest.param([[EMPTY, 1], [EMPTY, EMPTY], [6, EMPTY]], id="some here"),
]


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logical", SHAPES_OF_LOAD)
def test_fast_backends_equal_the_reference(
    logical: list[list[int]], dtype: torch.dtype, backend: str
) -> None:
    case = call(logical, dtype=dtype)
    ours = forward(whole(backend, dtype), case.x_TD, case.logical_TK, case.w_TK)
    truth = forward(whole("reference", torch.float32), case.x_TD.float(), case.logical_TK, case.w_TK)
    assert_near(ours, truth)
    absent_T = (case.logical_TK == EMPTY).all(dim=1)
    assert (ours[absent_T] == 0).all()


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_bfloat16_outputs_are_summed_in_float32(backend: str) -> None:
    """512 y and then 32 times y: in bfloat16 each of the 32 would be lost, 6 % of the sum."""
    case = call([[3] * 33] * 5, dtype=torch.bfloat16)
    w_TK = torch.tensor([[512.0] + [1.0] * 32]).repeat(5, 1)
    summed = forward(whole(backend, torch.bfloat16), case.x_TD, case.logical_TK, w_TK)
    once_T1 = torch.full((5, 1), 544.0)
    truth = forward(
        whole("reference", torch.float32), case.x_TD.float(), case.logical_TK[:, :1].contiguous(), once_T1
    )
    error = (summed.float() - truth).norm() / truth.norm()
    assert error < 0.02


@pytest.mark.parametrize("backend", FAST)
@settings(max_examples=30)
@given(case=calls())
def test_fast_backends_equal_the_reference_whatever_is_routed(backend: str, case: Call) -> None:
    ours, truth = (
        forward(whole(name, torch.float32), case.x_TD, case.logical_TK, case.w_TK)
        for name in (backend, "reference")
    )
    assert_near(ours, truth)


@pytest.mark.parametrize("backend", [*FAST, "reference"])
@settings(max_examples=30)
@given(placement=splits(), case=calls())
def test_any_split_of_the_experts_sums_to_the_whole(
    backend: str, placement: ExpertPlacement, case: Call
) -> None:
    here_TK = case.logical_TK != EMPTY
    phys_TK = torch.from_numpy(placement.primary_LE[LAYER]).take(case.logical_TK.clamp(min=0).long())
    phys_TK.masked_fill_(~here_TK, EMPTY)
    shards = [make_shard(placement, rank, backend, torch.float32) for rank in range(placement.num_ranks)]
    partials = [forward(shard, case.x_TD, phys_TK, case.w_TK) for shard in shards]
    unsplit = forward(whole(backend, torch.float32), case.x_TD, case.logical_TK, case.w_TK)
    assert_near(torch.stack(partials).sum(0), unsplit)
    assert sum(shard.counts().num_pairs for shard in shards) == here_TK.sum()
    num_activated = len(case.logical_TK[here_TK].unique())
    assert sum(shard.counts().num_activated for shard in shards) == num_activated


@pytest.mark.parametrize("backend", [*FAST, "reference"])
def test_foreign_ids_never_reach_the_kernel(backend: str) -> None:
    placement = even_placement((LAYER,), num_layers=2, num_experts=7, num_ranks=3)
    shard = make_shard(placement, 1, backend, torch.float32)  # slots 3, 4, 5
    foreign = [0, 2, 6, 9, 10**6, 2**31 - 1, -1, -2, -(2**31)]
    case = call([[id_, 4] for id_ in foreign])
    own = forward(shard, case.x_TD, case.logical_TK[:, 1:], case.w_TK[:, 1:].contiguous())
    torch.testing.assert_close(forward(shard, case.x_TD, case.logical_TK, case.w_TK), own)


@pytest.mark.parametrize("backend", FAST)
def test_a_slot_may_be_written_again(backend: str) -> None:
    shard = make_shard(ONE_RANK, 0, backend, torch.float32)
    case = call([[0]])
    shard.write_slot(LAYER, 0, weights(5))
    moved = forward(shard, case.x_TD, case.logical_TK, case.w_TK)
    torch.testing.assert_close(moved, forward(shard, case.x_TD, case.logical_TK + 5, case.w_TK))


def test_no_tokens_are_no_work() -> None:
    empty = torch.empty(0, SHAPE.hidden)
    ids_TK = torch.empty(0, 2, dtype=torch.int32)
    shard = make_shard(ONE_RANK, 0, "torch", torch.float32)
    shard.forward(LAYER, empty, ids_TK, torch.empty(0, 2), out_TD=torch.empty_like(empty))
    assert shard.counts() == (0, 0)


class NoBackend(ExpertBackend):
    """A backend that computes nothing."""

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None: ...

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None: ...


class Operations(TorchDispatchMode):
    """A record of torch's operations. names: of those that ran."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


@pytest.fixture
def idle_shard(monkeypatch: pytest.MonkeyPatch) -> ExpertShard:
    monkeypatch.setitem(BACKENDS, "none", lambda shape, num_slots, dtype, device, settings: NoBackend())
    return make_shard(ONE_RANK, 0, "none", torch.float32)


def test_a_forward_waits_for_no_device_and_counts_its_pairs(idle_shard: ExpertShard) -> None:
    case = call([[0, EMPTY, 6]] * 3)
    with Operations() as operations:
        forward(idle_shard, case.x_TD, case.logical_TK, case.w_TK)
    assert operations.names
    assert "aten._local_scalar_dense.default" not in operations.names  # what reads a number from a device
    with torch.inference_mode():
        forward(idle_shard, case.x_TD, case.logical_TK, case.w_TK)
    assert idle_shard.counts() == (12, 4)


def test_links_in_parallel_lose_no_count(idle_shard: ExpertShard) -> None:
    case = call([[0, 1, 2]] * 4)

    def link() -> None:
        for _ in range(300):
            forward(idle_shard, case.x_TD, case.logical_TK, case.w_TK)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(link) for _ in range(4)]:
            done.result(timeout=60)
    assert idle_shard.counts() == (4 * 300 * 12, 4 * 300 * 3)


def test_backend_cpu_refuses_another_device() -> None:
    with pytest.raises(ValueError, match="backend cpu runs on a CPU, not on cuda:1"):
        BACKENDS["cpu"](SHAPE, 7, torch.bfloat16, torch.device("cuda:1"), KernelSettings())


def test_refuses_a_layer_without_experts() -> None:
    case = call([[0]])
    with pytest.raises(ValueError, match="shard 0: layer 0 has no routed experts"):
        whole("torch", torch.float32).forward(
            0, case.x_TD, case.logical_TK, case.w_TK, out_TD=torch.empty_like(case.x_TD)
        )
