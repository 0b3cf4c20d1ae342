"""BlockTables: which request holds which blocks of the KV cache, and which blocks others may find again (prefix cache).

The prefix cache is the set of published blocks: a block stays findable by its key after its holders have left, until it
is taken for other tokens, least recently released first. No keys or values are stored here; see kv_cache.py.

R rows (one per running request), N blocks of a row.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from itertools import chain

import numpy as np


class BlockTables:
    """The table of blocks of each running request, in the order of its tokens.

    table_RN: int64, the blocks of each row; what stands beyond a row's own blocks means nothing.
    """

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
        """The number of blocks that no row holds. Those of the prefix cache are among them, and are given away last."""
        return self._pool.num_free

    @property
    def num_free_rows(self) -> int:
        """The number of requests that may still start to run."""
        return len(self._free_rows)

    def take_row(self) -> int | None:
        """Return a row for a new request, or None if max_requests run already."""
        return self._free_rows.pop() if self._free_rows else None

    def num_found(self, keys: Sequence[bytes]) -> int:
        """Return how many blocks of this prefix, in order, the prefix cache has."""
        return next((n for n, key in enumerate(keys) if self._pool.find(key) is None), len(keys))

    def share(self, row: int, keys: Sequence[bytes]) -> None:
        """Let a row that holds nothing begin with the blocks of these keys, all of which the prefix cache has."""
        for key in keys:
            block = self._pool.find(key)
            assert block is not None
            self._pool.hold(block)
            self._append(row, block)
        self._num_reserved_R[row] = self._num_proven_R[row] = len(keys) * self.block_size

    def reserve(self, row: int, num_tokens: int, *, spare: int = 0) -> bool:
        """Make the row hold blocks for num_tokens and leave `spare` blocks free.

        Returns False, and changes nothing, if there are too few.
        """
        missing = -(-num_tokens // self.block_size) - len(self._held_R[row])
        if missing > 0 and missing + spare > self._pool.num_free:
            return False
        for _ in range(missing):
            self._append(row, self._pool.take())
        self._num_reserved_R[row] = max(self._num_reserved_R[row], num_tokens)
        return True

    def prove(self, row: int, num_tokens: int, keys: list[bytes], tokens: Sequence[int]) -> None:
        """Publish the row's full blocks: the keys and values of its first num_tokens tokens are final and finite.

        tokens: all of the row's. keys: of its blocks as far as they are known; extended to all full blocks.
        """
        extend_keys(keys, tokens, self.block_size)
        for place in range(self._num_proven_R[row] // self.block_size, num_tokens // self.block_size):
            self._pool.publish(self._held_R[row][place], keys[place])
        self._num_proven_R[row] = num_tokens

    def release(self, row: int) -> None:
        """Give the row and its blocks back. The last tokens' blocks go first: they are of use to the fewest requests."""
        proven, reserved = self._num_proven_R[row], self._num_reserved_R[row]
        first_doubtful = proven // self.block_size if reserved > proven else len(self._held_R[row])
        for place, block in reversed(list(enumerate(self._held_R[row]))):
            self._pool.release(block, doubtful=place >= first_doubtful)
        self._held_R[row] = []
        self._num_reserved_R[row] = self._num_proven_R[row] = 0
        self._free_rows.append(row)

    def slots(self, row: int, start: int, end: int) -> np.ndarray:
        """Return the slots, int64 [end - start], of a row's tokens at these positions."""
        position = np.arange(start, end)
        return self.table_RN[row, position // self.block_size] * self.block_size + position % self.block_size

    def slots_to_erase(self) -> np.ndarray:
        """Return the slots, int64, given out since the last call that may hold NaN. They must be erased before the next step."""
        blocks = np.array(self._pool.drain_to_erase(), np.int64)
        return (blocks[:, None] * self.block_size + np.arange(self.block_size)).ravel()

    def check_integrity(self) -> None:
        """Raise AssertionError unless every block is held by just the rows in whose tables it stands, or is free."""
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


class BlockPool:
    """The blocks 0 to num_blocks - 1 with the number of rows that hold each, and the keys of the published ones."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_holders = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(
            range(num_blocks)
        )  # the next one to take first
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._doubtful: set[int] = set()
        self._to_erase: list[int] = []

    @property
    def num_free(self) -> int:
        """The number of blocks that nobody holds, published or not."""
        return len(self._free)

    def take(self) -> int:
        """Return a free block, now held once, for new tokens. There must be one."""
        block, _ = self._free.popitem(last=False)
        if key := self._key_of.pop(block, None):
            del self._block_of[key]
        if block in self._doubtful:
            self._doubtful.remove(block)
            self._to_erase.append(block)
        self._num_holders[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        """Return the published block of this key, which the caller must hold before anything else is taken."""
        return self._block_of.get(key)

    def hold(self, block: int) -> None:
        """Add a holder to a block that was found."""
        self._num_holders[block] += 1
        self._free.pop(block, None)

    def publish(self, block: int, key: bytes) -> None:
        """Make a block findable: its keys and values are final and finite.

        Of two blocks with the same tokens the second stays unpublished.
        """
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, block: int, *, doubtful: bool) -> None:
        """Remove a holder. doubtful: the block may hold NaN, which even a mask does not hide from its next holder."""
        self._num_holders[block] -= 1
        if self._num_holders[block]:
            return
        self._free[block] = None
        if doubtful:
            self._doubtful.add(block)
        if block not in self._key_of:  # nobody can find it: it goes before those that can be found
            self._free.move_to_end(block, last=False)

    def drain_to_erase(self) -> list[int]:
        """Return the blocks taken since the last call whose old content must be erased before anybody attends to them."""
        blocks, self._to_erase = self._to_erase, []
        return blocks

    def check_integrity(self, num_holders: Sequence[int]) -> None:
        """Raise AssertionError unless each block has so many holders, and free and published ones are what they should be."""
        assert self._num_holders == list(num_holders), "a block was lost or given twice"
        assert set(self._free) == {b for b, holders in enumerate(num_holders) if not holders}, "free blocks"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, "published blocks"
        assert not self._doubtful & self._key_of.keys(), "a published block may hold NaN"


def extend_keys(keys: list[bytes], tokens: Sequence[int], block_size: int) -> None:
    """Append to `keys` those of the full blocks of `tokens` that it does not have yet.

    The key of a block is a 128-bit digest of all tokens from the first to the block's last one: two prefixes with the
    same key do not happen.
    """
    for end in range((len(keys) + 1) * block_size, len(tokens) + 1, block_size):
        digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        digest.update(array("q", tokens[end - block_size : end]).tobytes())
        keys.append(digest.digest())
