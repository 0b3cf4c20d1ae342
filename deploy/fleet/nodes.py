"""The choice of the node for the next shard, as pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

Strategy = Literal["auto", "spread", "pack"]


@dataclass(frozen=True)
class Node:
    """A live node.

    total: the resources that Ray may reserve there. available: those still free, a moment ago.
    """

    id: str
    total: Mapping[str, float]
    available: Mapping[str, float]


@dataclass(frozen=True)
class Seat:
    """The node of a shard.

    left: what the node has left with the shard on it; empty once Ray's own numbers count it.
    """

    node: str
    left: Mapping[str, float] = field(default_factory=dict)


def needs(nodes: Sequence[Node], stated: Mapping[str, float]) -> dict[str, float]:
    """Return the resources that Ray reserves for a shard: as stated, else a GPU if any node has one."""
    return dict(stated) or ({"GPU": 1.0} if any(node.total.get("GPU") for node in nodes) else {})


def choose_seat(
    nodes: Sequence[Node],
    *,
    seats: Sequence[Seat],
    resources: Mapping[str, float],
    strategy: Strategy,
    num_shards: int,
) -> Seat | None:
    """Return a seat for one more of `num_shards` shards, or None if none has room.

    Without a seat the caller waits until a node joins or frees room. seats: those of this fleet's shards,
    including the ones that Ray has not started yet, which its numbers lack. strategy: `spread` chooses a node
    without a shard; `pack` the fullest node that has room; `auto` is spread if there are as many nodes that
    could hold a shard as shards, else pack.
    """
    free = {node.id: _free(node, seats) for node in nodes}
    held = {node.id: sum(seat.node == node.id for seat in seats) for node in nodes}
    roomy = [
        id_ for id_, room in free.items() if all(room.get(key, 0) >= resources[key] for key in resources)
    ]
    eligible = [id_ for id_ in free if id_ in roomy or held[id_]]
    if strategy == "spread" or (strategy == "auto" and len(eligible) >= num_shards):
        roomy = [id_ for id_ in roomy if not held[id_]]
    if not roomy:
        return None
    best = min(roomy, key=lambda id_: (-held[id_], -free[id_].get("CPU", 0), id_))
    return Seat(best, left={key: free[best][key] - need for key, need in resources.items()})


def _free(node: Node, seats: Sequence[Seat]) -> dict[str, float]:
    """Return what a node has free.

    It is Ray's number, unless a shard that Ray may not have counted yet will leave less.
    """
    mine = [seat.left for seat in seats if seat.node == node.id]
    return {
        key: min([room, *(left[key] for left in mine if key in left)]) for key, room in node.available.items()
    }
