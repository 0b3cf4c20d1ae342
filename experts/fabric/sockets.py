"""Frames through a blocking socket, with the kernel's own timeouts (Python's would cost a poll per call)."""

import contextlib
import socket
import struct
import time
from collections.abc import Callable

from experts.fabric import FabricError
from experts.fabric.frames import HEADER_BYTES, BadFrame, FrameBuffer, Header, Kind

KEEPALIVE_IDLE_S = 5
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_PROBES = 3


class PeerError(FabricError):
    """The sentence of an ERROR frame: what the peer says it could not do."""


def prepare(sock: socket.socket) -> None:
    """Blocking, no Nagle delay, and a silent peer (power loss sends no RST) is noticed within 11 s."""
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVE_PROBES)


def set_kernel_timeout(sock: socket.socket, option: int, seconds: float) -> None:
    """option: SO_RCVTIMEO or SO_SNDTIMEO. At least a millisecond; 0 waits for ever, which is how sockets are born."""
    micros = max(1000, round(seconds * 1e6)) if seconds else 0
    sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", *divmod(micros, 1_000_000)))


class Deadline:
    """A keep_waiting that gives up some seconds after its making."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = time.monotonic() + seconds

    def __call__(self) -> None:
        if time.monotonic() >= self._at:
            raise TimeoutError(f"no answer within {self._seconds:.1f} s")


def send_frame(sock: socket.socket, frame: memoryview, *, keep_waiting: Callable[[], None]) -> None:
    """Send all bytes. keep_waiting is called after each time-out and each partial write; it raises to give up."""
    sent = 0
    while True:
        with contextlib.suppress(BlockingIOError):  # SO_SNDTIMEO passed
            sent += sock.send(frame[sent:] if sent else frame)
        if sent == len(frame):
            return
        keep_waiting()


def receive_frame(
    sock: socket.socket,
    buffer: FrameBuffer,
    *,
    accept: Callable[[Header], bool],
    keep_waiting: Callable[[], None],
) -> Header:
    """Read one frame into `buffer`; `accept` judges its header before its payload gets any memory.

    The first read takes what has arrived, so a small frame costs one system call. That may not cut into a next
    frame, because no peer sends one before it has an answer to the first.
    keep_waiting: called after each time-out and each read that was short; it raises to give up.
    Raises BadFrame, PeerError for an ERROR frame, ConnectionError at the end of the stream.
    """
    received = _receive_until(sock, buffer.view, 0, HEADER_BYTES, keep_waiting)
    header = Header.read(buffer.view)
    if header.kind is not Kind.ERROR and not accept(header):
        raise BadFrame(f"unexpected frame: {header}")
    total = HEADER_BYTES + header.payload_bytes
    if received > total:
        raise BadFrame(f"{received - total} bytes after a frame that was not answered yet: {header}")
    if received < total:
        buffer.reserve(header.payload_bytes, keep=received)
        _receive_until(sock, buffer.view[:total], received, total, keep_waiting)
    if header.kind is Kind.ERROR:
        raise PeerError(str(buffer.view[HEADER_BYTES:total], "utf-8", "replace"))
    return header


def _receive_until(
    sock: socket.socket, view: memoryview, received: int, enough: int, keep_waiting: Callable[[], None]
) -> int:
    """Read into `view` until it holds `enough` bytes; more may come, up to its length. Returns how many it holds."""
    flags = socket.MSG_WAITALL if enough == len(view) else 0
    while True:
        try:
            num_bytes = sock.recv_into(view[received:] if received else view, 0, flags)
        except BlockingIOError:  # SO_RCVTIMEO passed
            num_bytes = -1
        if num_bytes == 0:
            raise ConnectionResetError("it closed the link")
        received += max(0, num_bytes)
        if received >= enough:
            return received
        keep_waiting()


def shut(sock: socket.socket) -> None:
    """Wake every thread that waits on this socket; they find it at its end. The owner still has to close it."""
    with contextlib.suppress(OSError):  # it never was connected, or its peer was faster
        sock.shutdown(socket.SHUT_RDWR)
