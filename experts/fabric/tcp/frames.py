"""The wire format of fabric `tcp`, and the host buffers that hold one frame each. No sockets here.

A frame is a header of 64 bytes and a payload, little-endian throughout. The header has two halves: the *shape half*, the
same for all frames of a kind and size, and the *step half*, which a PARTIAL repeats from the LAYER that it answers.

    offset  size  shape half
         0     4  magic, b"SMOE"
         4     2  version, 1
         6     1  kind, see below
         7     1  dtype of x and of partial sums: 1 float32, 2 bfloat16; 0 where a frame has no rows
         8     4  rows T
        12     4  hidden D
        16     4  top_k K, at most 64
        20     4  zero
        24     8  payload bytes
    offset  size  step half
        32     8  epoch
        40     8  step
        48     4  layer
        52    12  zero: the payload starts on a cache line

    kind          from    payload
    1  CHALLENGE  shard   nonce, 32 bytes
    2  ANSWER     router  nonce, 32 bytes | proof, 32 bytes      (see handshake.py)
    3  WELCOME    shard   proof, 32 bytes
    4  LAYER      router  x [T, D] dtype | physical ids [T, K] int32 | weights [T, K] float32
    5  PARTIAL    shard   partial sums [T, D] dtype
    6  ERROR      shard   a sentence in UTF-8, at most 4096 bytes; the shard then closes the link

After the handshake a router sends LAYER frames only, and none before it has the PARTIAL of the one before: at most one
frame per link is on its way. T tokens, D hidden, K top-k.
"""

import struct
from enum import IntEnum
from typing import NamedTuple, Self

import torch
from torch import Tensor

from experts.fabric import FabricError

MAGIC = b"SMOE"
VERSION = 1
HEADER_BYTES = 64
SHAPE_HALF_BYTES = 32
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_SENTENCE_BYTES = 4096
MAX_TOP_K = 64
MAX_PAYLOAD_BYTES = 256 << 20
"""The largest payload, see max_rows. Only a peer that has proved itself may send as much."""

_SHAPE_HALF = struct.Struct("<4sHBBIIIIQ")
_STEP_HALF = struct.Struct("<QQI12x")
_DTYPE_OF_CODE = {0: None, 1: torch.float32, 2: torch.bfloat16}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
_PAIR_BYTES = 8  # a physical id and its weight


class Kind(IntEnum):
    """The kinds of frames, by their number on the wire."""

    CHALLENGE = 1
    ANSWER = 2
    WELCOME = 3
    LAYER = 4
    PARTIAL = 5
    ERROR = 6


class BadFrame(FabricError):
    """The peer sent bytes that no peer of this version sends. The link that brought them is closed."""


class FrameShape(NamedTuple):
    """The sizes of a layer, which decide the size of its LAYER and PARTIAL frames; all zero in the other kinds."""

    rows: int
    hidden: int
    top_k: int
    dtype: torch.dtype | None

    @property
    def partial_bytes(self) -> int:
        """The bytes of a PARTIAL frame's payload."""
        return self.rows * self.hidden * (self.dtype.itemsize if self.dtype else 0)

    @property
    def layer_bytes(self) -> int:
        """The bytes of a LAYER frame's payload."""
        return self.partial_bytes + self.rows * self.top_k * _PAIR_BYTES

    @property
    def is_sendable(self) -> bool:
        """Return whether frames can carry this shape.

        The ids, which follow the rows, must be aligned, and the payload must not exceed the limit.
        """
        return (
            self.dtype is not None
            and self.partial_bytes % 4 == 0
            and self.top_k <= MAX_TOP_K
            and self.layer_bytes <= MAX_PAYLOAD_BYTES
        )


NO_ROWS = FrameShape(rows=0, hidden=0, top_k=0, dtype=None)


def max_rows(hidden: int, dtype: torch.dtype) -> int:
    """Return how many rows fit a frame, whatever the top-k."""
    return MAX_PAYLOAD_BYTES // (hidden * dtype.itemsize + MAX_TOP_K * _PAIR_BYTES)


class ShapeHalf(NamedTuple):
    """The first half of a frame's header: its kind and sizes."""

    kind: Kind
    payload_bytes: int
    shape: FrameShape = NO_ROWS

    def pack(self) -> bytes:
        """Return the 32 bytes on the wire."""
        rows, hidden, top_k, dtype = self.shape
        code = _CODE_OF_DTYPE[dtype]
        return _SHAPE_HALF.pack(MAGIC, VERSION, self.kind, code, rows, hidden, top_k, 0, self.payload_bytes)

    @classmethod
    def unpack(cls, buffer: memoryview) -> Self:
        """Read the first half of a header. Raises BadFrame for one that no peer packs.

        The payload of what is returned therefore has the one size that fits, below the limit.
        """
        magic, version, kind, code, rows, hidden, top_k, zero, payload_bytes = _SHAPE_HALF.unpack_from(buffer)
        if magic != MAGIC or version != VERSION or zero != 0:
            raise BadFrame(f"not a frame of version {VERSION}: {bytes(buffer[:SHAPE_HALF_BYTES])!r}")
        if kind not in _KINDS or code not in _DTYPE_OF_CODE:
            raise BadFrame(f"no frame has kind {kind} and dtype code {code}")
        shape_half = cls(Kind(kind), payload_bytes, FrameShape(rows, hidden, top_k, _DTYPE_OF_CODE[code]))
        if not shape_half._fits():
            raise BadFrame(f"the payload does not fit: {shape_half}")
        return shape_half

    def _fits(self) -> bool:
        if self.kind is Kind.LAYER:
            return self.shape.is_sendable and self.payload_bytes == self.shape.layer_bytes
        if self.kind is Kind.PARTIAL:
            return self.shape.is_sendable and self.payload_bytes == self.shape.partial_bytes
        if self.kind is Kind.ERROR:
            return self.payload_bytes <= MAX_SENTENCE_BYTES
        return self.payload_bytes == _HANDSHAKE_BYTES[self.kind]


