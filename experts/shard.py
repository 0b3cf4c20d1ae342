"""ExpertShard: the local experts of one EP rank. Stateless between calls, never imports transformers."""

import threading
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from experts.backends import BACKENDS, DEFAULTS, ExpertBackend, KernelSettings, Progress, resolve_backend
from experts.checkpoint import ExpertCheckpoint
from experts.local_pairs import PairCounts, local_pairs
from experts.placement import EMPTY, ExpertPlacement
from experts.weights import ExpertWeights, MoEShape

_CALM: dict[str, Any] = {"delay": 5.0, "mininterval": 5.0}
"""Bars go to the log of a process: what is quick leaves no trace there."""


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
        settings: KernelSettings = DEFAULTS,
    ) -> None:
        self.shape = shape
        self.rank = rank
        self.dtype = dtype
        self.device = device
        self.first_slot = rank * slots_per_rank
        self.slots_per_rank = slots_per_rank
        self._backend: ExpertBackend = BACKENDS[backend](shape, slots_per_rank, dtype, device, settings)
        self._pairs = local_pairs(first_slot=self.first_slot, num_slots=slots_per_rank, device=device)
        self._one_forward = threading.Lock()
        self._moe_layers = frozenset(shape.moe_layers)

    def counts(self) -> PairCounts:
        """Of what was computed since the start. Waits for the device, and keeps no forward waiting for that."""
        with self._one_forward:
            totals = self._pairs.totals()
        return PairCounts(*totals.tolist())

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        """Into a local slot, in place, between two forwards: whoever routes to the slot gets the new expert."""
        with self._one_forward:
            self._backend.write_slot(layer, slot, weights)

    def load(self, checkpoint: ExpertCheckpoint, placement: ExpertPlacement, *, progress: bool) -> None:
        """Fill every slot that the placement gives this rank. Reads only those experts from disk."""
        wanted = list(slots_of(placement, self.rank))
        for layer, slot, expert in tqdm(
            wanted, desc=f"shard {self.rank}: experts", disable=not progress, unit="expert", **_CALM
        ):
            self.write_slot(layer, slot, checkpoint.read(layer, expert))

    def warm(self, *, top_k: int, progress: bool) -> None:
        """Compile and set up what forwards need, so that no request waits for it: see ExpertBackend."""
        show(
            self._backend.warm(top_k=top_k),
            desc=f"shard {self.rank}: kernels",
            disable=not progress,
            unit="kernel",
            **_CALM,
        )

    def forward(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        """Partial sums of this rank's experts; rows without one are zero.

        phys_TK: int32 physical ids of any rank, or -1. An id that is not ours never reaches the kernel, so no
        router can make it read beyond the weights. out_TD: the caller's; shape, dtype and device of x_TD.
        """
        if layer not in self._moe_layers:
            raise ValueError(f"shard {self.rank}: layer {layer} has no routed experts")
        if x_TD.shape[0] == 0:
            return
        with self._one_forward:
            self._backend.forward(layer, x_TD, self._pairs.local(phys_TK), w_TK, out_TD=out_TD)


def slots_of(placement: ExpertPlacement, rank: int) -> Iterator[tuple[int, int, int]]:
    """(layer, local slot, logical expert) of every filled slot of a rank, in layer order."""
    for layer, row in enumerate(placement.local(rank).tolist()):
        for slot, expert in enumerate(row):
            if expert != EMPTY:
                yield layer, slot, expert


def show(work: Iterable[Progress], **bar_options: Any) -> None:
    """Do the work, with a bar. bar_options: tqdm's."""
    with tqdm(**bar_options) as bar:
        for done, total, what in work:
            bar.total = total
            bar.set_postfix_str(what, refresh=False)
            bar.update(done - bar.n)


def load_shard(
    checkpoint: ExpertCheckpoint,
    placement: ExpertPlacement,
    *,
    rank: int,
    backend: str,
    dtype: torch.dtype,
    device: torch.device,
    settings: KernelSettings = DEFAULTS,
    progress: bool = False,
) -> ExpertShard:
    """A shard that is ready: its experts read from a checkpoint, its kernels warm. backend: may be `auto`."""
    shard = ExpertShard(
        checkpoint.shape,
        rank=rank,
        slots_per_rank=placement.slots_per_rank,
        backend=resolve_backend(backend, device=device, weights_only=checkpoint.weights_only),
        dtype=dtype,
        device=device,
        settings=settings,
    )
    shard.load(checkpoint, placement, progress=progress)
    if checkpoint.top_k is not None:
        shard.warm(top_k=checkpoint.top_k, progress=progress)
    return shard
