"""ExpertPlacement: every expert in one place, shares as equal as they can be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.placement import EMPTY, ExpertPlacement, even_placement
from experts.shard import slots_of


@st.composite
def placements(draw: st.DrawFn) -> tuple[ExpertPlacement, tuple[int, ...], int]:
    """Draw a placement, the layers with experts, and how many experts each has."""
    num_layers = draw(st.integers(1, 5))
    moe_layers = tuple(sorted(draw(st.sets(st.integers(0, num_layers - 1), min_size=1))))
    num_experts = draw(st.integers(1, 40))
    num_ranks = draw(st.integers(1, num_experts))
    placement = even_placement(
        moe_layers, num_layers=num_layers, num_experts=num_experts, num_ranks=num_ranks
    )
    return placement, moe_layers, num_experts


def test_32_experts_on_3_ranks() -> None:
    placement = even_placement((1,), num_layers=2, num_experts=32, num_ranks=3)
    assert placement.num_ranks == 3
    assert placement.slots_per_rank == 11
    assert placement.local(0)[1].tolist() == list(range(11))
    assert placement.local(1)[1].tolist() == list(range(11, 22))
    assert placement.local(2)[1].tolist() == [*range(22, 32), EMPTY]
    assert (placement.slots_LP[0] == EMPTY).all()


@given(placements())
def test_each_expert_has_one_slot_and_shares_are_even(
    case: tuple[ExpertPlacement, tuple[int, ...], int],
) -> None:
    placement, moe_layers, num_experts = case
    for layer, row in enumerate(placement.slots_LP):
        held = row[row != EMPTY].tolist()
        assert sorted(held) == (list(range(num_experts)) if layer in moe_layers else [])
        shares = [int((placement.local(rank)[layer] != EMPTY).sum()) for rank in range(placement.num_ranks)]
        assert max(shares) - min(shares) <= 1


@given(placements())
def test_primary_leads_to_a_slot_that_holds_the_expert(
    case: tuple[ExpertPlacement, tuple[int, ...], int],
) -> None:
    placement, moe_layers, num_experts = case
    for layer in moe_layers:
        assert placement.slots_LP[layer, placement.primary_LE[layer]].tolist() == list(range(num_experts))


@given(placements())
def test_slots_of_all_ranks_are_all_experts(case: tuple[ExpertPlacement, tuple[int, ...], int]) -> None:
    placement, moe_layers, num_experts = case
    everything = [
        (layer, expert)
        for rank in range(placement.num_ranks)
        for layer, _, expert in slots_of(placement, rank)
    ]
    assert sorted(everything) == [(layer, expert) for layer in moe_layers for expert in range(num_experts)]


def test_primary_is_the_first_of_several_copies() -> None:
    slots_LP = np.array([[1, 0, 0, 1], [EMPTY] * 4], np.int32)
    placement = ExpertPlacement(slots_LP=slots_LP, slots_per_rank=2)
    assert placement.primary_LE.tolist() == [[1, 0], [EMPTY, EMPTY]]


def test_placements_are_compared_by_value() -> None:
    def placement() -> ExpertPlacement:
        return even_placement((0,), num_layers=1, num_experts=4, num_ranks=2)

    assert placement() == placement()
    assert placement() != even_placement((0,), num_layers=1, num_experts=4, num_ranks=1)


def test_refuses_more_ranks_than_experts() -> None:
    with pytest.raises(ValueError, match=r"experts.shards=5 is more than the model's 4 experts"):
        even_placement((0,), num_layers=1, num_experts=4, num_ranks=5)
