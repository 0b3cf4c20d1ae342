"""PromptTiles: the chunks of prompts in a step, cut into tiles so that one launch of a kernel computes all of them.

P chunks, X tiles, N blocks of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 64
"""Rows of a tile: one for each of its tokens and each query head of a KV head. So many keep a GPU's tensor cores busy."""

ROWS_FLOAT32 = 16
"""Rows of a tile in float32, in which tensor cores do not compute."""


@dataclass(frozen=True, eq=False)
class PromptTiles:
    """The tiles of a step, and where their contexts are.

    tile_X4: int64; of each tile its chunk, its first token's row in the step and position in the context, and how many
    tokens it has, at most `tokens`. table_PN: int64, blocks of the chunks' contexts, padded to the longest.
    """

    tile_X4: Tensor
    table_PN: Tensor
    tokens: int


def tokens_per_tile(group_size: int, dtype: torch.dtype) -> int:
    """Return how many tokens a tile has. group_size: query heads of one KV head. dtype: that of the queries."""
    return max(1, (ROWS_FLOAT32 if dtype == torch.float32 else ROWS) // group_size)


def cut_into_tiles(spans: Sequence[tuple[int, int]], *, first: int, tokens: int) -> np.ndarray:
    """Return PromptTiles.tile_X4, int64 [X, 4], the tiles that take longest first.

    spans: the first position and the number of tokens of each chunk. first: the row of the step where the chunks begin.
    """
    tiles = []
    for chunk, (start, count) in enumerate(spans):
        begin_X = np.arange(0, count, tokens)
        count_X = np.minimum(tokens, count - begin_X)
        tiles.append(
            np.stack([np.full_like(begin_X, chunk), first + begin_X, start + begin_X, count_X], axis=1)
        )
        first += count
    tile_X4 = np.concatenate(tiles)
    return tile_X4[np.argsort(-tile_X4[:, 2], kind="stable")]
