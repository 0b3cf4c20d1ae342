"""Finding a shard's own (token, expert) pairs in the routing of a forward, and counting them: see LocalPairs.

Backends that do this themselves (ExpertBackend.take_physical) need none of it. T tokens, K top-k, e local slots.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

from experts.backends import LocalPairs
from experts.placement import EMPTY

FORWARDS_KEPT = 64
"""The number of forwards whose counts lie on the device one by one before they are added up."""


def local_pairs(*, first_slot: int, num_slots: int, device: torch.device) -> LocalPairs:
    """Return the LocalPairs of the shard that owns the physical slots [first_slot, first_slot + num_slots).

    device: where the ids are.
    """
    if device.type == "cpu":
        return PairsOnCpu(first_slot, num_slots, device)
    if find_spec("triton") is None:
        return PairsOnDevice(first_slot, num_slots, device)
    from experts.backends.triton.pairs import PairsInKernel

    return PairsInKernel(first_slot, num_slots, device)


class PairsOnCpu(LocalPairs):
    """LocalPairs as one compiled loop: on a CPU, starting a single operation of torch takes longer than this work."""

    def __init__(self, first_slot: int, num_slots: int, device: torch.device) -> None:
        self._first_slot = first_slot
        self._num_slots = num_slots
        self._num_pairs = self._num_activated = 0

    def local(self, phys_TK: Tensor) -> Tensor:
        from experts.backends.cpu.loops import to_local  # compiles; a shard that only loads needs none of it

        phys_TK = phys_TK.contiguous()
        local_TK = torch.empty_like(phys_TK)
        num_pairs, num_activated = to_local(
            phys_TK.numpy(),
            self._first_slot,
            self._num_slots,
            local_TK.numpy(),
        )
        self._num_pairs += num_pairs
        self._num_activated += num_activated
        return local_TK

    def totals(self) -> Tensor:
        return torch.tensor([self._num_pairs, self._num_activated])


class PairsOnDevice(LocalPairs):
    """LocalPairs in few operations of torch: each forward adds its pairs to a row, and many rows are summed at once."""

    def __init__(self, first_slot: int, num_slots: int, device: torch.device) -> None:
        self._first_slot = first_slot
        self._num_slots = num_slots
        self._total = torch.zeros(2, dtype=torch.int64, device=device)
        self._pairs_Fe = torch.zeros(FORWARDS_KEPT, num_slots + 1, dtype=torch.int32, device=device)
        self._one = torch.ones((), dtype=torch.int32, device=device)
        self._num_kept = 0

    def local(self, phys_TK: Tensor) -> Tensor:
        local_TK = phys_TK - self._first_slot
        local_TK.masked_fill_((local_TK < 0) | (local_TK >= self._num_slots), EMPTY)
        if self._num_kept == FORWARDS_KEPT:
            self._add_up()
        row_P = local_TK.reshape(-1) + 1  # pairs of absent experts go into column 0, which nobody reads
        self._pairs_Fe[self._num_kept].index_add_(0, row_P, self._one.expand_as(row_P))
        self._num_kept += 1
        return local_TK

    def totals(self) -> Tensor:
        self._add_up()
        return self._total.clone()

    def _add_up(self) -> None:
        ours_Fe = self._pairs_Fe[:, 1:]
        self._total += torch.stack([ours_Fe.sum(), (ours_Fe > 0).sum()])
        self._pairs_Fe.zero_()
        self._num_kept = 0
