"""The wire format of fabric `tcp`, and the host buffers that hold one frame each. No sockets here.

A frame is a header of 64 bytes and a payload. Integers and floats are little-endian.

    offset  size  header field
         0     4  magic, b"SMOE"
         4     2  version, 1
         6     1  kind, see Kind
         7     1  dtype of x and of partials: 1 float32, 2 bfloat16; 0 where a frame has no rows
         8     4  layer
        12     4  rows T
        16     4  hidden D
        20     4  top_k K
        24     8  epoch
        32     8  step
        40     8  payload bytes
        48    16  zero: the payload starts on a cache line

    kind       from    payload
    CHALLENGE  shard   32 bytes nonce
    ANSWER     router  32 bytes nonce | 32 bytes proof      (see handshake.py)
    WELCOME    shard   32 bytes proof
    LAYER      router  x [T, D] dtype | physical ids [T, K] int32 | weights [T, K] float32
    PARTIAL    shard   partial sums [T, D] dtype; every other field as in the LAYER frame that it answers
    ERROR      shard   a sentence in UTF-8, at most 4096 bytes; the shard then closes the link

After the handshake a router sends LAYER frames only, and none before the PARTIAL of the one before: at most one frame
per link is on its way. T tokens, D hidden, K top-k.
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
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_SENTENCE_BYTES = 4096
MAX_PAYLOAD_BYTES = 256 << 20
"""Of a peer that has proved itself: 4096 rows of 8192 float32 are half of it."""

_HEADER = struct.Struct("<4sHBBIIIIQQQ16s")
_PADDING = bytes(16)
_DTYPE_OF_CODE = {0: None, 1: torch.float32, 2: torch.bfloat16}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
_ITEM_BYTES = {None: 0, torch.float32: 4, torch.bfloat16: 2}
_PAIR_BYTES = 8  # a physical id and its weight


class Kind(IntEnum):
    CHALLENGE = 1
    ANSWER = 2
    WELCOME = 3
    LAYER = 4
    PARTIAL = 5
    ERROR = 6


_KINDS = frozenset(Kind)
_HANDSHAKE_BYTES: dict[int, int] = {
    Kind.CHALLENGE: NONCE_BYTES,
    Kind.ANSWER: NONCE_BYTES + PROOF_BYTES,
    Kind.WELCOME: PROOF_BYTES,
}


class BadFrame(FabricError):
    """Bytes that no peer of this version sends. The link that brought them is closed."""


class FrameShape(NamedTuple):
    """What decides the size of LAYER and PARTIAL frames; all zero in the other kinds."""

    rows: int
    hidden: int
    top_k: int
    dtype: torch.dtype | None

    @property
    def partial_bytes(self) -> int:
        return self.rows * self.hidden * _ITEM_BYTES[self.dtype]

    @property
    def layer_bytes(self) -> int:
        return self.partial_bytes + self.rows * self.top_k * _PAIR_BYTES


NO_ROWS = FrameShape(rows=0, hidden=0, top_k=0, dtype=None)


class Header(NamedTuple):
    kind: Kind
    payload_bytes: int
    epoch: int = 0
    step: int = 0
    layer: int = 0
    shape: FrameShape = NO_ROWS

    def write(self, buffer: memoryview) -> None:
        """Fill the first 64 bytes of a buffer."""
        rows, hidden, top_k, dtype = self.shape
        _HEADER.pack_into(
            buffer, 0, MAGIC, VERSION, self.kind, _CODE_OF_DTYPE[dtype],
            self.layer, rows, hidden, top_k, self.epoch, self.step, self.payload_bytes, _PADDING,
        )  # fmt: skip

    @classmethod
    def read(cls, buffer: memoryview) -> Self:
        """The header in the first 64 bytes. Raises BadFrame unless its payload has the size that it must have."""
        magic, version, kind, code, layer, rows, hidden, top_k, epoch, step, payload_bytes, padding = (
            _HEADER.unpack_from(buffer)
        )
        if magic != MAGIC or version != VERSION or padding != _PADDING:
            raise BadFrame(f"not a frame of version {VERSION}: magic {magic!r}, version {version}")
        if kind not in _KINDS or code not in _DTYPE_OF_CODE:
            raise BadFrame(f"no frame has kind {kind} and dtype code {code}")
        shape = FrameShape(rows, hidden, top_k, _DTYPE_OF_CODE[code])
        if not _fits(kind, payload_bytes, shape):
            raise BadFrame(f"a payload of {payload_bytes} bytes does not fit kind {kind} and {shape}")
        return cls(Kind(kind), payload_bytes, epoch, step, layer, shape)


def small_frame(kind: Kind, payload: bytes) -> memoryview:
    """A whole frame without rows."""
    frame = memoryview(bytearray(HEADER_BYTES) + payload)
    Header(kind, len(payload)).write(frame)
    return frame


def error_frame(sentence: str) -> memoryview:
    return small_frame(Kind.ERROR, sentence.encode()[:MAX_SENTENCE_BYTES])


def _fits(kind: int, payload_bytes: int, shape: FrameShape) -> bool:
    if kind == Kind.LAYER:
        return payload_bytes == shape.layer_bytes <= MAX_PAYLOAD_BYTES
    if kind == Kind.PARTIAL:
        return payload_bytes == shape.partial_bytes <= MAX_PAYLOAD_BYTES
    if kind == Kind.ERROR:
        return payload_bytes <= MAX_SENTENCE_BYTES
    return payload_bytes == _HANDSHAKE_BYTES[kind]


class FrameBuffer:
    """Host memory for one frame at a time. Grows to the largest frame it has held, never shrinks.

    Growing moves the memory: views taken before stay valid, but on memory that is no longer the frame's.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._allocate(2 * MAX_SENTENCE_BYTES)

    def _allocate(self, num_bytes: int) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be written outside that mode
            self._bytes = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        self.view = self._bytes.numpy().data

    def reserve(self, payload_bytes: int, *, keep: int) -> None:
        """Make room for a frame with this payload; the first `keep` bytes survive."""
        needed = HEADER_BYTES + payload_bytes
        if needed <= len(self.view):
            return
        kept = bytes(self.view[:keep])
        self._allocate(max(needed, 2 * len(self.view)))
        self.view[:keep] = kept

    def tensor(self, offset: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A [rows, columns] view of the payload, `offset` bytes into it."""
        start = HEADER_BYTES + offset
        return self._bytes[start : start + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


class LayerFrame(FrameBuffer):
    """A LAYER frame. `shape_for` lays out x_TD, phys_TK, w_TK and `frame`, its bytes; they hold until the next call."""

    def __init__(self, *, pinned: bool) -> None:
        super().__init__(pinned=pinned)
        self.shape = NO_ROWS

    def shape_for(self, shape: FrameShape) -> None:
        if shape == self.shape:
            return
        rows, hidden, top_k, dtype = shape
        assert dtype is not None
        assert shape.partial_bytes % 4 == 0, (
            f"ids after bfloat16 rows need an even hidden size, got {shape.hidden}"
        )
        self.reserve(shape.layer_bytes, keep=0)
        self.shape = shape
        self.x_TD = self.tensor(0, rows, hidden, dtype)
        self.phys_TK = self.tensor(shape.partial_bytes, rows, top_k, torch.int32)
        self.w_TK = self.tensor(shape.partial_bytes + rows * top_k * 4, rows, top_k, torch.float32)
        self.frame = self.view[: HEADER_BYTES + shape.layer_bytes]


class PartialFrame(FrameBuffer):
    """A PARTIAL frame. `shape_for` lays out partial_TD and `frame`, its bytes; they hold until the next call."""

    def __init__(self, *, pinned: bool) -> None:
        super().__init__(pinned=pinned)
        self.shape = NO_ROWS

    def shape_for(self, shape: FrameShape) -> None:
        if shape == self.shape:
            return
        rows, hidden, _, dtype = shape
        assert dtype is not None
        self.reserve(shape.partial_bytes, keep=0)
        self.shape = shape
        self.partial_TD = self.tensor(0, rows, hidden, dtype)
        self.frame = self.view[: HEADER_BYTES + shape.partial_bytes]
