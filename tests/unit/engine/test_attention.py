"""Paged attention against dense attention, and how prompts are cut into tiles.

T rows of a step, H query heads, D head dim.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from router.cache.fp8 import E4M3
from router.kernels.prompt_tiles import cut_into_tiles, tokens_per_tile
from router.model.attention import Chunk
from tests.support.paged import Requests, shape_of

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [
        pytest.param(torch.float32, torch.float32, id="compiled"),
        pytest.param(torch.float64, torch.float64, id="torch"),
        pytest.param(torch.float32, E4M3, id="FP8 and compiled"),
        pytest.param(torch.float64, E4M3, id="FP8 and torch"),
    ],
)
@settings(max_examples=60)
@given(data=st.data())
def test_any_chunks_in_any_steps_equal_dense_attention(
    dtype: torch.dtype, kv_dtype: torch.dtype, data: st.DataObject
) -> None:
    lengths = data.draw(st.lists(st.integers(1, 32), min_size=1, max_size=4))
    requests = Requests(
        lengths,
        shape_of(4, 2, 8),
        block_size=data.draw(st.sampled_from([1, 3, 8, 16])),
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=CPU,
    )
    left = dict(zip(requests.rows, lengths, strict=True))
    done = dict.fromkeys(requests.rows, 0)
    while left:
        chosen = data.draw(st.lists(st.sampled_from(sorted(left)), min_size=1, max_size=4, unique=True))
        chunks = [Chunk(row, done[row], data.draw(st.integers(1, left[row]))) for row in chosen]
        for chunk, out_THD in zip(chunks, requests.step(chunks), strict=True):
            expected = requests.dense(chunk.row)[chunk.start : chunk.start + chunk.count]
            torch.testing.assert_close(out_THD, expected, rtol=1e-4, atol=1e-5)
            done[chunk.row] += chunk.count
            left[chunk.row] -= chunk.count
        left = {row: count for row, count in left.items() if count}


@given(
    spans=st.lists(st.tuples(st.integers(0, 90), st.integers(1, 90)), min_size=1, max_size=5),
    first=st.integers(0, 9),
    group_size=st.integers(1, 300),
)
def test_tiles_hold_every_token_once(spans: list[tuple[int, int]], first: int, group_size: int) -> None:
    tokens = tokens_per_tile(group_size, torch.bfloat16)
    tile_X4 = cut_into_tiles(spans, first=first, tokens=tokens)
    assert tile_X4.dtype == np.int64
    found = sorted(
        (chunk, row + n, position + n) for chunk, row, position, count in tile_X4 for n in range(count)
    )
    rows = iter(range(first, first + sum(count for _, count in spans)))
    assert found == [
        (c, next(rows), start + n) for c, (start, count) in enumerate(spans) for n in range(count)
    ]
    assert 1 <= tile_X4[:, 3].min() <= tile_X4[:, 3].max() <= tokens
    assert list(tile_X4[:, 2]) == sorted(tile_X4[:, 2], reverse=True), "those that take longest come first"
