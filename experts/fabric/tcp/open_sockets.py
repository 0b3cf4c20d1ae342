"""The sockets of a router's end, and the switch that ends every wait on them from any thread."""

import socket
import threading

from experts.fabric import Aborted, ShardAddress
from experts.fabric.tcp.sockets import connect_here, finish_connecting, shut, start_connecting


class OpenSockets:
    """Holds every socket from before it is connected until it is closed.

    aborted: why, as long as `check` raises.
    """

    def __init__(self) -> None:
        self.aborted: str | None = None
        self._for_ever = False
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()  # nobody closes a socket while abort shuts it

    def check(self) -> None:
        """Raises Aborted after `abort`."""
        if self.aborted is not None:
            raise Aborted(self.aborted)

    def abort(self, reason: str, *, for_ever: bool) -> None:
        """From any thread: whatever waits on a socket ends, and none is connected until `allow`."""
        with self._lock:
            self.aborted = self.aborted or reason
            self._for_ever |= for_ever
            for sock in self._sockets:
                shut(sock)

    def allow(self) -> None:
        """The end of an abort; raises Aborted if it is for ever. The sockets from before are of no use any more."""
        with self._lock:
            if not self._for_ever:
                self.aborted = None
        self.check()

    def connect(self, shard: ShardAddress, *, timeout_s: float) -> socket.socket:
        """Over the shard's Unix socket if it listens here, else over TCP. To be closed with `close`.

        Raises Aborted or OSError.
        """
        host = socket.gethostbyname(shard.host)  # may take long, so without the lock
        with self._lock:
            self.check()
            here = connect_here(shard.unix) if shard.unix else None
            sock = here or start_connecting(host, shard.port)
            self._sockets.add(sock)
        try:
            finish_connecting(sock, timeout_s=timeout_s)
        except BaseException:
            self.close(sock)
            raise
        return sock

    def close(self, sock: socket.socket) -> None:
        """Nobody may be waiting on it."""
        with self._lock:
            self._sockets.discard(sock)
            sock.close()
