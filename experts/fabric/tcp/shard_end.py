"""The shard's end of fabric `tcp`: its listening sockets, and one thread per router that answers its frames."""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable

import torch

from experts.fabric import FabricError, LinkedShard, ShardAddress
from experts.fabric.mailbox.control import is_mailbox
from experts.fabric.mailbox.shard_end import serve_mailbox
from experts.fabric.tcp.frames import Kind, LayerFrame, PartialFrame, ShapeHalf, error_frame, layer_of
from experts.fabric.tcp.handshake import prove_shard
from experts.fabric.tcp.layer_log import LayerLog
from experts.fabric.tcp.sockets import (
    listen_here,
    ms_since_ack,
    prepare,
    receive_frame,
    send_frame,
    set_kernel_timeout,
    shut,
)

logger = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
CLOSE_S = 5.0
"""The time that `close` waits for all threads together."""

MAX_UNPROVEN = 64
"""The most links whose router has not proved itself; one more ends the oldest, so a port scanner gets no more threads."""

SPIN_S = 10e-3
"""The time that a shard polls before it sleeps. The next layer, or step, of a busy router comes within this time."""

PATROL_S = 60.0
"""The time between two looks of a waiting shard at whether its router's host is still there."""

SILENCE_S = 150.0
"""A link ends if the kernel of the router's host has acknowledged nothing for so long. A living one acknowledges something
at least every 120 s: keepalive, or probes of a full window."""


class ShardListener:
    """A server of one shard for any number of routers, with threads of its own, until `close`.

    address: what a Membership needs to reach this shard. log: counts the layers that all links have answered.
    """

    def __init__(self, shard: LinkedShard, *, host: str, name: str, token: bytes) -> None:
        self.log = LayerLog()
        self._shard = shard
        unix = f"sparkmoe-{os.getpid()}-{secrets.token_hex(8)}"
        self._listening = [socket.create_server((host, 0)), listen_here(unix)]
        port = self._listening[0].getsockname()[1]
        self.address = ShardAddress(
            rank=shard.rank, host=host, port=port, name=name, pid=os.getpid(), token=token, unix=unix
        )
        self._links: dict[threading.Thread, socket.socket] = {}
        self._unproven: dict[threading.Thread, socket.socket] = {}  # a subset of the links, oldest first
        self._lock = threading.Lock()
        self._closed = False
        self._acceptors = [
            threading.Thread(
                target=self._accept, args=(sock,), name=f"shard-{shard.rank}-accept", daemon=True
            )
            for sock in self._listening
        ]
        for thread in self._acceptors:
            thread.start()

    @property
    def port(self) -> int:
        return self.address.port

    def close(self) -> None:
        """End every link and thread within CLOSE_S, except a forward in progress, which cannot be interrupted.

        It may be called more than once.
        """
        with self._lock:
            self._closed = True
            threads = [*self._acceptors, *self._links]
            for sock in (*self._listening, *self._links.values()):
                shut(sock)
        deadline = time.monotonic() + CLOSE_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning(
                    "thread %s still computes %.0f s after the close of its link", thread.name, CLOSE_S
                )
        for sock in self._listening:
            sock.close()

    def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                sock, peer = listening.accept()
            except OSError:
                if self._closed:
                    return
                logger.exception("shard %d: accept failed", self._shard.rank)
                time.sleep(0.1)  # out of file descriptors, most likely
                continue
            where = f"{peer[0]}:{peer[1]}" if peer else f"here:{sock.fileno()}"
            name = f"shard-{self._shard.rank}-link-{where}"
            thread = threading.Thread(target=self._serve, args=(sock,), name=name, daemon=True)
            with self._lock:
                if self._closed:
                    sock.close()
                    return
                self._links[thread] = self._unproven[thread] = sock
                self._end_the_oldest_unproven()
            thread.start()

    def _end_the_oldest_unproven(self) -> None:
        if len(self._unproven) > MAX_UNPROVEN:
            oldest = next(iter(self._unproven))
            logger.warning("%s: ended: %d others have not proved themselves", oldest.name, MAX_UNPROVEN)
            shut(self._unproven.pop(oldest))

    def _proven(self) -> None:
        with self._lock:
            self._unproven.pop(threading.current_thread(), None)

    def _serve(self, sock: socket.socket) -> None:
        name, token = self.address.name, self.address.token
        try:
            serve_link(sock, self._shard, name=name, token=token, log=self.log, proven=self._proven)
        finally:
            self._proven()
            with self._lock:
                del self._links[threading.current_thread()]
                sock.close()


