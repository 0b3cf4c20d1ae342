"""Paged KV cache: fixed blocks of tokens, a table of blocks per running request.

R rows (one per running request), N blocks of a row, S slots (num_blocks * block_size), G KV heads, D head dim.
"""

import os
from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from router.cache.block_pool import BlockPool
from router.cache.fp8 import E4M3
from router.config import KVCacheConfig
from router.model_config import TrunkShape


class BlockTables:
    """Which blocks each running request holds, in the order of its tokens. Accounting only: no keys, no values."""

    def __init__(self, *, num_blocks: int, block_size: int, max_requests: int, max_tokens: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks
        self.table_RN = np.zeros((max_requests, -(-max_tokens // block_size)), np.int64)
        self._pool = BlockPool(num_blocks)
        self._held_R: list[list[int]] = [[] for _ in range(max_requests)]
        self._num_reserved_R = [0] * max_requests  # tokens
        self._num_proven_R = [0] * max_requests  # tokens
        self._free_rows = list(range(max_requests))[::-1]

    @property
    def num_free_blocks(self) -> int:
        """Held by no row. Among them are those of the prefix cache, which are given away when no others are left."""
        return self._pool.num_free

    @property
    def num_free_rows(self) -> int:
        return len(self._free_rows)

    def take_row(self) -> int | None:
        """A row for a new request, or None if max_requests run already."""
        return self._free_rows.pop() if self._free_rows else None

    def num_found(self, keys: Sequence[bytes]) -> int:
        """How many of the first of these blocks the prefix cache has."""
        return next((n for n, key in enumerate(keys) if self._pool.find(key) is None), len(keys))

    def share(self, row: int, keys: Sequence[bytes]) -> None:
        """Let a row that holds nothing begin with these blocks, all of which the prefix cache has."""
        for key in keys:
            block = self._pool.find(key)
            assert block is not None
            self._pool.hold(block)
            self._append(row, block)
        self._num_reserved_R[row] = self._num_proven_R[row] = len(keys) * self.block_size

    def reserve(self, row: int, num_tokens: int, *, spare: int = 0) -> bool:
        """Make the row hold at least num_tokens and leave `spare` blocks; False, and nothing changed, if they are short."""
        missing = -(-num_tokens // self.block_size) - len(self._held_R[row])
        if missing > 0 and missing + spare > self._pool.num_free:
            return False
        for _ in range(missing):
            self._append(row, self._pool.take())
        self._num_reserved_R[row] = max(self._num_reserved_R[row], num_tokens)
        return True

    def prove(self, row: int, num_tokens: int, keys: Sequence[bytes]) -> None:
        """Keys and values of the row's first tokens are final and finite. Its full blocks, whose keys these are, may be shared."""
        for place in range(self._num_proven_R[row] // self.block_size, num_tokens // self.block_size):
            self._pool.publish(self._held_R[row][place], keys[place])
        self._num_proven_R[row] = num_tokens

    def release(self, row: int) -> None:
        """Give the row and its blocks back, the last tokens' first: they are of use to the fewest."""
        proven, reserved = self._num_proven_R[row], self._num_reserved_R[row]
        first_doubtful = proven // self.block_size if reserved > proven else len(self._held_R[row])
        for place, block in reversed(list(enumerate(self._held_R[row]))):
            self._pool.release(block, doubtful=place >= first_doubtful)
        self._held_R[row] = []
        self._num_reserved_R[row] = self._num_proven_R[row] = 0
        self._free_rows.append(row)

    def slots(self, row: int, start: int, end: int) -> np.ndarray:
        """int64 [end - start]: the slots of a row's tokens at these positions."""
        position = np.arange(start, end)
        return self.table_RN[row, position // self.block_size] * self.block_size + position % self.block_size

    def slots_to_erase(self) -> np.ndarray:
        """int64: slots given out since the last call that may hold NaN, for whoever writes the next step."""
        blocks = np.array(self._pool.drain_to_erase(), np.int64)
        return (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()

    def check_integrity(self) -> None:
        """Every block is held by the rows in whose tables it stands, or free; else AssertionError."""
        num_holders = [0] * self.num_blocks
        for block in chain.from_iterable(self._held_R):
            num_holders[block] += 1
        self._pool.check_integrity(num_holders)
        assert len(set(self._free_rows)) == len(self._free_rows), "a row was given back twice"
        for row, blocks in enumerate(self._held_R):
            assert self.table_RN[row, : len(blocks)].tolist() == blocks, f"row {row}"
            assert len(set(blocks)) == len(blocks), f"row {row} holds a block twice"
            assert not (blocks and row in self._free_rows), f"row {row} is free but holds blocks"
            assert self._num_proven_R[row] <= self._num_reserved_R[row] <= len(blocks) * self.block_size, (
                f"row {row}"
            )

    def _append(self, row: int, block: int) -> None:
        held = self._held_R[row]
        self.table_RN[row, len(held)] = block
        held.append(block)


class LayerCache(NamedTuple):
    """Keys and values of one layer. scale_SG2: of FP8 alone, what each token's head of either is to be multiplied by; float32."""

    k_SGD: Tensor
    v_SGD: Tensor
    scale_SG2: Tensor | None


class KVCache:
    """Keys and values of every layer, by slot: k[layer], v[layer] are [S, G, D], scales[layer], of FP8, [S, G, 2]."""

    def __init__(
        self, shape: TrunkShape, *, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """dtype: of what is kept, see stored_dtype."""
        size = (shape.num_layers, num_slots, shape.num_kv_heads, shape.head_dim)
        self.k = torch.zeros(
            size, dtype=dtype, device=device
        )  # zeros: slots that a mask hides must be finite
        self.v = torch.zeros(size, dtype=dtype, device=device)
        self.scales: Tensor | None = None
        if dtype == E4M3:
            self.scales = torch.zeros(*size[:3], 2, dtype=torch.float32, device=device)

    def layer(self, layer: int) -> LayerCache:
        return LayerCache(self.k[layer], self.v[layer], None if self.scales is None else self.scales[layer])

    def erase(self, slots: np.ndarray) -> None:
        """Zeros, in every layer."""
        if len(slots) == 0:
            return
        index = torch.from_numpy(slots).to(self.k.device)
        for tensor in (self.k, self.v) if self.scales is None else (self.k, self.v, self.scales):
            tensor[:, index] = 0


def memory_for(config: KVCacheConfig, *, device: torch.device, set_aside: int = 0) -> int:
    """Bytes for keys and values, once the trunk is loaded. set_aside: what a shard on this device takes, sooner or later."""
    if config.memory_gib != "auto":
        return int(config.memory_gib * 2**30)
    if device.type == "cpu":
        return min(_available_on_host() // 4, 4 * 2**30)  # the experts, and whatever else runs, are there too
    free, total = torch.cuda.mem_get_info(device)
    return left_over(free, total, own=torch.cuda.memory_allocated(device), set_aside=set_aside)


def left_over(free: int, total: int, *, own: int, set_aside: int) -> int:
    """Bytes of a GPU, of which a tenth is left to activations, that neither others hold nor a shard will want.

    The shard may have loaded already or not, so what it takes is not simply missing from `free`.
    """
    return max(0, min(free * 9 // 10, total * 9 // 10 - own - set_aside))


def stored_dtype(config: KVCacheConfig, *, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of keys and values in the cache; dtype: of the trunk. Raises ValueError where it cannot be."""
    if config.dtype == "auto":
        return dtype
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ValueError(
            f"router.kv_cache.dtype={config.dtype} needs a GPU of SM89 or newer; {torch.cuda.get_device_name(device)} "
            f"is SM{capability[0]}{capability[1]}: set it to auto"
        )
    return E4M3


def num_blocks_for(shape: TrunkShape, num_bytes: int, *, block_size: int, dtype: torch.dtype) -> int:
    """How many blocks of keys and values, stored in this dtype, fit into the memory. Raises ValueError if none does."""
    bytes_per_vector = shape.head_dim * dtype.itemsize + (4 if dtype == E4M3 else 0)  # a float32 scale
    bytes_per_token = 2 * shape.num_layers * shape.num_kv_heads * bytes_per_vector
    num_blocks = num_bytes // (bytes_per_token * block_size)
    if num_blocks == 0:
        raise ValueError(
            f"router.kv_cache: {num_bytes / 2**30:.2g} GiB hold no block of "
            f"{block_size} tokens of {bytes_per_token} bytes each; set router.kv_cache.memory_gib"
        )
    return num_blocks


def _available_on_host() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
