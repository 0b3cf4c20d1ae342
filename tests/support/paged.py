"""Requests: random queries, keys and values, attended to in steps, as an engine would, and all at once.

S context tokens, H query heads, G KV heads, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from router.cache.block_tables import BlockTables
from router.cache.fp8 import E4M3, dequantize, quantize
from router.cache.kv_cache import KVCache
from router.model.attention import Chunk, PagedAttention, plan_attention
from router.model_config import TrunkShape

SCALE = 0.3
LAYER = 1


def shape_of(num_heads: int, num_kv_heads: int, head_dim: int, *, max_model_len: int = 32) -> TrunkShape:
    return TrunkShape(
        num_layers=2,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        hidden=32,
        vocab_size=64,
        max_model_len=max_model_len,
    )


class Requests:
    def __init__(
        self,
        lengths: list[int],
        shape: TrunkShape,
        *,
        block_size: int,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        num_blocks = 2 + sum(-(-length // block_size) for length in lengths)
        self.tables = BlockTables(
            num_blocks=num_blocks,
            block_size=block_size,
            max_requests=1 + len(lengths),
            max_tokens=shape.max_model_len,
        )
        cache = KVCache(shape, num_slots=num_blocks * block_size, dtype=kv_dtype, device=device)
        cache.k[:], cache.v[:] = torch.nan, torch.nan  # what others hold, and what is free, may be anything
        self.attention = PagedAttention(cache, block_size=block_size)
        self._shape, self._dtype, self._kv_dtype, self._device = shape, dtype, kv_dtype, device
        self._row(1)  # holds block 0, which is also what an unused entry of a table says
        self.rows = [self._row(length) for length in lengths]
        generator = torch.Generator().manual_seed(0)
        heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
        self.qkv = {
            row: tuple(
                torch.randn(n, length, shape.head_dim, generator=generator, dtype=dtype).to(device)
                for n in heads
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
        """Return the outputs [count, H, D] of each chunk, in the order given."""
        ordered = sorted(chunks, key=lambda chunk: chunk.count > 1)
        self.attention.plan = plan_attention(
            ordered, self.tables, shape=self._shape, dtype=self._dtype, device=self._device
        )
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
        """Return the outputs [S, H, D] of the whole request at once, at least in float32, on what the cache
        keeps of its keys and values."""
        q, k, v = self.qkv[row]
        if self._kv_dtype == E4M3:
            k, v = (dequantize(*quantize(x), self._dtype) for x in (k, v))
        wide = torch.promote_types(self._dtype, torch.float32)
        q, k, v = (x[None].to(wide) for x in (q, k, v))
        out_1HSD = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE, enable_gqa=True)
        return out_1HSD[0].transpose(0, 1)
