"""The wire format of fabric `tcp`, and the host buffers that hold one frame each. No sockets here.

A frame is a header of 64 bytes and a payload, little-endian throughout. The header's halves are its *form*, the same
for all frames of a kind and size, and its *moment*, which a PARTIAL repeats from the LAYER that it answers.

    offset  size  form
         0     4  magic, b"SMOE"
         4     2  version, 1
         6     1  kind, see below
         7     1  dtype of x and of partial sums: 1 float32, 2 bfloat16; 0 where a frame has no rows
         8     4  rows T
        12     4  hidden D
        16     4  top_k K, at most 64
        20     4  zero
        24     8  payload bytes
    offset  size  moment
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
FORM_BYTES = 32
NONCE_BYTES = 32
PROOF_BYTES = 32
MAX_SENTENCE_BYTES = 4096
MAX_TOP_K = 64
MAX_PAYLOAD_BYTES = 256 << 20
"""See max_rows. Only a peer that has proved itself gets that far."""

_FORM = struct.Struct("<4sHBBIIIIQ")
_MOMENT = struct.Struct("<QQI12x")
_DTYPE_OF_CODE = {0: None, 1: torch.float32, 2: torch.bfloat16}
_CODE_OF_DTYPE = {dtype: code for code, dtype in _DTYPE_OF_CODE.items()}
_PAIR_BYTES = 8  # a physical id and its weight


class Kind(IntEnum):
    CHALLENGE = 1
    ANSWER = 2
    WELCOME = 3
    LAYER = 4
    PARTIAL = 5
    ERROR = 6


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
        return self.rows * self.hidden * (self.dtype.itemsize if self.dtype else 0)

    @property
    def layer_bytes(self) -> int:
        return self.partial_bytes + self.rows * self.top_k * _PAIR_BYTES

    @property
    def is_sendable(self) -> bool:
        """The ids, which follow the rows, are aligned, and the payload is below the limit."""
        return (
            self.dtype is not None
            and self.partial_bytes % 4 == 0
            and self.top_k <= MAX_TOP_K
            and self.layer_bytes <= MAX_PAYLOAD_BYTES
        )


NO_ROWS = FrameShape(rows=0, hidden=0, top_k=0, dtype=None)


def max_rows(hidden: int, dtype: torch.dtype) -> int:
    """How many rows fit a frame, whatever the top-k."""
    return MAX_PAYLOAD_BYTES // (hidden * dtype.itemsize + MAX_TOP_K * _PAIR_BYTES)


class Form(NamedTuple):
    """The first half of a header."""

    kind: Kind
    payload_bytes: int
    shape: FrameShape = NO_ROWS

    def pack(self) -> bytes:
        rows, hidden, top_k, dtype = self.shape
        code = _CODE_OF_DTYPE[dtype]
        return _FORM.pack(MAGIC, VERSION, self.kind, code, rows, hidden, top_k, 0, self.payload_bytes)

    @classmethod
    def unpack(cls, buffer: memoryview) -> Self:
        """Raises BadFrame for a form that nobody packs; so the payload has the one size that fits, below the limit."""
        magic, version, kind, code, rows, hidden, top_k, zero, payload_bytes = _FORM.unpack_from(buffer)
        if magic != MAGIC or version != VERSION or zero != 0:
            raise BadFrame(f"not a frame of version {VERSION}: {bytes(buffer[:FORM_BYTES])!r}")
        if kind not in _KINDS or code not in _DTYPE_OF_CODE:
            raise BadFrame(f"no frame has kind {kind} and dtype code {code}")
        form = cls(Kind(kind), payload_bytes, FrameShape(rows, hidden, top_k, _DTYPE_OF_CODE[code]))
        if not form._fits():
            raise BadFrame(f"the payload does not fit: {form}")
        return form

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
    """A whole frame without rows and without a moment."""
    return memoryview(Form(kind, len(payload)).pack() + bytes(HEADER_BYTES - FORM_BYTES) + payload)


def error_frame(sentence: str) -> memoryview:
    return small_frame(Kind.ERROR, sentence.encode()[:MAX_SENTENCE_BYTES])


class FrameBuffer:
    """Host memory for one frame at a time. Grows to the largest frame it has held, never shrinks.

    view: all of it. form, moment: the halves of the header. Growing moves the memory; older views keep the old one.
    frame, shape, known_form: of the LAYER or PARTIAL frame that the buffer is laid out for.
    """

    def __init__(self, *, pinned: bool) -> None:
        self._pinned = pinned
        self._allocate(HEADER_BYTES + MAX_SENTENCE_BYTES)
        self.frame = self.view[:0]
        self.shape = NO_ROWS
        self.known_form = b""

    def _allocate(self, num_bytes: int) -> None:
        with torch.inference_mode(False):  # an inference tensor could not be written outside that mode
            self._bytes = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        self.view = self._bytes.numpy().data
        self.form = self.view[:FORM_BYTES]
        self.moment = self.view[FORM_BYTES:HEADER_BYTES]

    def reserve(self, payload_bytes: int, *, keep: int) -> None:
        """Make room for a frame with this payload; the first `keep` bytes survive."""
        needed = HEADER_BYTES + payload_bytes
        if needed <= len(self.view):
            return
        kept = bytes(self.view[:keep])
        self._allocate(max(needed, 2 * len(self.view)))
        self.view[:keep] = kept

    def _lay_out(self, form: Form) -> None:
        self.reserve(form.payload_bytes, keep=0)
        self.frame = self.view[: HEADER_BYTES + form.payload_bytes]
        self.shape = form.shape
        self.known_form = form.pack()

    def _tensor(self, offset: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """A [rows, columns] view of the payload, `offset` bytes into it."""
        start = HEADER_BYTES + offset
        return self._bytes[start : start + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


class LayerFrame(FrameBuffer):
    """A LAYER frame: x_TD, phys_TK and w_TK are its payload, until it is laid out for another shape."""

    def lay_out(self, shape: FrameShape) -> None:
        """A frame that was received into this buffer stays as it is."""
        rows, hidden, top_k, dtype = shape
        assert dtype is not None
        assert shape.is_sendable, f"no frame holds {shape}: see max_rows; hidden must be even"
        self._lay_out(Form(Kind.LAYER, shape.layer_bytes, shape))
        self.x_TD = self._tensor(0, rows, hidden, dtype)
        self.phys_TK = self._tensor(shape.partial_bytes, rows, top_k, torch.int32)
        self.w_TK = self._tensor(shape.partial_bytes + 4 * rows * top_k, rows, top_k, torch.float32)


class PartialFrame(FrameBuffer):
    """A PARTIAL frame: partial_TD is its payload, until it is laid out for another shape."""

    def lay_out(self, shape: FrameShape) -> None:
        assert shape.dtype is not None
        self._lay_out(Form(Kind.PARTIAL, shape.partial_bytes, shape))
        self.partial_TD = self._tensor(0, shape.rows, shape.hidden, shape.dtype)


def write_moment(buffer: FrameBuffer, *, epoch: int, step: int, layer: int) -> None:
    _MOMENT.pack_into(buffer.moment, 0, epoch, step, layer)


def layer_of(buffer: FrameBuffer) -> int:
    return _MOMENT.unpack_from(buffer.moment)[2]
