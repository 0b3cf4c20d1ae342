"""Fabric: the wire between a router and its expert shards, both ends.

A router's step is: begin(header), then for every MoE layer in order dispatch and combine. All frames of a step belong
to one *epoch*: a Membership that the router adopted between two steps. T tokens, D hidden, K top-k.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from experts.placement import ExpertPlacement

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ShardAddress:
    """Where one EP rank listens, and what proves that a caller may talk to it.

    name: tells incarnations apart: a replacement of a rank has another name. pid is for people and logs.
    unix: the abstract name of its Unix socket, which is the faster way for a router of the same network namespace;
        empty if there is none. No two listeners of the world have the same.
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
    """Who is in an epoch: shards[r].rank == r for every rank of the placement."""

    epoch: int
    shards: tuple[ShardAddress, ...]
    placement: ExpertPlacement

    def __post_init__(self) -> None:
        ranks = [shard.rank for shard in self.shards]
        assert ranks == list(range(self.placement.num_ranks)), ranks


@dataclass(frozen=True)
class StepHeader:
    """What a router says of a step before its first layer, on the host.

    rows: tokens of the step, by which deadlines grow. A shard listens only once its kernels are warm.
    """

    epoch: int
    step: int
    rows: int


class FabricError(Exception):
    """Something that went wrong between a router and its shards."""


class StepFailed(FabricError):
    """A step that shards could not answer. ranks: theirs, ascending. step and layer are -1 where there is none yet. why: for people."""

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
    """Shards that closed their link, broke the protocol or passed the deadline. The step must be run again."""

    did = "lost shard"


class ShardFailed(StepFailed):
    """Living shards that could not compute a layer, and said why. They closed their links, which `connect` renews.

    The step may be run again then; it may also fail again.
    """

    did = "no answer from living shard"


class Aborted(FabricError):
    """`abort` or `close` ended the call. Nobody died, so there is nobody to report."""


@dataclass(frozen=True)
class Ticket:
    """One layer in flight between dispatch and combine."""

    layer: int
    rows: int


class Waited(NamedTuple):
    """Of one link since it was opened: the answers that came, and the seconds that `combine` waited for them.

    Answers are read in rank order, so a rank's seconds are what it took longer than the ranks before it.
    """

    num_answers: int
    seconds: float


class Fabric(Protocol):
    """The router's end. One thread calls it, except `waited`, `abort` and `close`.

    in_graph: dispatch and combine only start work on the router's device, always the same for the same sizes, so a CUDA
        graph may hold them.
    """

    in_graph: bool

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        """Enter an epoch: keep the links to shards that stay, open the missing ones, close the rest.

        Raises PeerLost for ranks that cannot be reached; the links that work are kept for the next try.
        """
        ...

    def begin(self, header: StepHeader) -> None:
        """For the layers that follow. A shard that is gone is only found by `combine`."""
        ...

    def dispatch(self, layer: int, x_TD: "Tensor", phys_TK: "Tensor", w_TK: "Tensor") -> Ticket:
        """Send every row to every shard. phys_TK: int32 physical ids; w_TK: float32.

        The inputs stay untouched until the combine of this ticket; at most one ticket is open.
        """
        ...

    def combine(self, ticket: Ticket, out_TD: "Tensor") -> None:
        """out_TD (the caller's) = the shards' partial sums, added in float32 in rank order.

        out_TD may have any dtype and device; it is undefined after an error. Raises one PeerLost for all ranks that
        were lost since `connect`, or, if none was, one ShardFailed for all that failed.
        """
        ...

    def waited(self) -> Mapping[int, Waited]:
        """From any thread: for whom `combine` has waited how long, by rank, of the links that are open now."""
        ...

    def abort(self, reason: str) -> None:
        """From any thread, idempotent: the pending call raises Aborted, and so do all later ones until `connect`.

        A `connect` that is pending raises it too; one that begins later starts afresh.
        """
        ...

    def close(self) -> None:
        """From any thread, idempotent: an `abort` that no `connect` ends; every link is closed."""
        ...
