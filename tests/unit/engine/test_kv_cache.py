"""BlockTables: blocks are conserved whatever is asked; and how many of them a memory holds."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from router.cache import kv_cache
from router.cache.block_tables import BlockPool, BlockTables, extend_keys
from router.cache.kv_cache import (
    KVCache,
    left_over,
    mem_available,
    memory_for,
    num_blocks_for,
    of_unified_memory,
)
from router.config import KVCacheConfig
from tests.support.paged import shape_of

CPU = torch.device("cpu")
SHAPE = shape_of(4, 2, 8, max_model_len=128)


class Tables(RuleBasedStateMachine):
    """A state machine in which rows come, grow and go in any order. Their tokens are few, so that prefixes are found again.

    tokens: of each row, of which the first `proven` are final. content: of each slot, the tokens up to and with its own.
    """

    NUM_BLOCKS, BLOCK_SIZE, MAX_REQUESTS, MAX_TOKENS = 12, 4, 3, 40

    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(
            num_blocks=self.NUM_BLOCKS,
            block_size=self.BLOCK_SIZE,
            max_requests=self.MAX_REQUESTS,
            max_tokens=self.MAX_TOKENS,
        )
        self.tokens: dict[int, list[int]] = {}
        self.proven: dict[int, int] = {}
        self.content: dict[int, tuple[int, ...]] = {}
        self.may_be_nan: set[int] = set()

    def keys(self, tokens: list[int]) -> list[bytes]:
        extend_keys(keys := [], tokens, self.BLOCK_SIZE)
        return keys

    def a_row(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.tokens)))

    @rule(prefix=st.lists(st.integers(0, 1), max_size=MAX_TOKENS))
    def take_row(self, prefix: list[int]) -> None:
        """Take a row, which begins with what is found of its prefix."""
        row = self.tables.take_row()
        assert (row is None) == (len(self.tokens) == self.MAX_REQUESTS)
        if row is None:
            return
        assert row not in self.tokens
        keys = self.keys(prefix)
        found = keys[: self.tables.num_found(keys)]
        self.tables.share(row, found)
        self.tokens[row] = prefix[: len(found) * self.BLOCK_SIZE]
        self.proven[row] = len(self.tokens[row])

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), more=st.lists(st.integers(0, 1), max_size=20), prove=st.booleans())
    def grow(self, data: st.DataObject, more: list[int], prove: bool) -> None:
        """Grow a row as a step does: blocks, then keys and values in their slots, which are proven unless the step
        fails."""
        row = self.a_row(data)
        tokens = (self.tokens[row][: self.proven[row]] + more)[: self.MAX_TOKENS]
        free, held = self.tables.num_free_blocks, self.num_blocks(len(self.tokens[row]))
        missing = max(0, self.num_blocks(len(tokens)) - held)
        if not self.tables.reserve(row, len(tokens)):
            assert missing > free == self.tables.num_free_blocks
            return
        assert self.tables.num_free_blocks == free - missing
        self.may_be_nan -= set(self.tables.slots_to_erase().tolist())
        slots = self.tables.slots(row, 0, self.num_blocks(len(tokens)) * self.BLOCK_SIZE).tolist()
        assert not self.may_be_nan & set(slots), "a slot that may hold NaN was given out"
        for position in range(self.proven[row], len(tokens)):
            self.content[slots[position]] = tuple(tokens[: position + 1])
        if len(tokens) > len(self.tokens[row]):
            self.tokens[row] = tokens
        if prove and len(tokens) == len(self.tokens[row]):
            self.tokens[row], self.proven[row] = tokens, len(tokens)
            self.tables.prove(row, len(tokens), self.keys(tokens), tokens)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        row = self.a_row(data)
        end = len(self.tokens[row])
        self.may_be_nan |= set(self.tables.slots(row, self.proven[row], end).tolist())
        self.tables.release(row)
        del self.tokens[row], self.proven[row]

    def num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.BLOCK_SIZE)

    @invariant()
    def blocks_are_conserved(self) -> None:
        self.tables.check_integrity()
        used = {
            slot // self.BLOCK_SIZE
            for row, tokens in self.tokens.items()
            for slot in self.tables.slots(row, 0, len(tokens)).tolist()
        }
        assert self.tables.num_free_blocks == self.NUM_BLOCKS - len(used)

    @invariant()
    def every_row_finds_its_own_tokens(self) -> None:
        for row, tokens in self.tokens.items():
            slots = self.tables.slots(row, 0, self.proven[row]).tolist()
            assert [self.content[slot] for slot in slots] == [
                tuple(tokens[: n + 1]) for n in range(self.proven[row])
            ]


Tables.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
TestTables = Tables.TestCase


def test_what_nobody_can_find_is_taken_first_and_then_what_was_released_first() -> None:
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(4)]
    for block in blocks[:3]:
        pool.publish(block, b"%d" % block)
    for block in (blocks[1], blocks[3], blocks[0], blocks[2]):
        pool.release(block, doubtful=False)
    assert [pool.take() for _ in range(4)] == [blocks[3], blocks[1], blocks[0], blocks[2]]
    assert [pool.find(b"%d" % block) for block in blocks] == [None] * 4


def test_a_key_names_everything_up_to_the_blocks_end() -> None:
    keys: list[bytes] = []
    extend_keys(keys, [1, 2, 3, 4, 5], 2)
    at_once = list(keys)
    extend_keys(keys, [1, 2, 3, 4, 5, 6], 2)
    assert (len(at_once), len(set(keys)), keys[:2]) == (2, 3, at_once)
    extend_keys(other := [], [0, 2, 3, 4], 2)
    assert not set(other) & set(keys)


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
    num_bytes = int(3.5 * 16 * bytes_per_token)
    assert num_blocks_for(SHAPE, num_bytes, block_size=16, dtype=torch.float32) == 3
    assert num_blocks_for(SHAPE, num_bytes, block_size=16, dtype=torch.bfloat16) == 7
    cache = KVCache(SHAPE, num_slots=3 * 16, dtype=torch.float32, device=CPU)
    assert cache.k.nbytes + cache.v.nbytes == 3 * 16 * bytes_per_token


def test_refuses_memory_for_no_block() -> None:
    with pytest.raises(ValueError, match=r"GiB hold no block of 16 tokens.*router.kv_cache.memory_gib"):
        num_blocks_for(SHAPE, 1000, block_size=16, dtype=torch.float32)


def test_memory_is_what_the_file_says_or_what_is_left() -> None:
    assert memory_for(KVCacheConfig(memory_gib=0.5), device=CPU) == 2**29
    assert 0 < memory_for(KVCacheConfig(), device=CPU) <= 4 * 2**30


SPARK = """\
MemTotal:       127601452 kB
MemFree:         31457280 kB
MemAvailable:   104857600 kB
Buffers:           204800 kB
Cached:          73400320 kB
"""
"""A DGX Spark whose trunk of 14 GiB is loaded, and whose page cache has 70 GiB of something."""


def test_the_page_cache_is_not_used_memory() -> None:
    assert mem_available(SPARK) == 100 * 2**30


@pytest.mark.parametrize(
    ("available_gib", "left_gib"),
    [
        pytest.param(100, 102.3 - 14 - 33, id="the shard is still to come"),
        pytest.param(67, 53.1, id="the shard has loaded"),
        pytest.param(40, 28.8, id="others hold 27 GiB"),
        pytest.param(6, 0, id="nothing but the host's share"),
        pytest.param(123, 102.3 - 14 - 33, id="more than CUDA's total"),
    ],
)
def test_unified_memory_is_what_the_host_can_spare(available_gib: int, left_gib: float) -> None:
    """Of 121.7 GiB the host keeps 8, activations get a tenth of the rest; the trunk has 14, the shard takes 33."""
    gib = 2**30
    free, total = of_unified_memory(127_601_452 * 1024, available=available_gib * gib)
    left = left_over(free, total, own=14 * gib, set_aside=33 * gib)
    assert left / gib == pytest.approx(left_gib, abs=0.1)


def test_a_gpu_with_unified_memory_is_asked_of_the_host(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """CUDA's own 30 GiB of free memory are what the page cache left."""
    (tmp_path / "meminfo").write_text(SPARK)
    monkeypatch.setattr(kv_cache, "MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (30 * 2**30, 127_601_452 * 1024))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 14 * 2**30)
    for is_integrated, left_gib in ((True, 82.8), (False, 27.0)):
        properties = SimpleNamespace(is_integrated=is_integrated)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        left = memory_for(KVCacheConfig(), device=torch.device("cuda"))
        assert left / 2**30 == pytest.approx(left_gib, abs=0.1)


@pytest.mark.parametrize("shard_has_loaded", [False, True])
def test_a_shard_on_the_same_gpu_finds_room_whenever_it_comes(shard_has_loaded: bool) -> None:
    """128 GiB, of which the trunk has 10 and the shard will have 60: 45 are left, and a tenth for
    activations."""
    gib = 2**30
    free = (128 - 10 - 60 * shard_has_loaded) * gib
    left = left_over(free, 128 * gib, own=10 * gib, set_aside=60 * gib)
    assert left == 128 * gib * 9 // 10 - 70 * gib
    assert left_over(free, 128 * gib, own=10 * gib, set_aside=120 * gib) == 0
