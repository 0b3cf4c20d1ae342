"""Fabric `local`: every shard in the router's process, the same calls without a wire."""

from collections.abc import Sequence

import torch
from torch import Tensor

from experts.fabric import Membership, PeerLost, ShardAddress, StepHeader, Ticket
from experts.placement import ExpertPlacement
from experts.shard import ExpertShard


class LocalFabric:
    """Shards answer in `dispatch`, one after the other."""

    def __init__(self, shards: Sequence[ExpertShard]) -> None:
        self._shards = tuple(shards)
        self._header = StepHeader(epoch=0, step=0, rows=0)
        self._partials: list[Tensor] = []
        self._aborted: str | None = None

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        assert len(members.shards) == len(self._shards), (members.shards, self._shards)
        self._aborted = None

    def begin(self, header: StepHeader) -> None:
        self._header = header

    def dispatch(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> Ticket:
        self._partials = [torch.empty_like(x_TD) for _ in self._shards]
        for shard, partial_TD in zip(self._shards, self._partials, strict=True):
            shard.forward(layer, x_TD, phys_TK, w_TK, out_TD=partial_TD)
        return Ticket(layer=layer, rows=x_TD.shape[0])

    def combine(self, ticket: Ticket, out_TD: Tensor) -> None:
        if self._aborted is not None:
            ranks = [shard.rank for shard in self._shards]
            header = self._header
            raise PeerLost(
                ranks,
                epoch=header.epoch,
                step=header.step,
                layer=ticket.layer,
                elapsed_s=0,
                why=self._aborted,
            )
        sum_TD = self._partials[0].float()
        for partial_TD in self._partials[1:]:
            sum_TD = sum_TD + partial_TD
        out_TD.copy_(sum_TD)

    def abort(self, reason: str) -> None:
        self._aborted = reason

    def close(self) -> None:
        self._partials = []


def local_membership(placement: ExpertPlacement, *, epoch: int = 1) -> Membership:
    """The membership of an engine whose shards are in its own process."""
    shards = tuple(
        ShardAddress(rank=rank, host="", port=0, name=f"local-{rank}", pid=0, token=b"")
        for rank in range(placement.num_ranks)
    )
    return Membership(epoch=epoch, shards=shards, placement=placement)
