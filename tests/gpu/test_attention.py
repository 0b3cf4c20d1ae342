"""Attention on a GPU, by our kernels, against dense attention in float32: prompts, decoding, both, on any
cache."""

import random

import pytest
import torch

from router.cache.fp8 import E4M3
from router.kernels.prompt_tiles import PromptTiles
from router.model.attention import Chunk, plan_attention
from tests.support.paged import Requests, shape_of

pytestmark = pytest.mark.gpu

GPU = torch.device("cuda")
LENGTHS = [1, 2, 33, 64, 129, 300, 700, 1500]
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""The largest norm of the difference, relative to the norm."""


@pytest.mark.parametrize("quantized", [False, True], ids=["", "FP8"])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize(
    "heads",
    [(32, 4, 128), (12, 2, 64), (10, 2, 80), (3, 3, 96), (32, 2, 128)],
    ids=lambda heads: "x".join(map(str, heads)),
)
def test_any_chunks_in_any_steps_are_dense_attention(
    heads: tuple[int, int, int], dtype: torch.dtype, quantized: bool
) -> None:
    rng = random.Random(0)
    kv_dtype = E4M3 if quantized else dtype
    requests = Requests(
        LENGTHS,
        shape_of(*heads, max_model_len=2048),
        block_size=16,
        dtype=dtype,
        kv_dtype=kv_dtype,
        device=GPU,
    )
    left = dict(zip(requests.rows, LENGTHS, strict=True))
    dense = {row: requests.dense(row) for row in requests.rows}
    while left:
        chunks = [
            Chunk(row, dense[row].shape[0] - left[row], rng.choice([1, rng.randint(1, left[row]), left[row]]))
            for row in left
        ]
        for chunk, out_THD in zip(chunks, requests.step(chunks), strict=True):
            expected = dense[chunk.row][chunk.start : chunk.start + chunk.count]
            error = (out_THD.float() - expected).norm() / expected.norm()
            assert error < LIMIT[dtype], chunk
            left[chunk.row] -= chunk.count
        left = {row: count for row, count in left.items() if count}


def test_prompts_have_no_masks_here() -> None:
    shape = shape_of(4, 2, 64)
    requests = Requests([20], shape, block_size=4, dtype=torch.bfloat16, kv_dtype=torch.bfloat16, device=GPU)
    chunk = Chunk(requests.rows[0], 8, 12)
    plan = plan_attention([chunk], requests.tables, shape=shape, dtype=torch.bfloat16, device=GPU)
    assert isinstance(plan.prompts, PromptTiles)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_in_fp8(bad: float) -> None:
    requests = Requests(
        [40],
        shape_of(4, 2, 64, max_model_len=64),
        block_size=4,
        dtype=torch.bfloat16,
        kv_dtype=E4M3,
        device=GPU,
    )
    row = requests.rows[0]
    requests.qkv[row][1][0, 7, 5] = bad
    (out_THD,) = requests.step([Chunk(row, 0, 30)])
    assert out_THD[:7].isfinite().all()
    assert not out_THD[7:, :2].isfinite().any()
    (decoded_THD,) = requests.step([Chunk(row, 30, 1)])
    assert not decoded_THD[:, :2].isfinite().any()
    assert decoded_THD[:, 2:].isfinite().all()
