"""BlockPool: which blocks of the KV cache are held, which are free, and what of them other requests may find again.

Accounting only. The prefix cache is the published blocks: a block stays findable by its key after its holders have left,
until it is taken for other tokens, least recently released first.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Blocks 0 to num_blocks - 1, each held by any number of rows."""

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
        """Held by nobody, published or not."""
        return len(self._free)

    def take(self) -> int:
        """A free block, held once, for new tokens. Not if none is free."""
        block, _ = self._free.popitem(last=False)
        if key := self._key_of.pop(block, None):
            del self._block_of[key]
        if block in self._doubtful:
            self._doubtful.remove(block)
            self._to_erase.append(block)
        self._num_holders[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        """The published block of this key, to be held at once or not at all."""
        return self._block_of.get(key)

    def hold(self, block: int) -> None:
        """One more holder of a block that was found."""
        self._num_holders[block] += 1
        self._free.pop(block, None)

    def publish(self, block: int, key: bytes) -> None:
        """Its keys and values are final and finite. One of two blocks with the same tokens stays unpublished."""
        if key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def release(self, block: int, *, doubtful: bool) -> None:
        """One holder less. doubtful: it may hold NaN, which even a mask does not hide from its next holder."""
        self._num_holders[block] -= 1
        if self._num_holders[block]:
            return
        self._free[block] = None
        if doubtful:
            self._doubtful.add(block)
        if block not in self._key_of:  # nobody can find it: it goes before those that can be found
            self._free.move_to_end(block, last=False)

    def drain_to_erase(self) -> list[int]:
        """Blocks taken since the last call whose old content must be overwritten before anybody attends to them."""
        blocks, self._to_erase = self._to_erase, []
        return blocks

    def check_integrity(self, num_holders: Sequence[int]) -> None:
        """AssertionError unless each block has so many holders, and free and published ones are what they should be."""
        assert self._num_holders == list(num_holders), "a block was lost or given twice"
        assert set(self._free) == {b for b, holders in enumerate(num_holders) if not holders}, "free blocks"
        assert {key: block for block, key in self._key_of.items()} == self._block_of, "published blocks"
        assert not self._doubtful & self._key_of.keys(), "a published block may hold NaN"


def extend_keys(keys: list[bytes], tokens: Sequence[int], block_size: int) -> None:
    """Add the keys of the full blocks that `tokens` have beyond those that stand in `keys` already.

    A key names all tokens from the first to the block's last one. It is a 128-bit digest: that two prefixes have the
    same one does not happen.
    """
    for end in range((len(keys) + 1) * block_size, len(tokens) + 1, block_size):
        digest = hashlib.blake2b(keys[-1] if keys else b"", digest_size=16)
        digest.update(array("q", tokens[end - block_size : end]).tobytes())
        keys.append(digest.digest())
