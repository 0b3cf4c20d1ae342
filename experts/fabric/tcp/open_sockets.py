"""The sockets of a router's end, and the switch that ends every wait on them from any thread."""

import socket
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from experts.fabric import Aborted, FabricError, ShardAddress
from experts.fabric.tcp.sockets import connect_here, finish_connecting, shut, start_connecting

Link = TypeVar("Link")


def open_links(
    shards: Sequence[ShardAddress], open_one: Callable[[ShardAddress], Link]
) -> tuple[dict[int, Link], dict[int, str]]:
    """Open links in parallel, so that dead hosts cost one time-out.

    open_one: raises OSError or FabricError. Returns links and reasons of failure, by rank.
    """
    links: dict[int, Link] = {}
    lost: dict[int, str] = {}
    if not shards:
        return links, lost
    with ThreadPoolExecutor(len(shards)) as pool:
        futures = {shard: pool.submit(open_one, shard) for shard in shards}
    for shard, future in futures.items():
        try:
            links[shard.rank] = future.result()
        except (OSError, FabricError) as error:
            lost[shard.rank] = f"cannot reach {shard.name} at {shard.host}:{shard.port}: {error}"
    return links, lost


class OpenSockets:
    """The set of a router's sockets, each from before it is connected until it is closed.

    aborted: the reason of the abort as long as `check` raises, else None.
    """

    def __init__(self) -> None:
        self.aborted: str | None = None
        self._for_ever = False
        self._sockets: set[socket.socket] = set()
        self._lock = threading.Lock()  # no socket is closed while abort shuts it

    def check(self) -> None:
        """Raise Aborted after `abort`, until `allow`."""
        if self.aborted is not None:
            raise Aborted(self.aborted)

    def abort(self, reason: str, *, for_ever: bool) -> None:
        """End every wait on a socket, and let none be connected until `allow`. From any thread."""
        with self._lock:
            self.aborted = self.aborted or reason
            self._for_ever |= for_ever
            for sock in self._sockets:
                shut(sock)

    def allow(self) -> None:
        """End an abort.

        Raises Aborted if it is for ever. Sockets from before the abort are of no use any more.
        """
        with self._lock:
            if not self._for_ever:
                self.aborted = None
        self.check()

    def connect(self, shard: ShardAddress, *, timeout_s: float) -> socket.socket:
        """Connect to a shard over its Unix socket if that is on this host, else over TCP. `close` closes the socket.

        Raises Aborted or OSError.
        """
        host = socket.gethostbyname(shard.host)  # may take long, so it is called without the lock
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
        """Close a socket on which no thread is waiting."""
        with self._lock:
            self._sockets.discard(sock)
            sock.close()
