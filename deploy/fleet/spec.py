"""The messages between routers, the Fleet and its shards, and their names in Ray.

Imports neither torch nor Ray.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from deploy.logs import LogFormat
from experts.config import ExpertsConfig
from experts.progress import Progress, Took

if TYPE_CHECKING:
    from experts.fabric import ShardAddress
    from experts.placement import ExpertPlacement

NAMESPACE = "sparkmoe"
"""The Ray namespace of our named actors."""


@dataclass(frozen=True)
class FleetSpec:
    """The fleet that a router wants: everything that its shards have in common.

    dtype: the kernel's, as in the config; with `auto` the shard decides. resources: what Ray reserves for a
    shard. lease_s: how long shards, and their Fleet, outlive the last renewal of a router. log_format: the
    format of shards that start; a different one is no reason to start them anew.
    """

    app: str
    checkpoint: str
    experts: ExpertsConfig
    dtype: str
    resources: tuple[tuple[str, float], ...]
    lease_s: float
    start_timeout_s: float
    log_format: LogFormat = field(compare=False)


@dataclass(frozen=True)
class ShardState:
    """The state of a live shard, as it tells a restarted Fleet.

    address and placement are None while it loads.
    """

    rank: int
    spec: FleetSpec
    address: "ShardAddress | None"
    placement: "ExpertPlacement | None"
    epoch: int
    node: str


@dataclass(frozen=True)
class ShardStats:
    """The counts of a shard since its start, for people and metrics.

    num_pairs: (token, expert) pairs computed. num_activated: experts with a pair, summed over every layer's
    forward. num_layers: forwards of a layer. num_rows: their tokens. layer_s: their seconds on the device,
    without the wire. resident_mib: memory of the process. loading: how far it has loaded, None once it
    serves. took: what each part of its start took, see experts.progress.
    """

    rank: int
    pid: int
    node: str
    num_pairs: int
    resident_mib: float
    num_activated: int = 0
    num_layers: int = 0
    num_rows: int = 0
    layer_s: float = 0.0
    loading: Progress | None = None
    took: dict[str, Took] = field(default_factory=dict)


@dataclass(frozen=True)
class FleetOverview:
    """The state of a fleet, for people and metrics.

    shards: those that answer, also while they load. problems: by rank, a sentence why it has no shard that
    serves. hopeless: what a user must mend before the fleet can come up. refused: why the newest spec was
    refused while an older one goes on. Both are "" if there is nothing of the kind.
    """

    pid: int
    shards: tuple[ShardStats, ...]
    problems: dict[int, str]
    hopeless: str
    refused: str


@dataclass(frozen=True)
class Refusal:
    """The reason why a router did not take a request.

    kind: `full` if its queue is full, `invalid` if the request can never run, `lost` if the ingress is not
    attached to this router, `draining` if the router is to stop. why: a sentence.
    """

    kind: Literal["full", "invalid", "lost", "draining"]
    why: str


def fleet_name(app: str) -> str:
    """Return the name of an application's Fleet in Ray."""
    return f"{app}-fleet"


def shard_prefix(app: str) -> str:
    """Return the beginning of the names of an application's shards in Ray."""
    return f"{app}-shard-"
