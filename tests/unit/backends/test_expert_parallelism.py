"""The sum of the shards' bfloat16 outputs is that of one shard which holds every expert, whatever the shares.

Odd shares, an empty one, and copies of an expert on two shards that take its tokens in turns. T tokens, D hidden,
K top-k, P physical slots.
"""

import itertools
from functools import cache, partial

import numpy as np
import pytest
import torch
from torch import Tensor

from experts.placement import EMPTY, ExpertPlacement
from tests.unit.backends.test_b12x_layout import moe_shape, random_expert
from tests.unit.backends.test_backends import make_shard

LAYER, NUM_EXPERTS = 0, 7
SHAPE = moe_shape(128, 64)
BACKENDS = ["cpu", "torch", "reference", "b12x-emulated"]

LIMIT = 2**-7
"""The largest error relative to a row's norm. Each shard rounds its output to bfloat16 once, by up to 2^-9; beyond 1024 pairs b12x adds the terms
of a shard in bfloat16, 4 of them here."""

SHARES = {
    "even": [[0, 1, 2, 3], [4, 5, 6]],
    "odd": [[6], [0, 2, 4, 1, 3], [5]],
    "one is empty": [[0, 1, 2, 3, 4, 5, 6], []],
    "copies": [[0, 1, 2, 3, 4], [2, 3, 4, 5, 6]],
    "all twice": [[0, 1, 2, 3, 4, 5, 6]] * 2,
}
LOADS = {
    "one token": [[3, 5, 0, 6]],
    "random": np.random.default_rng(0).permuted(np.tile(np.arange(7), (33, 1)), axis=1)[:, :4].tolist(),
    "4096 tokens": [[(t + k * (1 + t % 2)) % 7 for k in range(4)] for t in range(4096)],
    "4096 tokens on one expert": [[2]] * 4096,
    "none": [[EMPTY] * 4] * 3,
    "some": [[EMPTY, 1, EMPTY, 4], [EMPTY] * 4, [6, EMPTY, EMPTY, EMPTY]],
}


def placement_of(shares: list[list[int]]) -> ExpertPlacement:
    slots_per_rank = max(map(len, shares))
    row_P = [expert for share in shares for expert in share + [EMPTY] * (slots_per_rank - len(share))]
    return ExpertPlacement(slots_LP=np.array([row_P], np.int32), slots_per_rank=slots_per_rank)


def in_turns(logical_TK: Tensor, placement: ExpertPlacement) -> Tensor:
    """Return physical ids: a token's number says which copy of an expert it takes."""
    slots = [np.flatnonzero(placement.slots_LP[LAYER] == expert).tolist() for expert in range(NUM_EXPERTS)]
    rows = [
        [slots[expert][t % len(slots[expert])] if expert != EMPTY else EMPTY for expert in row]
        for t, row in enumerate(logical_TK.tolist())
    ]
    return torch.tensor(rows, dtype=torch.int32)


def sum_of_shards(backend: str, shares: list[list[int]], logical_TK: Tensor) -> Tensor:
    """Return the sum in float32 of the shards' outputs, whose buffers were full of NaN before."""
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(len(logical_TK), SHAPE.hidden, generator=generator).bfloat16()
    w_TK = torch.rand(logical_TK.shape, generator=generator)
    placement = placement_of(shares)
    phys_TK = in_turns(logical_TK, placement)
    total_TD = torch.zeros(x_TD.shape)
    for rank in range(len(shares)):
        shard = make_shard(
            placement, rank, backend, torch.bfloat16, shape=SHAPE, expert_of=partial(random_expert, SHAPE)
        )
        out_TD = torch.full_like(x_TD, torch.nan)
        shard.forward(LAYER, x_TD, phys_TK, w_TK, out_TD=out_TD)
        total_TD += out_TD.float()
    return total_TD


@cache
def unsplit(backend: str, load: str) -> Tensor:
    return sum_of_shards(backend, [list(range(NUM_EXPERTS))], torch.tensor(LOADS[load], dtype=torch.int32))


TOO_SLOW = {("reference", load) for load in LOADS if "4096" in load}
"""It goes token by token."""


@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize(
    ("backend", "load"), [case for case in itertools.product(BACKENDS, LOADS) if case not in TOO_SLOW]
)
def test_the_sum_does_not_depend_on_the_shares(backend: str, load: str, shares: str) -> None:
    whole_TD = unsplit(backend, load)
    ours_TD = sum_of_shards(backend, SHARES[shares], torch.tensor(LOADS[load], dtype=torch.int32))
    assert ((ours_TD - whole_TD).norm(dim=1) <= LIMIT * whole_TD.norm(dim=1)).all()
