"""Pairs are counted on a GPU, and nobody waits for it."""

from collections.abc import Callable

import pytest
import torch

from experts.backends import LocalPairs
from experts.backends.pairs import FORWARDS_KEPT, PairsOnDevice
from experts.backends.triton.pairs import PairsInKernel
from experts.placement import EMPTY

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")


@pytest.mark.parametrize("kind", [PairsOnDevice, PairsInKernel])
def test_a_forward_does_not_wait_for_the_gpu(kind: Callable[[int, int, torch.device], LocalPairs]) -> None:
    pairs = kind(4, 3, GPU)
    phys_TK = torch.tensor([[4, 6], [3, 6]], dtype=torch.int32, device=GPU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        local_TK = [pairs.local(phys_TK) for _ in range(FORWARDS_KEPT + 1)][-1]
        totals = pairs.totals()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert local_TK.tolist() == [[0, 2], [EMPTY, 2]]
    assert totals.tolist() == [3 * (FORWARDS_KEPT + 1), 2 * (FORWARDS_KEPT + 1)]
