"""PromptTiles: the chunks of prompts in a step, cut so that one launch of a kernel computes all of them.

P chunks, X tiles, N blocks of a table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

ROWS = 64
"""Of a tile: one for each of its tokens and each query head of a KV head. As many as keep a GPU's matrix units busy."""

ROWS_FLOAT32 = 16
"""Those units do not compute in float32."""


@dataclass(frozen=True, eq=False)
class PromptTiles:
    """tile_X4: of each tile its chunk, its first token's row in the step and position in the context, and how many tokens it
    has, at most `tokens`. table_PN: blocks of the chunks' contexts, padded to the longest.
    """

    tile_X4: Tensor
    table_PN: Tensor
    tokens: int


def tokens_per_tile(group_size: int, dtype: torch.dtype) -> int:
    """group_size: query heads of one KV head. dtype: of queries."""
    return max(1, (ROWS_FLOAT32 if dtype == torch.float32 else ROWS) // group_size)


def cut_into_tiles(spans: Sequence[tuple[int, int]], *, first: int, tokens: int) -> np.ndarray:
    """int64 [X, 4], as PromptTiles says, those that take longest first.

    spans: of each chunk its first position and how many tokens it has. first: row of the step where the chunks begin.
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
