"""On which node the next shard goes: a pure decision."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Strategy = Literal["auto", "spread", "pack"]


@dataclass(frozen=True)
class Node:
    """A live node. num_shards: of this fleet that are there already; available: what Ray could still reserve."""

    id: str
    num_shards: int
    available: Mapping[str, float]


def choose_node(
    nodes: Sequence[Node], *, resources: Mapping[str, float], strategy: Strategy, num_shards: int
) -> str | None:
    """The id of the node for one more of `num_shards` shards, or None: then wait until a node joins or frees room.

    spread: a node without a shard. pack: the fullest node that has room. auto: spread if there are as many nodes
    that could hold a shard as shards, else pack.
    """
    roomy = [
        node for node in nodes if all(node.available.get(key, 0) >= need for key, need in resources.items())
    ]
    eligible = [node for node in nodes if node in roomy or node.num_shards]
    spread = strategy == "spread" or (strategy == "auto" and len(eligible) >= num_shards)
    if spread:
        roomy = [node for node in roomy if node.num_shards == 0]
    order = sorted(roomy, key=lambda node: (-node.num_shards, -node.available.get("CPU", 0), node.id))
    return order[0].id if order else None
