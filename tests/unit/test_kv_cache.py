"""BlockTables: blocks are conserved whatever is asked; and how many of them a memory holds."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.config import KVCacheConfig
from router.kv_cache import BlockTables, KVCache, num_blocks_for
from router.model_config import TrunkShape

SHAPE = TrunkShape(num_layers=2, num_kv_heads=2, head_dim=8, hidden=32, vocab_size=64, max_model_len=128)


class Tables(RuleBasedStateMachine):
    """Rows come, grow and go in any order. held: tokens that each row may use."""

    NUM_BLOCKS, BLOCK_SIZE, MAX_REQUESTS, MAX_TOKENS = 12, 4, 3, 40

    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(
            num_blocks=self.NUM_BLOCKS,
            block_size=self.BLOCK_SIZE,
            max_requests=self.MAX_REQUESTS,
            max_tokens=self.MAX_TOKENS,
        )
        self.held: dict[int, int] = {}

    def blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.BLOCK_SIZE)

    @rule()
    def take_row(self) -> None:
        row = self.tables.take_row()
        assert (row is None) == (len(self.held) == self.MAX_REQUESTS)
        if row is not None:
            assert row not in self.held
            self.held[row] = 0

    @precondition(lambda self: self.held)
    @rule(data=st.data(), num_tokens=st.integers(0, MAX_TOKENS))
    def reserve(self, data: st.DataObject, num_tokens: int) -> None:
        row = data.draw(st.sampled_from(sorted(self.held)))
        missing = max(0, self.blocks(num_tokens) - self.blocks(self.held[row]))
        free = self.tables.num_free_blocks
        if self.tables.reserve(row, num_tokens):
            assert self.tables.num_free_blocks == free - missing
            self.held[row] = max(self.held[row], num_tokens)
        else:
            assert missing > free == self.tables.num_free_blocks

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.held)))
        self.tables.release(row)
        del self.held[row]

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.tables.check_integrity()
        used = sum(self.blocks(num_tokens) for num_tokens in self.held.values())
        assert self.tables.num_free_blocks == self.NUM_BLOCKS - used

    @invariant()
    def every_token_has_a_slot_of_its_own(self) -> None:
        slots = [
            slot
            for row, num_tokens in self.held.items()
            for slot in self.tables.slots(row, 0, num_tokens).tolist()
        ]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < self.NUM_BLOCKS * self.BLOCK_SIZE for slot in slots)


Tables.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestTables = Tables.TestCase


def test_check_integrity_finds_a_block_that_is_lost() -> None:
    tables = BlockTables(num_blocks=4, block_size=2, max_requests=2, max_tokens=8)
    row = tables.take_row()
    assert row is not None
    tables.reserve(row, 3)
    tables.table_RN[row, 0] = 3 - tables.table_RN[row, 0]
    with pytest.raises(AssertionError, match=f"row {row}"):
        tables.check_integrity()


def test_memory_is_spent_on_whole_blocks() -> None:
    bytes_per_token = 2 * 2 * 2 * 8 * 4  # keys and values, layers, heads, head_dim, float32
    config = KVCacheConfig(block_size=16, memory_gib=3.5 * 16 * bytes_per_token / 2**30)
    assert num_blocks_for(SHAPE, config, dtype=torch.float32) == 3
    assert num_blocks_for(SHAPE, config, dtype=torch.bfloat16) == 7
    cache = KVCache(SHAPE, num_slots=3 * 16, dtype=torch.float32, device=torch.device("cpu"))
    assert cache.k.nbytes + cache.v.nbytes == 3 * 16 * bytes_per_token


def test_refuses_memory_for_no_block() -> None:
    with pytest.raises(ValueError, match=r"router.kv_cache.memory_gib=1e-06 holds no block of 16 tokens"):
        num_blocks_for(SHAPE, KVCacheConfig(block_size=16, memory_gib=1e-6), dtype=torch.float32)
