"""On which node a shard goes."""

import pytest

from deploy.nodes import Node, Strategy, choose_node


def place(num_shards: int, room: dict[str, int], *, strategy: Strategy) -> dict[str, int]:
    """Shards per node after placing them one by one on nodes with room for so many GPUs."""
    held = dict.fromkeys(room, 0)
    for _ in range(num_shards):
        nodes = [Node(id=id_, num_shards=held[id_], available={"GPU": room[id_] - held[id_]}) for id_ in room]
        node = choose_node(nodes, resources={"GPU": 1}, strategy=strategy, num_shards=num_shards)
        if node is None:
            break
        held[node] += 1
    return held


@pytest.mark.parametrize(
    ("num_shards", "room", "strategy", "expected"),
    [
        (3, {"a": 4, "b": 4, "c": 4}, "auto", {"a": 1, "b": 1, "c": 1}),
        (3, {"a": 4, "b": 4}, "auto", {"a": 3, "b": 0}),
        (3, {"a": 2, "b": 2}, "auto", {"a": 2, "b": 1}),
        (2, {"a": 4, "b": 4, "c": 4}, "pack", {"a": 2, "b": 0, "c": 0}),
        (2, {"a": 4, "b": 4, "c": 4}, "spread", {"a": 1, "b": 1, "c": 0}),
        (3, {"a": 4, "b": 4}, "spread", {"a": 1, "b": 1}),
        (2, {"a": 0, "b": 1, "c": 1}, "auto", {"a": 0, "b": 1, "c": 1}),
        (2, {"a": 0, "b": 1}, "auto", {"a": 0, "b": 1}),
    ],
    ids=[
        "a node each",
        "too few nodes: packed",
        "pack spills",
        "pack",
        "spread",
        "spread waits",
        "full node",
        "no room",
    ],
)
def test_placement(
    num_shards: int, room: dict[str, int], strategy: Strategy, expected: dict[str, int]
) -> None:
    assert place(num_shards, room, strategy=strategy) == expected


def test_without_resources_any_node_will_do() -> None:
    assert choose_node([Node("a", 0, {})], resources={}, strategy="auto", num_shards=2) == "a"


def test_without_nodes_it_waits() -> None:
    assert choose_node([], resources={}, strategy="auto", num_shards=1) is None
