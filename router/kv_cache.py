"""Paged KV cache: fixed blocks of tokens, a table of blocks per running request.

R rows (one per running request), N blocks of a row, S slots (num_blocks * block_size), G KV heads, D head dim.
"""

import numpy as np
import torch

from router.config import KVCacheConfig
from router.model_config import TrunkShape


class BlockTables:
    """Which blocks each running request holds. Accounting only: no keys, no values."""

    def __init__(self, *, num_blocks: int, block_size: int, max_requests: int, max_tokens: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.table_RN = np.zeros((max_requests, -(-max_tokens // block_size)), np.int64)
        self._held_R: list[list[int]] = [[] for _ in range(max_requests)]
        self._free_blocks = list(range(num_blocks))[::-1]
        self._free_rows = list(range(max_requests))[::-1]

    @property
    def num_free_blocks(self) -> int:
        return len(self._free_blocks)

    def take_row(self) -> int | None:
        """A row for a new request, or None if max_requests run already."""
        return self._free_rows.pop() if self._free_rows else None

    def reserve(self, row: int, num_tokens: int) -> bool:
        """Make the row hold at least num_tokens; False, and nothing changed, if blocks are short."""
        held = self._held_R[row]
        missing = -(-num_tokens // self.block_size) - len(held)
        if missing > len(self._free_blocks):
            return False
        for _ in range(missing):
            block = self._free_blocks.pop()
            self.table_RN[row, len(held)] = block
            held.append(block)
        return True

    def release(self, row: int) -> None:
        """Give the row and its blocks back."""
        self._free_blocks.extend(reversed(self._held_R[row]))
        self._held_R[row] = []
        self._free_rows.append(row)

    def slots(self, row: int, start: int, end: int) -> np.ndarray:
        """int64 [end - start]: the slots of a row's tokens at these positions."""
        position = np.arange(start, end)
        return self.table_RN[row, position // self.block_size] * self.block_size + position % self.block_size

    def check_integrity(self) -> None:
        """Every block is held once or free, every held one stands in its row's table; else AssertionError."""
        held = [block for row in self._held_R for block in row]
        assert sorted(held + self._free_blocks) == list(range(self.num_blocks)), (
            "a block was lost or given twice"
        )
        assert len(set(self._free_rows)) == len(self._free_rows), "a row was given back twice"
        for row, blocks in enumerate(self._held_R):
            assert self.table_RN[row, : len(blocks)].tolist() == blocks, f"row {row}"
            assert not (blocks and row in self._free_rows), f"row {row} is free but holds blocks"


class KVCache:
    """Keys and values of every layer, by slot: k[layer], v[layer] are [S, G, D]."""

    def __init__(
        self, shape: TrunkShape, *, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (shape.num_layers, num_slots, shape.num_kv_heads, shape.head_dim)
        self.k = torch.zeros(
            size, dtype=dtype, device=device
        )  # zeros: slots that a mask hides must be finite
        self.v = torch.zeros(size, dtype=dtype, device=device)

    def erase(self, slots: np.ndarray) -> None:
        """Zeros, in every layer."""
        index = torch.from_numpy(slots).to(self.k.device)
        self.k[:, index] = 0
        self.v[:, index] = 0


def num_blocks_for(shape: TrunkShape, config: KVCacheConfig, *, dtype: torch.dtype) -> int:
    """How many blocks of keys and values fit into the memory. Raises ValueError if none does."""
    bytes_per_token = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * dtype.itemsize
    num_blocks = int(config.memory_gib * 2**30) // (bytes_per_token * config.block_size)
    if num_blocks == 0:
        raise ValueError(
            f"router.kv_cache.memory_gib={config.memory_gib} holds no block of "
            f"{config.block_size} tokens of {bytes_per_token} bytes each"
        )
    return num_blocks
