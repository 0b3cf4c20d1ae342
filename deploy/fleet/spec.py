"""What routers, the Fleet and its shards tell each other about themselves. Light: imports neither torch nor Ray."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from deploy.logs import LogFormat
from experts.config import ExpertsConfig
from experts.progress import Progress

if TYPE_CHECKING:
    from experts.fabric import ShardAddress
    from experts.placement import ExpertPlacement

NAMESPACE = "sparkmoe"
"""Of our named actors."""


@dataclass(frozen=True)
class FleetSpec:
    """What a router wants of its fleet: everything that shards have in common.

    dtype: of the kernel, as in the config: `auto` is for the shard to decide. resources: what Ray reserves for a shard.
    lease_s: how long shards, and their Fleet, outlive the last word of a router. log_format: for shards that start;
    another one is no reason to start them anew.
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
    """What a restarted Fleet learns from a live shard. address and placement: None while it loads."""

    rank: int
    spec: FleetSpec
    address: "ShardAddress | None"
    placement: "ExpertPlacement | None"
    epoch: int
    node: str


@dataclass(frozen=True)
class ShardStats:
    """For people and metrics. loading: how far it is, None once it serves.

    Since the start: num_pairs, (token, expert) pairs computed; num_activated, experts with a pair, of every layer's
    forward; num_layers, forwards, of num_rows tokens, which took layer_s with the device, without the wire.
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


@dataclass(frozen=True)
class FleetOverview:
    """shards: those that answer, also while they load. problems: by rank, a sentence why it has no shard. hopeless: what a user must mend, or nothing comes up.

    refused: why the newest spec was refused while an older one goes on. Both are "" if there is nothing of the kind.
    """

    pid: int
    shards: tuple[ShardStats, ...]
    problems: dict[int, str]
    hopeless: str
    refused: str


@dataclass(frozen=True)
class Refusal:
    """Why a router did not take a request: its queue is full, the request can never run, it came to the wrong router,
    or the router is to stop."""

    kind: Literal["full", "invalid", "lost", "draining"]
    why: str


def fleet_name(app: str) -> str:
    return f"{app}-fleet"


def shard_prefix(app: str) -> str:
    """Every shard's name begins with it."""
    return f"{app}-shard-"
