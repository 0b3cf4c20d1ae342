"""Reading pieces of files ahead: which reads are made of extents, that every byte comes, in what memory, and what is refused."""

import contextlib
import errno
import os
import random
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.checkpoint import byte_reader
from experts.checkpoint.byte_reader import (
    ALIGN,
    CHUNK_BYTES,
    HELD_GROUPS,
    ByteReader,
    Extent,
    Group,
    group_of,
)

SIZE = 5 * CHUNK_BYTES // 4 + 123
"""Of a file, which ends within a block."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("files"), random.Random(0)
    paths = [folder / str(n) for n in range(2)]
    for path in paths:
        path.write_bytes(rng.randbytes(SIZE))
    return paths


def extents(files: Sequence[Path]) -> st.SearchStrategy[Extent]:
    """Small ones and large ones, some of which touch, overlap or end with the file."""
    offsets = st.integers(0, SIZE) | st.integers(0, 40).map(lambda n: n * ALIGN // 2)
    sizes = st.integers(0, 2 * ALIGN) | st.integers(0, SIZE)
    return st.builds(
        lambda file, offset, size: Extent(file, offset, min(size, SIZE - offset)),
        st.sampled_from(list(files)),
        offsets,
        sizes,
    )


def contents(groups: Sequence[Group], wanted: Sequence[Sequence[Extent]], **options: Any) -> Iterator[None]:
    """Check every extent of every group, group by group, while HELD_GROUPS of them are held."""
    with ByteReader(groups, **options) as reader:
        held = []
        for group, of_group, memory in zip(groups, wanted, reader, strict=True):
            held.append((group, of_group, memory))
            if len(held) > HELD_GROUPS:
                _check(*held.pop(0))
                reader.release()
            yield
        for one in held:
            _check(*one)


def _check(group: Group, wanted: Sequence[Extent], memory: Any) -> None:
    assert memory.numel() == group.size
    for extent, at in zip(wanted, group.at, strict=True):
        with extent.file.open("rb") as file:
            file.seek(extent.offset)
            assert bytes(memory[at : at + extent.size].numpy()) == file.read(extent.size)


@given(st.data())
def test_every_byte_comes_in_its_order(files: list[Path], data: st.DataObject) -> None:
    wanted = data.draw(st.lists(st.lists(extents(files), max_size=6), max_size=6))
    ahead = data.draw(st.sampled_from([1, 64 * ALIGN, 2**24]))
    list(contents([group_of(one) for one in wanted], wanted, ahead_bytes=ahead))


@given(st.data())
def test_reads_are_blocks_none_of_which_is_read_twice(data: st.DataObject) -> None:
    paths = [Path("a"), Path("b")]
    wanted = data.draw(st.lists(extents(paths), max_size=8))
    group = group_of(wanted)
    end = 0
    blocks: set[tuple[Path, int]] = set()
    for chunk in group.chunks:
        assert chunk.at == end, "no gaps in the memory"
        assert chunk.offset % ALIGN == chunk.size % ALIGN == 0
        assert 0 < chunk.needed <= chunk.size <= CHUNK_BYTES
        end += chunk.size
        of_chunk = {
            (chunk.file, block)
            for block in range(chunk.offset // ALIGN, (chunk.offset + chunk.size) // ALIGN)
        }
        assert not blocks & of_chunk
        blocks |= of_chunk
    touched = {
        (one.file, block)
        for one in wanted
        if one.size
        for block in range(one.offset // ALIGN, -(-(one.offset + one.size) // ALIGN))
    }
    assert touched <= blocks
    assert len(blocks - touched) <= len(wanted), "an extent without bytes may touch a block"


def test_the_memory_does_not_grow_with_the_number_of_groups(files: list[Path]) -> None:
    one = [Extent(files[0], 5, 3 * ALIGN)]
    groups = [group_of(one)] * 500
    with ByteReader(groups, ahead_bytes=10 * ALIGN) as reader:
        assert reader.num_bytes == (HELD_GROUPS + 2) * groups[0].size
        begins = set()
        for memory in reader:
            begins.add(memory.data_ptr())
            assert memory.data_ptr() % ALIGN == 0
            reader.release()
    assert len(begins) == HELD_GROUPS + 2


def _refuse_direct(monkeypatch: pytest.MonkeyPatch, *, at_open: bool) -> list[tuple[int, int, int]]:
    """Play a file system without O_DIRECT, which says so when a file is opened, or when it is read.

    Returns the pages that were dropped, as they come.
    """
    direct: set[int] = set()
    dropped: list[tuple[int, int, int]] = []
    opens, reads, advises = os.open, os.preadv, os.posix_fadvise

    def open_(path: Path, flags: int, *rest: int) -> int:
        if flags & os.O_DIRECT and at_open:
            raise OSError(errno.EINVAL, "Invalid argument")
        descriptor = opens(path, flags & ~os.O_DIRECT, *rest)
        (direct.add if flags & os.O_DIRECT else direct.discard)(descriptor)
        return descriptor

    def preadv(descriptor: int, into: list[memoryview], offset: int) -> int:
        if descriptor in direct:
            raise OSError(errno.EINVAL, "Invalid argument")
        return reads(descriptor, into, offset)

    def posix_fadvise(descriptor: int, offset: int, size: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            dropped.append((descriptor, offset, size))
        advises(descriptor, offset, size, advice)

    for name, function in (("open", open_), ("preadv", preadv), ("posix_fadvise", posix_fadvise)):
        monkeypatch.setattr(byte_reader.os, name, function)
    return dropped


@pytest.mark.parametrize("at_open", [True, False])
def test_without_o_direct_the_pages_are_dropped_behind(
    files: list[Path], monkeypatch: pytest.MonkeyPatch, at_open: bool
) -> None:
    dropped = _refuse_direct(monkeypatch, at_open=at_open)
    wanted = [[Extent(file, 17, SIZE - 17)] for file in files]
    list(contents([group_of(one) for one in wanted], wanted))
    of_file: dict[int, int] = {}
    for descriptor, _, size in dropped:
        of_file[descriptor] = of_file.get(descriptor, 0) + size
    assert list(of_file.values()) == [SIZE, SIZE], "every byte that was read"


def test_a_file_that_ends_too_early_is_refused_by_name(files: list[Path], tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_bytes(files[0].read_bytes()[:5000])
    groups = [group_of([Extent(files[0], 0, 10)]), group_of([Extent(short, 4090, 1000)])]
    with ByteReader(groups) as reader:
        memories = iter(reader)
        next(memories)
        says = r"short: broken or cut short \(ends at byte 5000, but 90 more are needed\); download"
        with pytest.raises(ValueError, match=says):
            next(memories)


def test_a_file_that_cannot_be_read_is_refused_by_name(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(byte_reader.os, "preadv", preadv)
    with (
        ByteReader([group_of([Extent(files[0], 0, 10)])]) as reader,
        pytest.raises(ValueError, match=r"0: cannot be read \(Input/output error\)"),
    ):
        next(iter(reader))


def test_a_disk_that_hangs_is_given_up(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    lives = threading.Event()
    monkeypatch.setattr(byte_reader, "READ_S", 0.1)
    monkeypatch.setattr(byte_reader.os, "preadv", lambda *_: lives.wait())
    try:
        with (
            ByteReader([group_of([Extent(files[0], 8192, 10)])]) as reader,
            pytest.raises(ValueError, match=r"0: 4096 bytes at 8192 were not read within .*; is the disk"),
        ):
            next(iter(reader))
    finally:
        lives.set()
    _join_readers()


def test_an_error_does_not_wait_for_a_read_that_hangs(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, lives = threading.Event(), threading.Event()

    def preadv(_: int, into: list[memoryview], offset: int) -> int:
        if offset:
            hangs.set()
            lives.wait()
            return 0
        hangs.wait()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(byte_reader.os, "preadv", preadv)
    group = group_of([Extent(files[0], 0, 10), Extent(files[0], 40960, 10)])
    try:
        with ByteReader([group]) as reader, pytest.raises(ValueError, match=r"cannot be read \(Input/output"):
            next(iter(reader))
        assert _readers(), "one still hangs"
    finally:
        lives.set()
    _join_readers()


def test_who_stops_early_leaves_no_thread_and_no_file(files: list[Path]) -> None:
    _join_readers()
    with ByteReader([group_of([Extent(files[0], n * ALIGN, ALIGN)]) for n in range(1000)]) as reader:
        next(iter(reader))
        assert _readers()
    _join_readers()
    assert not [file for file in _open_files() if file.startswith(str(files[0].parent))]


def _readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def _join_readers() -> None:
    """Wait for the threads of readers that were closed: there is nothing more for them to do."""
    for thread in _readers():
        thread.join(10)
    assert not _readers()


def _open_files() -> Iterator[str]:
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # that of this very listing
            yield os.readlink(f"/proc/self/fd/{name}")
