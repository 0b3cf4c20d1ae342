"""Sending and receiving frames on blocking sockets, with the kernel's time-outs (Python's would cost a poll per call)."""

import errno
import os
import select
import socket
import struct
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from experts.fabric import FabricError
from experts.fabric.tcp.frames import HEADER_BYTES, BadFrame, FrameBuffer, Kind, ShapeHalf

KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_PROBES = 3

UNIX_BUFFER_BYTES = 4 << 20
"""The number of bytes that a sender may be ahead of its reader. Most systems set a lower limit, net.core.wmem_max."""


class PeerError(FabricError):
    """The peer sent an ERROR frame; the message is its sentence, which says what it could not do."""


class Deadline:
    """A keep_waiting that gives up this many seconds after it was made."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = time.monotonic() + seconds

    def __call__(self) -> None:
        self.left_s()

    def left_s(self) -> float:
        """Return the seconds that are left, more than zero. Raises TimeoutError once nothing is left."""
        left_s = self._at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"no answer within {self._seconds:.1f} s")
        return left_s


def listen_here(name: str) -> socket.socket:
    """Return a Unix socket that listens under this abstract name, for processes of the same network namespace."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("\0" + name)
    sock.listen()
    return sock


def connect_here(name: str) -> socket.socket | None:
    """Return a socket connected to this abstract name, or None if no process here listens under it.

    It does not block.
    """
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    if sock.connect_ex("\0" + name) == 0:
        return sock
    sock.close()
    return None


def start_connecting(host: str, port: int) -> socket.socket:
    """Return a TCP socket that is being connected to this peer: from now on `shut` ends it.

    It does not block if host is an address and not a name.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        _raise_os_error(sock.connect_ex((host, port)), unless=errno.EINPROGRESS)
    except BaseException:
        sock.close()
        raise
    return sock


def finish_connecting(sock: socket.socket, *, timeout_s: float) -> None:
    """Wait until the socket is connected. Raises OSError, also when the socket is shut."""
    ready = select.poll()
    ready.register(sock, select.POLLOUT)
    if not ready.poll(timeout_s * 1000):
        raise TimeoutError(f"no connection within {timeout_s:.1f} s")
    _raise_os_error(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


def prepare(sock: socket.socket) -> None:
    """Make a socket blocking; give a Unix socket room for a layer, as far as the system allows; free TCP of Nagle's delay.

    A TCP peer that falls silent (a power loss sends no RST) ends the link within 11 s if it owes no acknowledgement; if it
    does, the kernel sends again for 15 minutes instead. TCP_USER_TIMEOUT is not set: it would overrule the 11 s, and end
    links to a living peer that only does not read for a while.
    """
    sock.setblocking(True)
    if sock.family == socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_BUFFER_BYTES)
        return
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def set_kernel_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """Set SO_RCVTIMEO or SO_SNDTIMEO, to at least a millisecond. 0 means no time-out, with which sockets begin."""
    micros = max(1000, round(seconds * 1e6)) if seconds else 0
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(micros, 1_000_000)))


def send_frame(sock: socket.socket, frame: memoryview, *, keep_waiting: Callable[[], None]) -> None:
    """Send all bytes.

    keep_waiting: called after each time-out and each partial write; it raises to give up.
    """
    sent = _send_some(sock, frame)
    while sent < len(frame):
        keep_waiting()
        sent += _send_some(sock, frame[sent:])


def receive_frame(
    sock: socket.socket,
    buffer: FrameBuffer,
    *,
    accept: Callable[[ShapeHalf], bool],
    keep_waiting: Callable[[], None],
    spin_s: float = 0.0,
) -> ShapeHalf | None:
    """Read one frame into `buffer`. Returns None if the buffer is laid out for such a frame, else the frame's shape half.

    The first read takes what has arrived, so a small frame costs one system call. It cannot cut into a next frame,
    because no peer sends one before it has an answer to the first.
    accept: judges a frame of another shape before its payload gets any memory; ERROR frames are not asked about.
    keep_waiting: called after each time-out and each read that was short; it raises to give up.
    spin_s: how long to ask again and again before sleeping; to wake a sleeper takes longer than a small frame's way.
    Raises BadFrame, PeerError for an ERROR frame, ConnectionError at the end of the stream.
    """
    received = receive_some(sock, buffer.view, spin_s)
    if received == len(buffer.frame) and buffer.shape_half == buffer.laid_out_shape_half:
        return None
    while received < HEADER_BYTES:
        keep_waiting()
        received += receive_some(sock, buffer.view[received:], spin_s)
    shape_half = ShapeHalf.unpack(buffer.shape_half)
    known = buffer.shape_half == buffer.laid_out_shape_half
    if not (known or shape_half.kind is Kind.ERROR or accept(shape_half)):
        raise BadFrame(f"unexpected frame: {shape_half}")
    total = HEADER_BYTES + shape_half.payload_bytes
    if received > total:
        raise BadFrame(f"{received - total} bytes after a frame that has no answer yet: {shape_half}")
    buffer.reserve(shape_half.payload_bytes, keep=received)
    while received < total:
        keep_waiting()
        received += receive_some(sock, buffer.view[received:total], spin_s)
    if shape_half.kind is Kind.ERROR:
        raise PeerError(str(buffer.view[HEADER_BYTES:total], "utf-8", "replace"))
    return None if known else shape_half


def receive_some(sock: socket.socket, view: memoryview, spin_s: float) -> int:
    """Read what has arrived and return how many bytes, or 0 once SO_RCVTIMEO has passed. It polls for spin_s at first.

    Raises ConnectionError at the end of the stream.
    """
    received = _spin(sock, view, spin_s)
    if received is None:
        try:
            received = sock.recv_into(view)
        except BlockingIOError:
            return 0
    if received == 0:
        raise ConnectionResetError("it closed the link")
    return received


def shut(sock: socket.socket) -> None:
    """Wake every thread that waits on this socket; they find the stream at its end.

    The owner still has to close it.
    """
    with suppress(OSError):  # it never was connected, or the peer has closed it already
        sock.shutdown(socket.SHUT_RDWR)


def ms_since_ack(sock: socket.socket) -> int:
    """Return the milliseconds since the peer's kernel last acknowledged anything, keepalive and window probes included."""
    if sock.family == socket.AF_UNIX:
        return 0  # the peer's kernel is our own
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _LAST_ACK_RECV + 4)
    return int.from_bytes(info[_LAST_ACK_RECV:], sys.byteorder)


_LAST_ACK_RECV = 56  # offset of tcpi_last_ack_recv in struct tcp_info


def _raise_os_error(code: int, *, unless: int = 0) -> None:
    if code not in (0, unless):
        raise OSError(code, os.strerror(code))


def _send_some(sock: socket.socket, frame: memoryview) -> int:
    try:
        return sock.send(frame)
    except BlockingIOError:  # SO_SNDTIMEO passed
        return 0


def _spin(sock: socket.socket, view: memoryview, spin_s: float) -> int | None:
    """Read what arrives within spin_s, or return None.

    A thread that waits for this core gets it in between.
    """
    sleep_at = time.perf_counter() + spin_s
    while time.perf_counter() < sleep_at:
        try:
            return sock.recv_into(view, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            os.sched_yield()
    return None
