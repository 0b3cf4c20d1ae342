"""LocalPairs on a GPU: one Triton kernel finds and counts the local pairs of a forward.

T tokens, K top-k, e local slots.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.backends import LocalPairs


class PairsInKernel(LocalPairs):
    """LocalPairs whose kernel a CUDA graph may hold."""

    in_graph = True

    def __init__(self, first_slot: int, num_slots: int, device: torch.device) -> None:
        self._first_slot, self._num_slots = first_slot, num_slots
        self._total = torch.zeros(2, dtype=torch.int64, device=device)
        self._counts_e = torch.zeros(1 + num_slots, dtype=torch.int32, device=device)

    def local(self, phys_TK: Tensor) -> Tensor:
        phys_TK = phys_TK.contiguous()
        local_TK = torch.empty_like(phys_TK)
        kernel: Any = _to_local
        kernel[(len(phys_TK),)](
            phys_TK=phys_TK,
            local_TK=local_TK,
            counts_e=self._counts_e,
            total=self._total,
            first_slot=self._first_slot,
            num_slots=self._num_slots,
            TOP_K=phys_TK.shape[1],
            LANES=triton.next_power_of_2(phys_TK.shape[1]),
            num_warps=1,
        )
        return local_TK

    def totals(self) -> Tensor:
        return self._total.clone()


@triton.jit(do_not_specialize=["first_slot", "num_slots"])
def _to_local(
    phys_TK,
    local_TK,
    counts_e,
    total,
    first_slot,
    num_slots,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
):
    """Handle one token per program.

    counts_e: zeros [1 + e], of which the first counts the programs that are done; the last program makes all zero again.
    """
    k = tl.arange(0, LANES)
    at = tl.program_id(0) * TOP_K + k
    slot = tl.load(phys_TK + at, mask=k < TOP_K, other=-1) - first_slot
    ours = (slot >= 0) & (slot < num_slots) & (k < TOP_K)
    tl.store(local_TK + at, tl.where(ours, slot, -1), mask=k < TOP_K)
    before = tl.atomic_add(counts_e + 1 + slot, 1, mask=ours)
    num_first = tl.sum((ours & (before == 0)).to(tl.int64), axis=0)
    tl.atomic_add(total, tl.sum(ours.to(tl.int64), axis=0))
    tl.atomic_add(total + 1, num_first)
    tl.debug_barrier()
    if tl.atomic_add(counts_e, 1) == tl.num_programs(0) - 1:
        for first in range(0, num_slots + 1, 128):
            e = first + tl.arange(0, 128)
            tl.store(counts_e + e, 0, mask=e <= num_slots)
