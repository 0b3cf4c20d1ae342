"""ByteReader reads pieces of files in the order in which they are wanted, by a few threads, into a bounded ring of memory.

The page cache stays as it is. Where the file system takes O_DIRECT the bytes go past it; elsewhere the pages that were read
are dropped again. On a machine whose GPU shares the host's memory a cache that swells takes it from the GPU.
"""

import errno
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple, Self

import torch
from torch import Tensor

NUM_THREADS = 8
"""The number of reads at a time: so many keep an NVMe disk busy, and more only take turns."""

AHEAD_BYTES = 128 * 2**20
"""The memory for what is read ahead: some dozen experts of 3 MB, or four of the largest known, which have 25 MB."""

CHUNK_BYTES = 4 * 2**20
"""The most that one thread reads at a time, so that several share in a large piece."""

HELD_GROUPS = 2
"""The most groups that the reader's user may hold when asking for the next one."""

READ_S = 120.0
"""Seconds that a group may take from its turn on; a disk that needs longer counts as dead."""

ALIGN = 4096
"""The multiple of bytes in which O_DIRECT reads; a page of the most machines, and a block of every disk."""

_NOT_DIRECT = (errno.EINVAL, errno.ENOTSUP, errno.EFAULT)
"""The errors with which file systems and drivers refuse O_DIRECT."""


class Extent(NamedTuple):
    """A piece of a file: `size` bytes from `offset` on."""

    file: Path
    offset: int
    size: int


class Chunk(NamedTuple):
    """The work of one read: `size` bytes from `offset` of `file` go to `at` in the memory of the group.

    offset, size and at are multiples of ALIGN, so the chunk may reach beyond the end of the file. needed: the bytes at its
    beginning that the file must have.
    """

    file: Path
    offset: int
    size: int
    at: int
    needed: int


class Group(NamedTuple):
    """Extents that are read together and handed over as one. at: where each extent begins in the group's `size` bytes."""

    chunks: tuple[Chunk, ...]
    at: tuple[int, ...]
    size: int


def group_of(extents: Sequence[Extent]) -> Group:
    """Return the reads for these extents. Extents whose blocks touch or overlap are read in one go, and once."""
    chunks: list[Chunk] = []
    at: dict[Extent, int] = {}
    size = 0
    for run in _runs(extents):
        file, start = run[0].file, run[0].offset // ALIGN * ALIGN
        end = max(extent.offset + extent.size for extent in run)
        at |= {extent: size + extent.offset - start for extent in run}
        for offset in range(start, end, CHUNK_BYTES):
            needed = min(CHUNK_BYTES, end - offset)
            length = _round_up(needed)
            chunks.append(Chunk(file, offset, length, size, needed))
            size += length
    return Group(tuple(chunks), tuple(at[extent] for extent in extents), max(size, ALIGN))


