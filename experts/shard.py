"""ExpertShard: the local experts of one EP rank. Stateless between calls, never imports transformers."""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from experts.backends import BACKENDS, ExpertBackend
from experts.checkpoint import ExpertCheckpoint
from experts.placement import EMPTY, ExpertPlacement
from experts.weights import ExpertWeights, MoEShape


class ExpertShard:
    """One EP rank: physical ids in, partial sums out.

    A kernel may hold the whole device, so one forward runs at a time, whichever link's thread it comes from.
    """

    def __init__(
        self,
        shape: MoEShape,
        *,
        rank: int,
        slots_per_rank: int,
        backend: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.shape = shape
        self.rank = rank
        self.dtype = dtype
        self.device = device
        self.first_slot = rank * slots_per_rank
        self.slots_per_rank = slots_per_rank
        self._backend: ExpertBackend = BACKENDS[backend](shape, slots_per_rank, dtype, device)
        self._one_forward = threading.Lock()
        self._moe_layers = frozenset(shape.moe_layers)
        self._num_pairs = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def num_pairs(self) -> int:
        """(token, expert) pairs computed since the start. Waits for the device."""
        return int(self._num_pairs)

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        """Into a local slot, in place, between two forwards: whoever routes to the slot gets the new expert."""
        with self._one_forward:
            self._backend.write_slot(layer, slot, weights)

    def load(self, checkpoint: ExpertCheckpoint, placement: ExpertPlacement, *, progress: bool) -> None:
        """Fill every slot that the placement gives this rank. Reads only those experts from disk."""
        wanted = list(slots_of(placement, self.rank))
        for layer, slot, expert in tqdm(
            wanted, desc=f"shard {self.rank}: experts", disable=not progress, unit="expert"
        ):
            self.write_slot(layer, slot, checkpoint.read(layer, expert))

    def forward(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        """Partial sums of this rank's experts; rows without one are zero.

        phys_TK: int32 physical ids of any rank, or -1. An id that is not ours never reaches the kernel, so no
        router can make it read beyond the weights. out_TD: the caller's; shape, dtype and device of x_TD.
        """
        if layer not in self._moe_layers:
            raise ValueError(f"shard {self.rank}: layer {layer} has no routed experts")
        if x_TD.shape[0] == 0:
            return
        local_TK = phys_TK - self.first_slot
        local_TK.masked_fill_((local_TK < 0) | (local_TK >= self.slots_per_rank), EMPTY)
        with self._one_forward:
            self._backend.forward(layer, x_TD, local_TK, w_TK, out_TD=out_TD)
            self._num_pairs += (local_TK != EMPTY).sum()  # on the device: nobody waits for it here


def slots_of(placement: ExpertPlacement, rank: int) -> Iterator[tuple[int, int, int]]:
    """(layer, local slot, logical expert) of every filled slot of a rank, in layer order."""
    for layer, row in enumerate(placement.local(rank).tolist()):
        for slot, expert in enumerate(row):
            if expert != EMPTY:
                yield layer, slot, expert


def load_shard(
    checkpoint: ExpertCheckpoint,
    placement: ExpertPlacement,
    *,
    rank: int,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    progress: bool = False,
) -> ExpertShard:
    """A shard with its experts read from a checkpoint."""
    shard = ExpertShard(
        checkpoint.shape,
        rank=rank,
        slots_per_rank=placement.slots_per_rank,
        backend=backend,
        dtype=dtype,
        device=device,
    )
    shard.load(checkpoint, placement, progress=progress)
    return shard
