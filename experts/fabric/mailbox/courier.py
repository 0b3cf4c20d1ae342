"""Couriers: threads that carry what is posted in a region over sockets to the same place of a region on another host.

An Outgoing courier waits for the region's flag and sends; an Incoming one receives and raises the flag of its own region,
so that neither end of a lane knows that the other is far away. What they do is compiled and holds no GIL.

A layer's payload is cut into stripes of equal size, one for each data socket of the link, as one TCP stream fills only a
part of a fast network; a small payload is one stripe. A stripe is a message:

    offset  size
         0     8  the flag's value
         8     8  rows
        16     8  number of stripes of this layer
        24     8  payload bytes of this stripe

and then its payload. The payload of an outbox is x [T, D], ids [T, K] and weights [T, K], one behind the other; that of
an inbox is the partial sums [T, D].
"""

import ctypes
import socket
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from experts.fabric.mailbox import words
from experts.fabric.mailbox.region import LaneShape, Region
from experts.fabric.mailbox.words import StopWord, load_acquire, store_release

STRIPE_BYTES = 1 << 20
"""Payloads of less than two stripes of this size go over one socket."""

CLOSE_S = 5.0
"""Seconds that `close` waits for each thread, whose socket is shut by then."""

_HEADER_BYTES = 32
_EINTR = 4

_libc = ctypes.CDLL(None)
_writev, _readv = _libc.writev, _libc.readv
for _call in (_writev, _readv):
    _call.argtypes, _call.restype = [ctypes.c_int, ctypes.c_int64, ctypes.c_int], ctypes.c_int64
_errno_location = _libc.__errno_location
_errno_location.argtypes, _errno_location.restype = [], ctypes.c_int64


