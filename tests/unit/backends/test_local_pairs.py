"""Every way to find and count a shard's own pairs that runs on a CPU. T tokens, D hidden, K top-k."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experts.backends import LocalPairs
from experts.backends.cpu.backend import CpuBackend
from experts.backends.pairs import FORWARDS_KEPT, PairsOnCpu, PairsOnDevice
from experts.placement import EMPTY
from tests.unit.backends.test_backends import LAYER, SHAPE, Operations, weights

CPU = torch.device("cpu")
FIRST_SLOT, NUM_SLOTS = 4, 3


@pytest.fixture(params=[PairsOnCpu, PairsOnDevice])
def pairs(request: pytest.FixtureRequest) -> LocalPairs:
    """Return the pairs of a shard that has the slots 4, 5 and 6."""
    return request.param(FIRST_SLOT, NUM_SLOTS, CPU)


def test_ids_become_slots_and_are_counted(pairs: LocalPairs) -> None:
    phys_TK = torch.tensor([[4, 6], [3, 7], [EMPTY, 6], [-(2**31), 2**31 - 1]], dtype=torch.int32)
    expected = [[0, 2], [EMPTY, EMPTY], [EMPTY, 2], [EMPTY, EMPTY]]
    assert pairs.local(phys_TK).tolist() == expected
    assert pairs.local(phys_TK.T).T.tolist() == expected
    assert pairs.totals().tolist() == [6, 4]


def test_no_forward_is_forgotten(pairs: LocalPairs) -> None:
    phys_TK = torch.tensor([[4, 5], [4, 0]], dtype=torch.int32)
    for n in range(2 * FORWARDS_KEPT + 5):
        with torch.inference_mode(n % 2 == 0):
            pairs.local(phys_TK)
        if n == 10:
            assert pairs.totals().tolist() == [33, 22]
    num_forwards = 2 * FORWARDS_KEPT + 5
    assert pairs.totals().tolist() == [3 * num_forwards, 2 * num_forwards]


def test_no_number_is_read_from_a_device() -> None:
    pairs = PairsOnDevice(4, 3, CPU)
    phys_TK = torch.tensor([[4, 5]], dtype=torch.int32)
    with Operations() as operations:
        for _ in range(FORWARDS_KEPT + 1):
            pairs.local(phys_TK)
        pairs.totals()
    assert "aten.sum.default" in operations.names, "some were added up"
    assert "aten._local_scalar_dense.default" not in operations.names


def filled() -> CpuBackend:
    backend = CpuBackend(SHAPE, NUM_SLOTS, torch.float32, CPU)
    for slot in range(NUM_SLOTS):
        backend.write_slot(LAYER, slot, weights(slot))
    return backend


def forward(backend: CpuBackend, ids_TK: Tensor) -> Tensor:
    """The same hidden states and top-k weights for the same number of tokens."""
    generator = torch.Generator().manual_seed(len(ids_TK))
    x_TD = torch.randn(len(ids_TK), SHAPE.hidden, generator=generator)
    w_TK = torch.rand(ids_TK.shape, generator=generator)
    out_TD = torch.full_like(x_TD, torch.nan)
    backend.forward(LAYER, x_TD, ids_TK, w_TK, out_TD=out_TD)
    return out_TD


ANY_ID = st.one_of(st.integers(FIRST_SLOT - 2, FIRST_SLOT + NUM_SLOTS + 1), st.integers(-(2**31), 2**31 - 1))
ROUTINGS = st.integers(1, 4).flatmap(
    lambda top_k: st.lists(
        st.lists(ANY_ID | st.just(EMPTY), min_size=top_k, max_size=top_k), min_size=1, max_size=40
    )
)


@given(st.lists(ROUTINGS, min_size=1, max_size=3))
def test_backend_cpu_finds_and_counts_the_same_pairs_itself(routings: list[list[list[int]]]) -> None:
    pairs, takes_local, takes_physical = PairsOnCpu(FIRST_SLOT, NUM_SLOTS, CPU), filled(), filled()
    totals = takes_physical.take_physical(FIRST_SLOT)
    for routing in routings:
        phys_TK = torch.tensor(routing, dtype=torch.int32)
        expected_TD = forward(takes_local, pairs.local(phys_TK))
        assert torch.equal(forward(takes_physical, phys_TK), expected_TD)
        assert torch.equal(totals(), pairs.totals())
    assert totals().dtype == torch.int64


def test_backend_cpu_takes_ids_that_are_not_contiguous() -> None:
    backend = filled()
    totals = backend.take_physical(FIRST_SLOT)
    phys_TK = torch.tensor([[4, 6, 0, 5], [3, 5, 7, 5]], dtype=torch.int32).T
    assert torch.equal(forward(backend, phys_TK), forward(backend, phys_TK.contiguous()))
    assert totals().tolist() == [2 * 5, 2 * 3]
