"""The contracts of the wire between a router and its expert shards: Fabric, its messages and its errors.

A router's step is begin(header), then dispatch and combine for every MoE layer in order. All frames of a step belong to one
*epoch*: a Membership that the router adopted between two steps. T tokens, D hidden, K top-k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from experts.placement import ExpertPlacement

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from experts.weights import MoEShape


@dataclass(frozen=True)
class ShardAddress:
    """The address at which one EP rank listens, and the token that proves that a caller may talk to it.

    name: tells incarnations apart: the replacement of a rank has another name.
    pid: for people and logs.
    unix: the abstract name of the rank's Unix socket, which is the faster way for a router of the same network namespace;
        empty if there is none. It is unique among all listeners anywhere.
    """

    rank: int
    host: str
    port: int
    name: str
    pid: int
    token: bytes = field(repr=False)
    unix: str = ""


@dataclass(frozen=True)
class Membership:
    """The shards of an epoch and the placement of experts on them: shards[r].rank == r for every rank of the placement."""

    epoch: int
    shards: tuple[ShardAddress, ...]
    placement: ExpertPlacement

    def __post_init__(self) -> None:
        ranks = [shard.rank for shard in self.shards]
        assert ranks == list(range(self.placement.num_ranks)), ranks


@dataclass(frozen=True)
class StepHeader:
    """The description of a step that a router gives to its end of the fabric before the first layer.

    rows: tokens of the step; deadlines grow with them, and need not allow for compiling, since a shard listens only
        once its kernels are warm.
    """

    epoch: int
    step: int
    rows: int


class FabricError(Exception):
    """The base of what can go wrong between a router and its shards."""


class StepFailed(FabricError):
    """Some shards could not answer a step.

    ranks: of these shards, ascending. step, layer: -1 where there is none yet. why: for people.
    """

    did: ClassVar[str]

    def __init__(
        self, ranks: Sequence[int], *, epoch: int, step: int, layer: int, elapsed_s: float, why: str
    ) -> None:
        self.ranks = tuple(ranks)
        self.epoch = epoch
        super().__init__(
            f"{self.did} {', '.join(map(str, ranks))} at epoch {epoch}, step {step}, layer {layer} "
            f"after {elapsed_s:.3f} s: {why}"
        )


class PeerLost(StepFailed):
    """Some shards closed their link, broke the protocol or passed the deadline.

    The step must be run again.
    """

    did = "lost shard"


class ShardFailed(StepFailed):
    """Some living shards could not compute a layer, and said why. They closed their links, which `connect` renews.

    The step may then be run again; it may also fail again.
    """

    did = "no answer from living shard"


class Aborted(FabricError):
    """A call was ended by `abort` or `close`. No shard died, so there is none to report."""


@dataclass(frozen=True)
class Ticket:
    """A layer in flight, between its dispatch and its combine."""

    layer: int
    rows: int


class Waited(NamedTuple):
    """Totals of one link since it was opened: the answers that came, and the seconds that `combine` waited for them.

    Answers are read in rank order, so the seconds of a rank are those that it took longer than the ranks before it.
    """

    num_answers: int
    seconds: float


class LinkedShard(Protocol):
    """The part of an ExpertShard that the shard's end of a link needs. `forward` is called from several threads."""

    rank: int
    shape: "MoEShape"
    dtype: "torch.dtype"
    device: "torch.device"

    def forward(
        self, layer: int, x_TD: "Tensor", phys_TK: "Tensor", w_TK: "Tensor", *, out_TD: "Tensor"
    ) -> None:
        """Set out_TD to the partial sums of this rank's experts."""
        ...


class Fabric(Protocol):
    """The router's end of the wire. One thread calls it; only `waited`, `abort` and `close` may come from any thread.

    in_graph: a CUDA graph may hold dispatch and combine: they only start work on the router's device, always the same
        work for the same sizes.
    """

    in_graph: bool

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        """Enter an epoch: keep the links to shards that stay, open the missing links, close the rest.

        Raises PeerLost for ranks that cannot be reached; the links that work are kept for the next try.
        """
        ...

    def begin(self, header: StepHeader) -> None:
        """Start a step: the layers that follow belong to it.

        A shard that is gone is noticed only by `combine`.
        """
        ...

    def dispatch(self, layer: int, x_TD: "Tensor", phys_TK: "Tensor", w_TK: "Tensor") -> Ticket:
        """Send every row to every shard. phys_TK: int32 physical ids; w_TK: float32 top-k weights.

        The caller leaves the inputs untouched until the combine of this ticket; at most one ticket is open.
        """
        ...

    def combine(self, ticket: Ticket, out_TD: "Tensor") -> None:
        """Set out_TD (the caller's) to the sum of the shards' partial sums, added in float32 in rank order.

        out_TD may have any dtype and device; it is undefined after an error. Raises one PeerLost for all ranks that
        were lost since `connect`, or, if none was, one ShardFailed for all that failed.
        """
        ...

    def waited(self) -> Mapping[int, Waited]:
        """Return how long `combine` has waited for each shard, by rank, for the links that are open now.

        It may be called from any thread.
        """
        ...

    def abort(self, reason: str) -> None:
        """End the pending call: it raises Aborted, and so do all later ones until `connect`.

        A `connect` that is pending raises it too; one that begins later starts afresh. It may be called from any thread,
        and more than once.
        """
        ...

    def close(self) -> None:
        """Abort for good, so that no `connect` works any more, and close every link.

        It may be called from any thread, and more than once.
        """
        ...
