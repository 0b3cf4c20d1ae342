"""Fabric `local`: every shard is in the router's process, reached by the same calls without a wire."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from experts.fabric import Aborted, Membership, ShardAddress, StepHeader, Ticket, Waited
from experts.placement import ExpertPlacement
from experts.shard import ExpertShard


class LocalFabric:
    """A fabric whose shards compute in `combine`, one after the other, each in its own dtype.

    What a forward raises comes out of `combine` as it is.
    """

    def __init__(self, shards: Sequence[ExpertShard]) -> None:
        self._shards = tuple(shards)
        self.in_graph = all(shard.in_graph for shard in shards)
        self._sent: tuple[Tensor, Tensor, Tensor] | None = None
        self._aborted: str | None = None
        self._closed = False

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        assert len(members.shards) == len(self._shards), (members.shards, self._shards)
        self._aborted = None
        self._check()

    def begin(self, header: StepHeader) -> None:
        self._check()

    def dispatch(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> Ticket:
        self._check()
        self._sent = x_TD, phys_TK, w_TK
        return Ticket(layer=layer, rows=x_TD.shape[0])

    def combine(self, ticket: Ticket, out_TD: Tensor) -> None:
        self._check()
        assert self._sent is not None
        (x_TD, *routing), self._sent = self._sent, None
        if len(self._shards) == 1 and _like(out_TD, x_TD) and x_TD.dtype == self._shards[0].dtype:
            self._shards[0].forward(ticket.layer, x_TD, *routing, out_TD=out_TD)
            return
        sum_TD, *others = (_partial(shard, ticket.layer, x_TD, *routing) for shard in self._shards)
        for partial_TD in others:
            sum_TD = sum_TD.float() + partial_TD
        out_TD.copy_(sum_TD)

    def waited(self) -> Mapping[int, Waited]:
        return {}  # there are no links

    def abort(self, reason: str) -> None:
        self._aborted = reason

    def close(self) -> None:
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise Aborted("the fabric is closed")
        if (reason := self._aborted) is not None:
            raise Aborted(reason)


def _partial(shard: ExpertShard, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> Tensor:
    x_TD = x_TD.to(shard.dtype)
    partial_TD = torch.empty_like(x_TD)
    shard.forward(layer, x_TD, phys_TK, w_TK, out_TD=partial_TD)
    return partial_TD


def _like(out_TD: Tensor, x_TD: Tensor) -> bool:
    """Return whether a shard may write its sums into the caller's tensor."""
    return out_TD.dtype == x_TD.dtype and out_TD.device == x_TD.device and out_TD.is_contiguous()


def local_membership(placement: ExpertPlacement, *, epoch: int = 1) -> Membership:
    """Return the Membership of an engine whose shards are in its own process."""
    shards = tuple(
        ShardAddress(rank=rank, host="", port=0, name=f"local-{rank}", pid=0, token=b"")
        for rank in range(placement.num_ranks)
    )
    return Membership(epoch=epoch, shards=shards, placement=placement)