@intrinsic
def _load_int32(typing_context: Any, address: Any) -> Any:
    """Read the int32 at an address."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(32).as_pointer())
        return builder.load(pointer, typ=ir.IntType(32))

    return types.int32(types.int64), codegen


load_int32: Any = _load_int32  # calls of compiled code have no typing context


@njit("boolean(int32, int64[:,::1], boolean)", nogil=True)
def _move(fd: int, pieces: np.ndarray, out: bool) -> bool:
    """Send, or receive, pieces of memory to their last byte. pieces: int64 [n, 2], address and bytes; used up.

    Returns False once the socket is at its end.
    """
    at = 0
    while at < len(pieces):
        if pieces[at, 1] == 0:
            at += 1
            continue
        iov = np.int64(pieces[at:].ctypes.data)
        moved = _writev(fd, iov, len(pieces) - at) if out else _readv(fd, iov, len(pieces) - at)
        if moved <= 0:
            if moved < 0 and load_int32(_errno_location()) == _EINTR:
                continue
            return False
        while moved > 0:
            step = min(moved, pieces[at, 1])
            pieces[at, 0] += step
            pieces[at, 1] -= step
            moved -= step
            at += pieces[at, 1] == 0
    return True


@njit("int64(int64[:,::1], int64, int64, int64, int64[:,::1])", nogil=True)
def _cut(segments: np.ndarray, rows: int, stripe: int, num_stripes: int, pieces: np.ndarray) -> int:
    """Write the pieces of one stripe of a payload into pieces[1:], and return their bytes.

    segments: int64 [n, 2], address and bytes of a row, of what a payload consists of.
    """
    total = 0
    for s in range(len(segments)):
        total += segments[s, 1] * rows
    share = -(-total // num_stripes // 16) * 16  # whole vectors of 16 bytes
    begin, end = min(stripe * share, total), min((stripe + 1) * share, total)
    if stripe == num_stripes - 1:
        end = total
    offset = 0
    for s in range(len(segments)):
        size = segments[s, 1] * rows
        low, high = max(begin, offset), min(end, offset + size)
        pieces[1 + s, 0] = segments[s, 0] + max(low - offset, 0)
        pieces[1 + s, 1] = max(high - low, 0)
        offset += size
    return end - begin


@njit("boolean(int32, int64[:,::1], int64, int64, int64, int64, int64, int64, int64, int64)", nogil=True)
def _send_step(
    fd: int,
    segments: np.ndarray,
    stripe: int,
    num_stripes: int,
    flag: int,
    stop: int,
    first: int,
    layers: int,
    rows: int,
    moved: int,
) -> bool:
    """Send one stripe of every layer of a step, as each is posted. Returns False if the socket is at its end.

    A stop ends the step. moved: address of a word that counts the bytes sent.
    """
    pieces = np.empty((1 + len(segments), 2), np.int64)
    header = np.empty(4, np.int64)
    for value in range(first, first + layers):
        looks = 0
        while load_acquire(flag) < value:
            if load_acquire(stop) >= value:
                return True
            looks += 1
            if looks > words.SPINS:
                words._sched_yield()
        header[0], header[1], header[2] = value, rows, num_stripes
        header[3] = _cut(segments, rows, stripe, num_stripes, pieces)
        pieces[0, 0], pieces[0, 1] = header.ctypes.data, _HEADER_BYTES
        if not _move(fd, pieces, True):
            return False
        store_release(moved, load_acquire(moved) + header[3])
    return True


@njit("int64(int32, int64[:,::1], int64, int64, int64, int64[::1], int64, int64)", nogil=True)
def _receive(
    fd: int,
    segments: np.ndarray,
    stripe: int,
    max_rows: int,
    flag: int,
    arrived: np.ndarray,
    stop: int,
    moved: int,
) -> int:
    """Receive stripes until the socket is at its end (returns 0) or a message is none of this lane (returns -1).

    arrived: addresses of a word for each stripe: the value that has come. Stripe 0 raises the flag when all are there.
    """
    pieces = np.empty((1 + len(segments), 2), np.int64)
    header = np.empty(4, np.int64)
    while True:
        head = np.empty((1, 2), np.int64)
        head[0, 0], head[0, 1] = header.ctypes.data, _HEADER_BYTES
        if not _move(fd, head, False):
            return 0
        value, rows, num_stripes, num_bytes = header[0], header[1], header[2], header[3]
        if not (0 <= rows <= max_rows and stripe < num_stripes <= len(arrived)):
            return -1
        if _cut(segments, rows, stripe, num_stripes, pieces) != num_bytes:
            return -1
        pieces[0, 1] = 0
        if not _move(fd, pieces, False):
            return 0
        store_release(moved, load_acquire(moved) + num_bytes)
        if stripe:
            store_release(arrived[stripe], value)
            continue
        for other in range(1, num_stripes):
            looks = 0
            while load_acquire(arrived[other]) < value and load_acquire(stop) < value:
                looks += 1
                if looks > words.SPINS:
                    words._sched_yield()
        if load_acquire(stop) < value:
            store_release(flag, value)


def outbox_segments(shape: LaneShape, region: Region) -> np.ndarray:
    """Return address and bytes of a row of x, ids and weights."""
    places = (
        (shape.x_offset, shape.hidden * shape.dtype.itemsize),
        (shape.ids_offset, 4 * shape.top_k),
        (shape.weights_offset, 4 * shape.top_k),
    )
    return np.array([(region.address + offset, size) for offset, size in places], np.int64)


def inbox_segments(shape: LaneShape, region: Region) -> np.ndarray:
    """Return address and bytes of a row of partial sums."""
    return np.array([(region.address + shape.x_offset, shape.hidden * shape.dtype.itemsize)], np.int64)


class Outgoing:
    """Sends what is posted in a region, step by step. Owns its threads, one for each socket; the sockets are the link's."""

    def __init__(
        self, sockets: Sequence[socket.socket], region: Region, segments: np.ndarray, stop: StopWord
    ) -> None:
        """sockets: connected and blocking, in the order of the peer's. segments: of the region's payload."""
        self._sockets, self._region, self._segments, self._stop = sockets, region, segments, stop
        self._bytes_of_row = int(segments[:, 1].sum())
        self._moved = [StopWord(pinned=False) for _ in sockets]
        self._changed = threading.Condition()
        self._step: tuple[int, int, int, int] | None = None  # number, first, layers, rows
        self._closed = False
        self._threads = [
            threading.Thread(target=self._run, args=(stripe,), name=f"courier-out-{stripe}", daemon=True)
            for stripe in range(len(sockets))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def bytes_moved(self) -> int:
        """The payload bytes sent since the start. As long as it grows, the network is at work."""
        return sum(word.value for word in self._moved)

    def begin(self, *, first: int, layers: int, rows: int) -> None:
        """Carry this step. The one before must have ended, by its last layer or by a stop."""
        with self._changed:
            number = self._step[0] + 1 if self._step else 0
            self._step = (number, first, layers, rows)
            self._changed.notify_all()

    def close(self) -> None:
        """End the threads; the link shuts its sockets first, and has raised the stop. Idempotent."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(CLOSE_S)

    def _run(self, stripe: int) -> None:
        step = self._step_after(-1)
        while step is not None:
            number, first, layers, rows = step
            num_stripes = num_stripes_of(rows * self._bytes_of_row, len(self._sockets))
            if stripe < num_stripes and not _send_step(
                self._sockets[stripe].fileno(),
                self._segments,
                stripe,
                num_stripes,
                self._region.address,
                self._stop.address,
                first,
                layers,
                rows,
                self._moved[stripe].address,
            ):
                return  # the link's control socket tells of its end, too
            step = self._step_after(number)

    def _step_after(self, number: int) -> tuple[int, int, int, int] | None:
        """Wait for the next step; None once the courier is closed."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or (self._step is not None and self._step[0] > number)
            )
            return None if self._closed else self._step


class Incoming:
    """Receives what a peer posts and raises the flag of this host's region. Owns its threads, one for each socket.

    refused: the peer sent what is no message of this lane, and the courier has ended.
    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        region: Region,
        segments: np.ndarray,
        stop: StopWord,
        *,
        max_rows: int,
    ) -> None:
        """sockets: connected and blocking, in the order of the peer's. segments: of the region's payload."""
        self.refused = False
        self._moved = [StopWord(pinned=False) for _ in sockets]
        self._words = [StopWord(pinned=False) for _ in sockets]
        arrived = np.array([word.address for word in self._words], np.int64)
        self._threads = [
            threading.Thread(
                target=self._run,
                args=(
                    *(sock.fileno(), segments, stripe, max_rows),
                    *(region.address, arrived, stop.address, self._moved[stripe].address),
                ),
                name=f"courier-in-{stripe}",
                daemon=True,
            )
            for stripe, sock in enumerate(sockets)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def bytes_moved(self) -> int:
        """The payload bytes received since the start."""
        return sum(word.value for word in self._moved)

    def close(self) -> None:
        """End the threads; the link shuts its sockets first, and has raised the stop. Idempotent."""
        for thread in self._threads:
            thread.join(CLOSE_S)

    def _run(self, *lane: Any) -> None:
        if _receive(*lane) < 0:
            self.refused = True


def num_stripes_of(payload_bytes: int, num_sockets: int) -> int:
    """Return into how many stripes a payload is cut."""
    return max(1, min(num_sockets, payload_bytes // STRIPE_BYTES))
