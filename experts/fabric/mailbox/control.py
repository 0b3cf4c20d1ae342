"""The control socket of a mailbox's link: what its two ends tell each other beside flags and rows.

A message is 64 bytes, little-endian, and for FAILED a sentence behind them:

    offset  size
         0     4  magic, b"SMBX": another one than that of fabric tcp's frames, which a shard's socket also takes
         4     1  kind, see below
         5     3  zero
         8     4  bytes of the sentence
        12    40  five numbers, int64
        52    12  zero

    kind       from    numbers
    1 OPEN     router  rows, hidden, top-k, dtype (1 float32, 2 bfloat16), layers; the regions' descriptors follow
    2 READY    shard
    3 STEP     router  epoch, step, first flag, real rows, posted rows
    4 STOP     router  value: every wait for it, or for less, shall return
    5 DRAINED  shard   first flag of the step whose work has ended
    6 FAILED   shard   first flag, layer; the sentence says what it could not do, and the shard closes the link
"""

import os
import socket
import struct
import threading
from collections.abc import Callable
from enum import IntEnum
from typing import NamedTuple

from experts.fabric import FabricError
from experts.fabric.mailbox.region import Region

MAGIC = b"SMBX"
MAX_SENTENCE_BYTES = 4096

_MESSAGE = struct.Struct("<4sB3xi5q12x")


class Kind(IntEnum):
    """The kinds of messages, by their number on the wire."""

    OPEN = 1
    READY = 2
    STEP = 3
    STOP = 4
    DRAINED = 5
    FAILED = 6


class Message(NamedTuple):
    """One message. numbers: five, zero where the kind has fewer."""

    kind: Kind
    numbers: tuple[int, ...]
    sentence: str = ""


class Control:
    """One end of a control socket, which stays the caller's. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._one_sends = threading.Lock()

    def send(self, kind: Kind, *numbers: int, sentence: str = "") -> None:
        """Send a message. Raises OSError."""
        text = sentence.encode()[:MAX_SENTENCE_BYTES]
        five = (*numbers, *[0] * (5 - len(numbers)))
        with self._one_sends:
            self._socket.sendall(_MESSAGE.pack(MAGIC, kind, len(text), *five) + text)

    def receive(self) -> Message:
        """Wait for a message. Raises OSError, also at the end of the stream, and FabricError for what is no message."""
        magic, kind, num_bytes, *numbers = _MESSAGE.unpack(self._read(_MESSAGE.size))
        if magic != MAGIC or kind not in set(Kind) or not 0 <= num_bytes <= MAX_SENTENCE_BYTES:
            raise FabricError(f"not a message of a mailbox: {magic!r}, kind {kind}, {num_bytes} bytes")
        return Message(Kind(kind), tuple(numbers), str(self._read(num_bytes), "utf-8", "replace"))

    def send_regions(self, *regions: Region) -> None:
        """Hand the regions' descriptors over a Unix socket whose peer runs as the same user.

        Raises FabricError for another user, who could do with the memory what he likes, and OSError.
        """
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _, uid, _ = struct.unpack("3i", credentials)
        if uid != os.getuid():
            raise FabricError(f"its process runs as user {uid}, not as {os.getuid()}")
        with self._one_sends:
            socket.send_fds(self._socket, [b"R"], [region.fd for region in regions])

    def receive_regions(self, *sizes: int) -> list[Region]:
        """Map the regions whose descriptors the peer hands over. Raises FabricError unless they have these sizes."""
        _, fds, _, _ = socket.recv_fds(self._socket, 1, len(sizes))
        if len(fds) != len(sizes):
            for fd in fds:
                os.close(fd)
            raise FabricError(f"{len(fds)} regions came where {len(sizes)} were expected")
        return [Region.map(fd, size) for fd, size in zip(fds, sizes, strict=True)]

    def _read(self, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            more = self._socket.recv(num_bytes - len(data))
            if not more:
                raise ConnectionResetError("it closed the link")
            data += more
        return data


def is_mailbox(sock: socket.socket, *, keep_waiting: Callable[[], None]) -> bool:
    """Wait for a peer's first bytes, which stay there, and return whether they begin a message of a mailbox.

    keep_waiting: called after each time-out of the socket; it raises to give up.
    """
    while True:
        try:
            seen = sock.recv(len(MAGIC), socket.MSG_PEEK)
        except BlockingIOError:
            keep_waiting()
            continue
        if len(seen) == len(MAGIC) or not MAGIC.startswith(seen) or not seen:
            return seen == MAGIC