def serve_link(
    sock: socket.socket,
    shard: LinkedShard,
    *,
    name: str,
    token: bytes,
    log: LayerLog,
    proven: Callable[[], None],
) -> None:
    """Answer one router until it goes or breaks the protocol. Whatever the peer does, this does not raise.

    sock: connected; the caller closes it afterwards. log: gets every layer.
    proven: called once the router has proved itself.
    """
    thread = threading.current_thread().name
    try:
        prepare(sock)
        prove_shard(sock, name=name, token=token, within_s=HANDSHAKE_S)
        proven()
        logger.info("%s: open", thread)
        with torch.no_grad():
            if is_mailbox(sock, keep_waiting=_Patrol(sock)):
                serve_mailbox(sock, shard)
            else:
                _answer_layers(sock, shard, log)
    except FabricError as error:
        logger.warning("%s: closed: %s", thread, error)
    except OSError as error:
        logger.info("%s: ended: %s", thread, error)


def _answer_layers(sock: socket.socket, shard: LinkedShard, log: LayerLog) -> None:
    """Read LAYER frames and answer with PARTIAL frames, in buffers of this link.

    Returns after an ERROR frame.
    """
    request = LayerFrame(pinned=shard.device.type == "cuda")
    reply = PartialFrame(pinned=shard.device.type == "cuda")
    workspace = _Workspace(shard)
    wait_on = _Patrol(sock)
    while True:
        shape_half = receive_frame(
            sock, request, accept=workspace.accepts, keep_waiting=wait_on, spin_s=SPIN_S
        )
        if shape_half is not None:
            request.lay_out(shape_half.shape)
            reply.lay_out(shape_half.shape)
            reply.shape_half[:] = reply.laid_out_shape_half
            workspace.lay_out(request, reply)
        began = time.perf_counter()
        try:
            workspace.forward(layer_of(request))
        except Exception as error:
            # Whatever a kernel raises, the router has to hear of it, or it would wait for its deadline.
            logger.exception("shard %d: layer %d failed", shard.rank, layer_of(request))
            send_frame(sock, error_frame(f"{type(error).__name__}: {error}"), keep_waiting=wait_on)
            return
        took_s = time.perf_counter() - began
        reply.step_half[:] = request.step_half
        send_frame(sock, reply.frame, keep_waiting=wait_on)
        log.add(request.shape.rows, took_s)  # after the send, while the router is at work


class _Patrol:
    """A keep_waiting that gives up only when the kernel of the router's host has been silent for SILENCE_S.

    TCP's keepalive cannot find that out while bytes are on their way. The router itself may take as long as it likes, also
    to read: it may be waiting for another shard, whose kernels are compiling.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._looked_at = time.monotonic()
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            set_kernel_timeout(sock, option, PATROL_S)

    def __call__(self) -> None:
        now = time.monotonic()
        if now < self._looked_at + PATROL_S:
            return
        self._looked_at = now
        silent_s = ms_since_ack(self._sock) / 1000
        if silent_s >= SILENCE_S:
            raise TimeoutError(f"the router has acknowledged nothing for {silent_s:.0f} s")


class _Workspace:
    """The tensors that a forward works on: the memory of the frames, or copies in the shard's dtype on its device."""

    def __init__(self, shard: LinkedShard) -> None:
        self._shard = shard
        self._x_TD = torch.empty(0, dtype=shard.dtype, device=shard.device)
        self._phys_TK = torch.empty(0, dtype=torch.int32, device=shard.device)
        self._w_TK = torch.empty(0, dtype=torch.float32, device=shard.device)
        self._out_TD = torch.empty_like(self._x_TD)

    def accepts(self, shape_half: ShapeHalf) -> bool:
        return shape_half.kind is Kind.LAYER and shape_half.shape.hidden == self._shard.shape.hidden

    def lay_out(self, request: LayerFrame, reply: PartialFrame) -> None:
        """Take the shape and memory of these frames.

        Copies grow to the largest shape and keep that memory.
        """
        self._request, self._reply = request, reply
        self._in_place = (request.x_TD.dtype, request.x_TD.device) == (self._shard.dtype, self._shard.device)
        if not self._in_place:
            self._x_TD.resize_(request.x_TD.shape)
            self._phys_TK.resize_(request.phys_TK.shape)
            self._w_TK.resize_(request.w_TK.shape)
            self._out_TD.resize_(reply.partial_TD.shape)

    def forward(self, layer: int) -> None:
        """Compute a layer from the request's payload into the reply's."""
        request, reply = self._request, self._reply
        if self._in_place:
            self._shard.forward(layer, request.x_TD, request.phys_TK, request.w_TK, out_TD=reply.partial_TD)
            return
        self._x_TD.copy_(request.x_TD, non_blocking=True)
        self._phys_TK.copy_(request.phys_TK, non_blocking=True)
        self._w_TK.copy_(request.w_TK, non_blocking=True)
        self._shard.forward(layer, self._x_TD, self._phys_TK, self._w_TK, out_TD=self._out_TD)
        reply.partial_TD.copy_(self._out_TD)  # waits for the device, so the request may be overwritten