_KINDS = frozenset(Kind)
_HANDSHAKE_BYTES = {
    Kind.CHALLENGE: NONCE_BYTES,
    Kind.ANSWER: NONCE_BYTES + PROOF_BYTES,
    Kind.WELCOME: PROOF_BYTES,
}


def small_frame(kind: Kind, payload: bytes) -> memoryview:
    """Return a whole frame of a kind that has no rows; its step half is zero."""
    return memoryview(ShapeHalf(kind, len(payload)).pack() + bytes(HEADER_BYTES - SHAPE_HALF_BYTES) + payload)


def error_frame(sentence: str) -> memoryview:
    """Return an ERROR frame; a sentence longer than MAX_SENTENCE_BYTES is cut."""
    return small_frame(Kind.ERROR, sentence.encode()[:MAX_SENTENCE_BYTES])


class FrameBuffer:
    """Host memory for one frame at a time. It grows to the largest frame that it has held and never shrinks.

    view: the whole memory. Growing moves the memory; older views keep the old one.
    shape_half, step_half: views of the header's halves.
    frame, shape, laid_out_shape_half: the bytes, the shape and the packed shape half of the LAYER or PARTIAL frame that
        the buffer is laid out for. What a header in the buffer says (shape_half) may differ until it is written there.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._allocate(HEADER_BYTES + MAX_SENTENCE_BYTES)
        self.frame = self.view[:0]
        self.shape = NO_ROWS
        self.laid_out_shape_half = b""

    def _allocate(self, num_bytes: int) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be written outside that mode
            self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        self.view = self._bytes.numpy().data
        self.shape_half = self.view[:SHAPE_HALF_BYTES]
        self.step_half = self.view[SHAPE_HALF_BYTES:HEADER_BYTES]

    def reserve(self, payload_bytes: int, *, keep: int) -> None:
        """Make room for a frame with this payload; the first `keep` bytes survive."""
        needed = HEADER_BYTES + payload_bytes
        if needed <= len(self.view):
            return
        kept = bytes(self.view[:keep])
        self._allocate(max(needed, 2 * len(self.view)))
        self.view[:keep] = kept

    def _lay_out(self, shape_half: ShapeHalf) -> None:
        self.reserve(shape_half.payload_bytes, keep=0)
        self.frame = self.view[: HEADER_BYTES + shape_half.payload_bytes]
        self.shape = shape_half.shape
        self.laid_out_shape_half = shape_half.pack()

    def _tensor(self, offset: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return a [rows, columns] view of the payload, `offset` bytes into it."""
        start = HEADER_BYTES + offset
        return self._bytes[start : start + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


class LayerFrame(FrameBuffer):
    """A buffer for LAYER frames: x_TD, phys_TK and w_TK are views of the payload, until it is laid out for another shape."""

    def lay_out(self, shape: FrameShape) -> None:
        """Make x_TD, phys_TK and w_TK views of this shape.

        A frame that was received into the buffer stays as it is.
        """
        rows, hidden, top_k, dtype = shape
        assert dtype is not None
        assert shape.is_sendable, f"no frame holds {shape}: see max_rows; hidden must be even"
        self._lay_out(ShapeHalf(Kind.LAYER, shape.layer_bytes, shape))
        self.x_TD = self._tensor(0, rows, hidden, dtype)
        self.phys_TK = self._tensor(shape.partial_bytes, rows, top_k, torch.int32)
        self.w_TK = self._tensor(shape.partial_bytes + 4 * rows * top_k, rows, top_k, torch.float32)


class PartialFrame(FrameBuffer):
    """A buffer for PARTIAL frames: partial_TD is a view of the payload, until it is laid out for another shape."""

    def lay_out(self, shape: FrameShape) -> None:
        """Make partial_TD a view of this shape."""
        assert shape.dtype is not None
        self._lay_out(ShapeHalf(Kind.PARTIAL, shape.partial_bytes, shape))
        self.partial_TD = self._tensor(0, shape.rows, shape.hidden, shape.dtype)


def write_step_half(buffer: FrameBuffer, *, epoch: int, step: int, layer: int) -> None:
    """Write the step half of the header in this buffer."""
    _STEP_HALF.pack_into(buffer.step_half, 0, epoch, step, layer)


def layer_of(buffer: FrameBuffer) -> int:
    """Return the layer that the header in this buffer names."""
    return _STEP_HALF.unpack_from(buffer.step_half)[2]
