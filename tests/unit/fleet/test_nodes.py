"""Tests of the choice of a node for a shard."""

import pytest

from deploy.fleet.nodes import Node, Seat, Strategy, choose_seat, needs

GPU = {"GPU": 1.0}


def gpu_node(id_: str, *, total: float, available: float) -> Node:
    return Node(id_, total={"GPU": total}, available={"GPU": available})


def place(
    num_shards: int, room: dict[str, int], *, strategy: Strategy, lag: bool, resources: dict[str, float]
) -> dict[str, int]:
    """Return the number of shards per node after placing them one by one on nodes with room for so many GPUs.

    lag: Ray's numbers count no shard yet. If not, they count those that were placed before, though some are only starting.
    """
    seats: list[Seat] = []
    held = dict.fromkeys(room, 0)
    for _ in range(num_shards):
        nodes = [
            gpu_node(id_, total=room[id_], available=room[id_] - (0 if lag else held[id_] * resources["GPU"]))
            for id_ in room
        ]
        seat = choose_seat(nodes, seats=seats, resources=resources, strategy=strategy, num_shards=num_shards)
        if seat is None:
            break
        seats.append(seat)
        held[seat.node] += 1
    return held


@pytest.mark.parametrize("lag", [True, False], ids=["Ray lags", "Ray knows"])
@pytest.mark.parametrize(
    ("num_shards", "room", "strategy", "expected"),
    [
        (3, {"a": 4, "b": 4, "c": 4}, "auto", {"a": 1, "b": 1, "c": 1}),
        (3, {"a": 4, "b": 4}, "auto", {"a": 3, "b": 0}),
        (3, {"a": 2, "b": 2}, "auto", {"a": 2, "b": 1}),
        (3, {"a": 2, "b": 1}, "pack", {"a": 2, "b": 1}),
        (4, {"a": 2, "b": 1}, "pack", {"a": 2, "b": 1}),
        (2, {"a": 4, "b": 4, "c": 4}, "pack", {"a": 2, "b": 0, "c": 0}),
        (2, {"a": 4, "b": 4, "c": 4}, "spread", {"a": 1, "b": 1, "c": 0}),
        (3, {"a": 4, "b": 4}, "spread", {"a": 1, "b": 1}),
        (2, {"a": 0, "b": 1, "c": 1}, "auto", {"a": 0, "b": 1, "c": 1}),
        (2, {"a": 0, "b": 1}, "auto", {"a": 0, "b": 1}),
    ],
    ids=[
        "a node each",
        "too few nodes: packed",
        "auto spills",
        "pack spills",
        "pack waits",
        "pack",
        "spread",
        "spread waits",
        "full node",
        "no room",
    ],
)
def test_placement(
    num_shards: int, room: dict[str, int], strategy: Strategy, expected: dict[str, int], lag: bool
) -> None:
    assert place(num_shards, room, strategy=strategy, lag=lag, resources=GPU) == expected


@pytest.mark.parametrize("lag", [True, False], ids=["Ray lags", "Ray knows"])
def test_shards_that_take_half_a_gpu(lag: bool) -> None:
    placed = place(5, {"a": 1, "b": 2}, strategy="pack", lag=lag, resources={"GPU": 0.5})
    assert placed == {"a": 2, "b": 3}


def test_a_shard_that_ray_has_counted_takes_nothing_more() -> None:
    nodes = [gpu_node("a", total=2, available=1)]
    for seats, free in (([Seat("a")], True), ([Seat("a", left={"GPU": 0})], False)):
        seat = choose_seat(nodes, seats=seats, resources=GPU, strategy="pack", num_shards=2)
        assert (seat is not None) == free


def test_without_resources_any_node_will_do() -> None:
    assert choose_seat([Node("a", {}, {})], seats=[], resources={}, strategy="auto", num_shards=2) == Seat(
        "a"
    )


def test_without_nodes_it_waits() -> None:
    assert choose_seat([], seats=[], resources={}, strategy="auto", num_shards=1) is None


def test_a_shard_needs_what_is_stated_else_a_gpu_if_there_is_any() -> None:
    with_gpu, without = [gpu_node("a", total=1, available=0)], [Node("a", {"CPU": 1}, {"CPU": 1})]
    assert needs(with_gpu, {"CPU": 2.0}) == {"CPU": 2.0}
    assert needs(with_gpu, {}) == GPU
    assert needs(without, {}) == {}
