"""Fabric: the wire between a router and its expert shards, both ends.

A router's step is: begin(header), then for every MoE layer in order dispatch and combine. All frames of a step belong
to one *epoch*: a Membership that the router adopted between two steps. T tokens, D hidden, K top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from experts.placement import ExpertPlacement

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ShardAddress:
    """Where one EP rank listens, and what proves that a caller may talk to it.

    name: tells incarnations apart: a replacement of a rank has another name. pid is for people and logs.
    """

    rank: int
    host: str
    port: int
    name: str
    pid: int
    token: bytes = field(repr=False)


@dataclass(frozen=True)
class Membership:
    """Who is in an epoch: shards[r].rank == r for every rank of the placement."""

    epoch: int
    shards: tuple[ShardAddress, ...]
    placement: ExpertPlacement

    def __post_init__(self) -> None:
        ranks = [shard.rank for shard in self.shards]
        assert ranks == list(range(self.placement.num_ranks)), ranks


@dataclass(frozen=True)
class StepHeader:
    """Host side, once per step, over the control link of every fabric.

    rows: tokens of the step. warming: the deadlines are off, because kernels may be compiling.
    """

    epoch: int
    step: int
    rows: int
    warming: bool = False


class FabricError(Exception):
    """Something a peer did, or failed to do."""


class PeerLost(FabricError):
    """Shards that closed their link, broke the protocol or passed the deadline. The step must be run again.

    ranks: all that were lost, ascending; every rank of the epoch after an `abort`. step and layer are -1 where there
    is none yet. why: for people.
    """

    def __init__(
        self, ranks: Sequence[int], *, epoch: int, step: int, layer: int, elapsed_s: float, why: str
    ) -> None:
        self.ranks = tuple(ranks)
        self.epoch = epoch
        super().__init__(
            f"lost shard {', '.join(map(str, ranks))} at epoch {epoch}, step {step}, layer {layer} "
            f"after {elapsed_s:.3f} s: {why}"
        )


@dataclass(frozen=True)
class Ticket:
    """One layer in flight between dispatch and combine."""

    layer: int
    rows: int


class Fabric(Protocol):
    """The router's end. One thread calls it, except `abort`."""

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        """Enter an epoch: keep the links to shards that stay, open the missing ones, close the rest.

        Raises PeerLost for ranks that cannot be reached; the links that work are kept for the next try.
        """
        ...

    def begin(self, header: StepHeader) -> None:
        """Announce a step to every shard. A shard that is gone is only found by `combine`."""
        ...

    def dispatch(self, layer: int, x_TD: "Tensor", phys_TK: "Tensor", w_TK: "Tensor") -> Ticket:
        """Send every row to every shard. phys_TK: int32 physical ids; w_TK: float32.

        The inputs stay untouched until the combine of this ticket; at most one ticket is open.
        """
        ...

    def combine(self, ticket: Ticket, out_TD: "Tensor") -> None:
        """out_TD (the caller's) = the shards' partial sums, added in float32 in rank order.

        out_TD may have any dtype and device. Raises one PeerLost for all ranks that were lost since `connect`;
        out_TD is undefined then.
        """
        ...

    def abort(self, reason: str) -> None:
        """From any thread, idempotent: the pending call and all later ones raise PeerLost until `connect`."""
        ...

    def close(self) -> None:
        """Close every link. Idempotent."""
        ...
