"""Regions: sealed memory that two mappings share, and a layout in which nothing overlaps and everything is aligned."""

import os
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.fabric import FabricError
from experts.fabric.mailbox.region import LINE_BYTES, LaneShape, Region

SHAPES = st.builds(
    LaneShape,
    rows=st.integers(1, 300),
    hidden=st.integers(1, 64).map(lambda n: 8 * n),
    top_k=st.integers(1, 10),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)


@given(SHAPES)
def test_nothing_overlaps_and_everything_begins_on_a_line(shape: LaneShape) -> None:
    x_bytes = shape.rows * shape.hidden * shape.dtype.itemsize
    ends = [
        8,
        shape.x_offset + x_bytes,
        *(at + 4 * shape.rows * shape.top_k for at in _ids_and_weights(shape)),
    ]
    begins = [shape.x_offset, *_ids_and_weights(shape), shape.outbox_bytes]
    assert all(begin % LINE_BYTES == 0 for begin in begins)
    assert all(end <= begin < end + LINE_BYTES for end, begin in zip(ends, begins, strict=True))
    assert shape.x_offset + x_bytes <= shape.inbox_bytes < shape.x_offset + x_bytes + LINE_BYTES


def _ids_and_weights(shape: LaneShape) -> tuple[int, int]:
    return shape.ids_offset, shape.weights_offset


def test_two_mappings_share_memory() -> None:
    ours = Region.create(4096)
    theirs = Region.map(os.dup(ours.fd), 4096)
    ours.tensor(128, 2, 3, torch.float32).copy_(torch.arange(6.0).view(2, 3))
    assert theirs.tensor(128, 2, 3, torch.float32).tolist() == [[0, 1, 2], [3, 4, 5]]
    view = theirs.tensor(128, 2, 3, torch.float32)
    for region in (ours, theirs):
        region.close()
        region.close()
    assert view[1, 2] == 5, "memory stays for who still looks at it"


def test_a_region_can_be_neither_cut_nor_grown() -> None:
    region = Region.create(4096)
    for size in (0, 8192):
        with pytest.raises(OSError, match="not permitted"):
            os.ftruncate(region.fd, size)
    region.close()


def test_what_is_not_a_sealed_region_of_this_size_is_refused_and_closed() -> None:
    region = Region.create(4096)
    unsealed = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, 4096)
    with tempfile.TemporaryFile() as file:
        file.truncate(4096)
        for fd in (os.dup(region.fd), unsealed, os.dup(file.fileno())):
            wanted = 8192 if fd not in (unsealed,) else 4096
            with pytest.raises(FabricError, match="region"):
                Region.map(fd, wanted)
            with pytest.raises(OSError, match="descriptor"):
                os.fstat(fd)
    region.close()
