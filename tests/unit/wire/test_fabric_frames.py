"""The wire format: what is packed can be unpacked, and nothing else can."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.fabric.tcp.frames import (
    HEADER_BYTES,
    MAGIC,
    MAX_PAYLOAD_BYTES,
    MAX_TOP_K,
    SHAPE_HALF_BYTES,
    VERSION,
    BadFrame,
    FrameShape,
    Kind,
    LayerFrame,
    ShapeHalf,
    error_frame,
    layer_of,
    max_rows,
    write_step_half,
)

u32 = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
shapes = st.builds(FrameShape, u32, u32, u32, dtypes | st.none())
small_shapes = st.builds(
    FrameShape, st.integers(0, 64), st.integers(0, 32).map(lambda half: 2 * half), st.integers(0, 64), dtypes
)
layer_halves = small_shapes.map(lambda shape: ShapeHalf(Kind.LAYER, shape.layer_bytes, shape))
partial_halves = small_shapes.map(lambda shape: ShapeHalf(Kind.PARTIAL, shape.partial_bytes, shape))


def unpack_or_none(packed: bytes) -> ShapeHalf | None:
    try:
        return ShapeHalf.unpack(memoryview(packed))
    except BadFrame:
        return None


@given(layer_halves | partial_halves)
def test_a_shape_half_survives_the_wire(shape_half: ShapeHalf) -> None:
    assert ShapeHalf.unpack(memoryview(shape_half.pack())) == shape_half


@given(st.binary(min_size=SHAPE_HALF_BYTES, max_size=HEADER_BYTES))
def test_random_bytes_are_no_frame(packed: bytes) -> None:
    assert unpack_or_none(packed) is None


@given(st.integers(0, 9), st.integers(0, 9), st.binary(min_size=12, max_size=12), st.integers(0, 99))
def test_after_the_magic_random_bytes_are_refused_or_are_what_they_say(
    kind: int, code: int, sizes: bytes, payload_bytes: int
) -> None:
    packed = MAGIC + struct.pack("<HBB12sIQ", VERSION, kind, code, sizes, 0, payload_bytes)
    read = unpack_or_none(packed)
    assert read is None or read.pack() == packed


@pytest.mark.parametrize(
    "shape_half",
    [
        ShapeHalf(Kind.LAYER, 0),
        ShapeHalf(Kind.LAYER, 8, FrameShape(rows=1, hidden=0, top_k=1, dtype=None)),
        ShapeHalf(Kind.PARTIAL, 0),
        ShapeHalf(Kind.LAYER, 14, FrameShape(rows=1, hidden=3, top_k=1, dtype=torch.bfloat16)),
        ShapeHalf(Kind.LAYER, 528, FrameShape(rows=1, hidden=2, top_k=65, dtype=torch.float32)),
    ],
    ids=["no dtype", "no dtype, but ids", "no dtype in an answer", "ids off their place", "top-k"],
)
def test_a_shape_that_no_peer_lays_out_is_refused(shape_half: ShapeHalf) -> None:
    with pytest.raises(BadFrame, match="does not fit"):
        ShapeHalf.unpack(memoryview(shape_half.pack()))


@given(st.integers(1, 8192).map(lambda half: 2 * half), dtypes)
def test_max_rows_is_what_fits(hidden: int, dtype: torch.dtype) -> None:
    most = max_rows(hidden, dtype)
    assert FrameShape(most, hidden, MAX_TOP_K, dtype).is_sendable
    assert not FrameShape(most + 1, hidden, MAX_TOP_K, dtype).is_sendable


@given(layer_halves | partial_halves, st.integers(0, SHAPE_HALF_BYTES - 1), st.integers(1, 255))
def test_a_shape_half_with_a_flipped_byte_is_refused_or_is_what_it_says(
    shape_half: ShapeHalf, place: int, flip: int
) -> None:
    packed = bytearray(shape_half.pack())
    packed[place] ^= flip
    read = unpack_or_none(bytes(packed))
    assert read is None or read.pack() == packed


@given(st.sampled_from(Kind), shapes, st.integers(0, 2**64 - 1))
def test_no_shape_half_claims_more_than_the_limit(kind: Kind, shape: FrameShape, claimed: int) -> None:
    for payload_bytes in (claimed, shape.layer_bytes, shape.partial_bytes):
        read = unpack_or_none(ShapeHalf(kind, payload_bytes % 2**64, shape).pack())
        assert read is None or read.payload_bytes <= MAX_PAYLOAD_BYTES


def test_a_layer_is_one_buffer_of_x_then_ids_then_weights() -> None:
    frame = LayerFrame(pinned=False)
    frame.lay_out(FrameShape(rows=2, hidden=4, top_k=1, dtype=torch.float32))
    frame.shape_half[:] = frame.laid_out_shape_half
    write_step_half(frame, epoch=5, step=6, layer=7)
    frame.x_TD.copy_(torch.arange(8.0).view(2, 4))
    frame.phys_TK.copy_(torch.tensor([[-1], [3]]))
    frame.w_TK.fill_(0.5)
    assert bytes(frame.frame).hex(" ", -4) == (
        "534d4f45 01000401 02000000 04000000 01000000 00000000 30000000 00000000 "
        "05000000 00000000 06000000 00000000 07000000 00000000 00000000 00000000 "
        "00000000 0000803f 00000040 00004040 00008040 0000a040 0000c040 0000e040 "
        "ffffffff 03000000 0000003f 0000003f"
    )
    assert layer_of(frame) == 7


def test_a_long_sentence_is_cut() -> None:
    frame = error_frame("it broke " * 1000)
    assert ShapeHalf.unpack(frame) == ShapeHalf(Kind.ERROR, payload_bytes=4096)


@pytest.mark.parametrize("rows", [1, 3])
def test_ids_are_aligned_or_the_shape_is_refused(rows: int) -> None:
    with pytest.raises(AssertionError, match="hidden must be even"):
        LayerFrame(pinned=False).lay_out(FrameShape(rows, hidden=5, top_k=1, dtype=torch.bfloat16))
