"""Paged attention against dense attention. T rows of a step, S context tokens, H query heads, G KV heads, D head dim."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from router.attention import Chunk, PagedAttention, plan_attention
from router.kv_cache import BlockTables, KVCache
from router.model_config import TrunkShape

NUM_HEADS, SHAPE = (
    4,
    TrunkShape(num_layers=2, num_kv_heads=2, head_dim=8, hidden=32, vocab_size=64, max_model_len=32),
)
CPU = torch.device("cpu")
SCALE = 0.3
LAYER = 1


class Requests:
    """Some requests whose queries, keys and values are random; computed in steps, as an engine would."""

    def __init__(self, lengths: list[int], *, block_size: int, dtype: torch.dtype) -> None:
        num_blocks = 2 + sum(-(-length // block_size) for length in lengths)
        self.tables = BlockTables(
            num_blocks=num_blocks, block_size=block_size, max_requests=1 + len(lengths), max_tokens=32
        )
        cache = KVCache(SHAPE, num_slots=num_blocks * block_size, dtype=dtype, device=CPU)
        cache.k[:], cache.v[:] = torch.nan, torch.nan  # what others hold, and what is free, may be anything
        self.attention = PagedAttention(cache, block_size=block_size)
        self.dtype = dtype
        self._row(1)  # holds block 0, which is also what an unused entry of a table says
        self.rows = [self._row(length) for length in lengths]
        generator = torch.Generator().manual_seed(0)
        heads = (NUM_HEADS, SHAPE.num_kv_heads, SHAPE.num_kv_heads)
        self.qkv = {
            row: tuple(
                torch.randn(n, length, SHAPE.head_dim, generator=generator, dtype=dtype) for n in heads
            )
            for row, length in zip(self.rows, lengths, strict=True)
        }
        for row, length in zip(self.rows, lengths, strict=True):
            cache.erase(self.tables.slots(row, 0, -(-length // block_size) * block_size))

    def _row(self, num_tokens: int) -> int:
        row = self.tables.take_row()
        assert row is not None
        assert self.tables.reserve(row, num_tokens)
        return row

    def step(self, chunks: list[Chunk]) -> list[Tensor]:
        """[count, H, D] for each chunk, in the order given."""
        ordered = sorted(chunks, key=lambda chunk: chunk.count > 1)
        self.attention.plan = plan_attention(ordered, self.tables, dtype=self.dtype, device=CPU)
        packed = [
            torch.cat(
                [self.qkv[chunk.row][i][:, chunk.start : chunk.start + chunk.count] for chunk in ordered],
                dim=1,
            )
            for i in range(3)
        ]
        out_THD = self.attention.forward(LAYER, packed[0], packed[1], packed[2], scale=SCALE)
        parts = dict(zip(ordered, out_THD.split([chunk.count for chunk in ordered]), strict=True))
        return [parts[chunk] for chunk in chunks]

    def dense(self, row: int) -> Tensor:
        """[S, H, D]: the whole request at once."""
        q, k, v = (tensor[None] for tensor in self.qkv[row])
        out_1HSD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
        return out_1HSD[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["compiled", "torch"])
@settings(max_examples=60)
@given(data=st.data())
def test_any_chunks_in_any_steps_equal_dense_attention(dtype: torch.dtype, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, 32), min_size=1, max_size=4))
    requests = Requests(lengths, block_size=data.draw(st.sampled_from([1, 3, 8, 16])), dtype=dtype)
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
