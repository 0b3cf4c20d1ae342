"""ExpertShard computes the local experts of one EP rank. It keeps no state between calls and never imports transformers."""

import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from experts.backends import DEFAULTS, ExpertBackend, KernelSettings, LocalPairs, PairCounts
from experts.backends.pairs import local_pairs
from experts.backends.registry import BACKENDS, resolve_backend
from experts.checkpoint.expert_stream import ExpertStream
from experts.checkpoint.reader import ExpertCheckpoint
from experts.placement import EMPTY, ExpertPlacement
from experts.progress import Report, each, silent
from experts.weights import ExpertWeights, MoEShape


class ExpertShard:
    """The experts of one EP rank: it takes rows with physical expert ids and returns their partial sums.

    A kernel may hold the whole device, so one forward runs at a time, whichever link's thread it comes from.
    in_graph: a CUDA graph may hold a forward.
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
        self.in_graph = self._backend.in_graph
        self._pairs: LocalPairs | None = None  # where the backend does not find them itself
        totals = self._backend.take_physical(self.first_slot)
        if totals is None:
            self._pairs = local_pairs(first_slot=self.first_slot, num_slots=slots_per_rank, device=device)
            self.in_graph = self.in_graph and self._pairs.in_graph
            totals = self._pairs.totals
        self._totals = totals
        self._one_forward = threading.Lock()
        self._moe_layers = frozenset(shape.moe_layers)

    def counts(self) -> PairCounts:
        """Return the totals of what was computed since the start.

        Waits for the device, but keeps no forward waiting.
        """
        with self._one_forward:
            totals = self._totals()
        return PairCounts(*totals.tolist())

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        """Write an expert into a local slot, in place, between two forwards; later rows for the slot get the new expert."""
        with self._one_forward:
            self._backend.write_slot(layer, slot, weights)

    def load(self, checkpoint: ExpertCheckpoint, placement: ExpertPlacement, *, report: Report) -> None:
        """Fill every slot that the placement gives this rank. Only those experts are read from disk, in the order of layers."""
        slots = list(slots_of(placement, self.rank))
        wanted = [(layer, expert) for layer, _, expert in slots]
        with ExpertStream(checkpoint, wanted, device=self.device) as stream:
            experts = iter(stream)
            for layer, slot, _ in each(slots, "experts", report, sizes=stream.sizes):
                self.write_slot(layer, slot, next(experts))

    def warm(self, *, top_k: int, report: Report) -> None:
        """Compile and set up what forwards need, so that no request waits for it: see ExpertBackend."""
        for progress in self._backend.warm(top_k=top_k):
            report(progress)

    def forward(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        """Set out_TD to the partial sums of this rank's experts; rows without one are zero.

        phys_TK: int32 physical ids of any rank, or -1. Any other number counts as an expert of another rank, so no
        router can make a kernel read beyond the weights. out_TD: the caller's; shape, dtype and device of x_TD.
        """
        if layer not in self._moe_layers:
            raise ValueError(f"shard {self.rank}: layer {layer} has no routed experts")
        if x_TD.shape[0] == 0:
            return
        with self._one_forward:
            ids_TK = phys_TK if self._pairs is None else self._pairs.local(phys_TK)
            self._backend.forward(layer, x_TD, ids_TK, w_TK, out_TD=out_TD)


def slots_of(placement: ExpertPlacement, rank: int) -> Iterator[tuple[int, int, int]]:
    """Yield (layer, local slot, logical expert) of every filled slot of a rank, in layer order."""
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
    settings: KernelSettings = DEFAULTS,
    report: Report = silent,
) -> ExpertShard:
    """Return a shard that is ready: its experts are read from the checkpoint, its kernels warm.

    backend: may be `auto`.
    """
    shard = ExpertShard(
        checkpoint.shape,
        rank=rank,
        slots_per_rank=placement.slots_per_rank,
        backend=resolve_backend(
            backend, shape=checkpoint.shape, dtype=dtype, device=device, weights_only=checkpoint.weights_only
        ),
        dtype=dtype,
        device=device,
        settings=settings,
    )
    shard.load(checkpoint, placement, report=report)
    if checkpoint.top_k is not None:
        shard.warm(top_k=checkpoint.top_k, report=report)
    return shard