class ByteReader:
    """A reader of groups of extents. Iterating over it yields the memory of each group, uint8 [size], in order.

    The memory is the reader's: it holds the bytes until release(), which gives back the oldest group that was yielded.
    At most HELD_GROUPS may be held when the next one is asked for. All of it together is one ring of max(ahead_bytes, a few
    of the largest groups) or less, allocated once; nothing else of the files is in memory.

    pinned: the ring is page-locked, so that a GPU copies from it while the host goes on.
    Raises ValueError, naming the file, for one that ends too early, cannot be opened or read, or takes longer than READ_S.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        pinned: bool = False,
        ahead_bytes: int = AHEAD_BYTES,
        num_threads: int = NUM_THREADS,
    ) -> None:
        sizes = [group.size for group in groups] or [ALIGN]
        ring_bytes = min(sum(sizes), max(ahead_bytes, (HELD_GROUPS + 2) * max(sizes)))
        self._coming = deque(groups)
        self._reading: deque[tuple[Group, Tensor, list[Future[None]]]] = deque()
        self._ring = _Ring(ring_bytes, pinned=pinned)
        self._files = _Files()
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")

    @property
    def num_bytes(self) -> int:
        """The bytes of the ring, more than which are never in flight."""
        return self._ring.num_bytes

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Tensor]:
        while self._coming or self._reading:
            self._start_reads()
            assert self._reading, "more than HELD_GROUPS groups are held"
            group, memory, reads = self._reading.popleft()
            self._wait(group, reads)
            yield memory

    def release(self) -> None:
        """Give back the oldest group that was yielded and not yet given back: its memory may be overwritten at once."""
        self._ring.give_back()

    def close(self) -> None:
        """Stop reading, and close the files."""
        self._coming.clear()
        self._reading.clear()
        self._threads.shutdown(
            wait=False, cancel_futures=True
        )  # one may hang; it keeps alive what it writes to
        self._files.close()

    def _start_reads(self) -> None:
        """Begin to read as many groups as the ring has room for."""
        while self._coming and (memory := self._ring.take(self._coming[0].size)) is not None:
            group = self._coming.popleft()
            into = memory.numpy().data
            reads = [
                self._threads.submit(self._files.read, chunk, into[chunk.at : chunk.at + chunk.size])
                for chunk in group.chunks
            ]
            self._reading.append((group, memory, reads))

    def _wait(self, group: Group, reads: list[Future[None]]) -> None:
        wait(reads, timeout=READ_S, return_when="FIRST_EXCEPTION")
        for read in reads:
            if read.done():
                read.result()
        for chunk, read in zip(group.chunks, reads, strict=True):
            if not read.done():
                raise ValueError(
                    f"{chunk.file}: {chunk.size} bytes at {chunk.offset} were not read within {READ_S:.0f} s; "
                    "is the disk, or the network to it, alive?"
                )


class _Ring:
    """Memory that is handed out in pieces and given back in the same order. Pieces begin at multiples of ALIGN."""

    def __init__(self, num_bytes: int, *, pinned: bool) -> None:
        self.num_bytes = _round_up(num_bytes)
        storage = torch.empty(self.num_bytes + ALIGN, dtype=torch.uint8, pin_memory=pinned)
        self._memory = storage[-storage.data_ptr() % ALIGN :][: self.num_bytes]
        self._taken: deque[tuple[int, int]] = deque()

    def take(self, size: int) -> Tensor | None:
        """Return `size` bytes in one piece, None if there is no room. size: a multiple of ALIGN."""
        if not self._taken:
            start = 0 if size <= self.num_bytes else None
        else:
            oldest, newest = self._taken[0][0], sum(self._taken[-1])
            wraps = newest <= oldest
            if size <= (oldest if wraps else self.num_bytes) - newest:
                start = newest
            else:
                start = 0 if not wraps and size <= oldest else None
        if start is None:
            return None
        self._taken.append((start, size))
        return self._memory[start : start + size]

    def give_back(self) -> None:
        """Give back the oldest piece."""
        self._taken.popleft()


class _Files:
    """Files that are open for reading, each with and without O_DIRECT as it is needed. Any thread may read."""

    def __init__(self) -> None:
        self._open: dict[tuple[Path, bool], int] = {}
        self._one_opens = threading.Lock()
        self._not_direct: set[Path] = set()
        self._closed = False

    def read(self, chunk: Chunk, into: memoryview) -> None:
        """Read a chunk. Raises ValueError if the file cannot be read, or ends before what is needed of it."""
        done = 0
        while done < chunk.needed:
            try:
                count = self._read_once(chunk.file, chunk.offset + done, into[done:])
            except OSError as error:
                raise ValueError(f"{chunk.file}: cannot be read ({error.strerror})") from error
            if count == 0:
                raise ValueError(
                    f"{chunk.file}: broken or cut short (ends at byte {chunk.offset + done}, "
                    f"but {chunk.needed - done} more are needed); download the checkpoint again"
                )
            done += count

    def close(self) -> None:
        """Close all files, for good: a read that comes back from a dead disk opens none again."""
        with self._one_opens:
            self._closed = True
            for descriptor in self._open.values():
                os.close(descriptor)
            self._open.clear()

    def _read_once(self, file: Path, offset: int, into: memoryview) -> int:
        """Return how many bytes were read, 0 at the end of the file."""
        if file not in self._not_direct:
            try:
                return os.preadv(self._descriptor(file, direct=True), [into], offset)
            except OSError as error:
                if error.errno not in _NOT_DIRECT:
                    raise
                self._not_direct.add(file)
        descriptor = self._descriptor(file, direct=False)
        count = os.preadv(descriptor, [into], offset)
        os.posix_fadvise(descriptor, offset, count, os.POSIX_FADV_DONTNEED)
        return count

    def _descriptor(self, file: Path, *, direct: bool) -> int:
        with self._one_opens:
            if self._closed:
                raise OSError(errno.EBADF, "the reader was closed")
            if (file, direct) not in self._open:
                descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0))
                if not direct:  # or the kernel would read ahead what nobody drops again
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_RANDOM)
                self._open[file, direct] = descriptor
            return self._open[file, direct]


def _runs(extents: Sequence[Extent]) -> Iterator[list[Extent]]:
    """Yield the extents in the order of files and offsets, those together whose blocks touch or overlap."""
    run: list[Extent] = []
    end = 0
    for extent in sorted(set(extents)):
        if run and (extent.file != run[0].file or extent.offset // ALIGN * ALIGN > end):
            yield run
            run, end = [], 0
        run.append(extent)
        end = max(end, _round_up(extent.offset + extent.size))
    if run:
        yield run


def _round_up(size: int) -> int:
    return -(-size // ALIGN) * ALIGN
