"""Both ways to find a shard's own pairs, on a CPU. T tokens, K top-k."""

import pytest
import torch

from experts.backends.pairs import FORWARDS_KEPT, LocalPairs, PairsOnCpu, PairsOnDevice
from experts.placement import EMPTY
from tests.unit.backends.test_backends import Operations

CPU = torch.device("cpu")


@pytest.fixture(params=[PairsOnCpu, PairsOnDevice])
def pairs(request: pytest.FixtureRequest) -> LocalPairs:
    """Return the pairs of a shard with the slots 4, 5 and 6."""
    return request.param(4, 3, CPU)


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
