"""ExpertPlacement says which expert sits in which physical slot. Pure data and pure functions, without torch.

Glossary (the field's): a *logical* expert is one that the checkpoint numbers. A *physical* expert is a slot that
holds a copy of one; a logical expert with two slots has one *redundant* copy. EP rank r owns the physical ids
[r * slots_per_rank, (r + 1) * slots_per_rank). L layers, E logical experts, P physical slots, R ranks.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from experts.weights import MoEShape

EMPTY = -1
"""The id in a slot that holds no expert, and of an expert that is not on this rank."""


@dataclass(frozen=True, eq=False)
class ExpertPlacement:
    """A map from physical slots to logical experts. Its size is fixed for a deployment, so kernels and pointers never move.

    slots_LP: int32, the logical id in each physical slot, EMPTY for a spare one. P = ranks * slots_per_rank.
        A dense layer's row is all EMPTY; in a MoE layer every logical expert has at least one slot.
    """

    slots_LP: NDArray[np.int32]
    slots_per_rank: int

    def __post_init__(self) -> None:
        assert self.slots_LP.dtype == np.int32, self.slots_LP.dtype
        assert self.slots_LP.ndim == 2, self.slots_LP.shape
        assert self.slots_LP.shape[1] % self.slots_per_rank == 0, (self.slots_LP.shape, self.slots_per_rank)

    @property
    def num_ranks(self) -> int:
        """The number of EP ranks."""
        return self.slots_LP.shape[1] // self.slots_per_rank

    def local(self, rank: int) -> NDArray[np.int32]:
        """Return [L, slots_per_rank]: the logical ids that `rank` holds."""
        return self.slots_LP[:, rank * self.slots_per_rank : (rank + 1) * self.slots_per_rank]

    @cached_property
    def primary_LE(self) -> NDArray[np.int32]:
        """The first slot of every logical expert, int32 [L, E]; EMPTY in dense layers."""
        num_layers, num_slots = self.slots_LP.shape
        num_experts = int(self.slots_LP.max()) + 1
        primary_LE = np.full((num_layers, num_experts), EMPTY, np.int32)
        for slot in reversed(range(num_slots)):  # the first slot wins
            logical_L = self.slots_LP[:, slot]
            held_L = logical_L != EMPTY
            primary_LE[held_L, logical_L[held_L]] = slot
        return primary_LE

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, ExpertPlacement)
            and self.slots_per_rank == other.slots_per_rank
            and np.array_equal(self.slots_LP, other.slots_LP)
        )


def place_evenly(shape: MoEShape, *, num_ranks: int) -> ExpertPlacement:
    """Return the placement of a checkpoint's experts in contiguous shares, see even_placement."""
    return even_placement(
        shape.moe_layers, num_layers=shape.num_layers, num_experts=shape.num_experts, num_ranks=num_ranks
    )


def even_placement(
    moe_layers: tuple[int, ...], *, num_layers: int, num_experts: int, num_ranks: int
) -> ExpertPlacement:
    """Return contiguous shares that differ by at most one expert: 32 experts on 3 ranks are 11, 11 and 10.

    Raises ValueError if there are more ranks than experts.
    """
    if num_ranks > num_experts:
        raise ValueError(
            f"experts.shards={num_ranks} is more than the model's {num_experts} experts per layer"
        )
    slots_per_rank = -(-num_experts // num_ranks)
    row_P = np.full((num_ranks, slots_per_rank), EMPTY, np.int32)
    for rank, share in enumerate(np.array_split(np.arange(num_experts), num_ranks)):
        row_P[rank, : len(share)] = share
    slots_LP = np.full((num_layers, num_ranks * slots_per_rank), EMPTY, np.int32)
    slots_LP[list(moe_layers)] = row_P.flatten()
    return ExpertPlacement(slots_LP=slots_LP, slots_per_rank=slots_per_rank)
