"""The shard's end of fabric `tcp`: a listener, and one thread per router that answers its frames."""

import logging
import os
import socket
import threading
import time
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from experts.fabric import FabricError, ShardAddress
from experts.fabric.frames import Header, Kind, LayerFrame, PartialFrame, error_frame
from experts.fabric.handshake import prove_shard
from experts.fabric.sockets import prepare, receive_frame, send_frame, shut
from experts.weights import MoEShape

logger = logging.getLogger(__name__)

HANDSHAKE_S = 5.0
CLOSE_S = 5.0


class LinkedShard(Protocol):
    """What a link needs of an ExpertShard. `forward` is called from several threads."""

    rank: int
    shape: MoEShape
    dtype: torch.dtype
    device: torch.device

    def forward(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None: ...


class ShardListener:
    """Serves one shard to any number of routers, from threads of its own, until `close`.

    address: what a Membership needs to reach this shard.
    """

    def __init__(self, shard: LinkedShard, *, host: str, name: str, token: bytes) -> None:
        self._shard = shard
        self._socket = socket.create_server((host, 0))
        port = self._socket.getsockname()[1]
        self.address = ShardAddress(
            rank=shard.rank, host=host, port=port, name=name, pid=os.getpid(), token=token
        )
        self._links: dict[threading.Thread, socket.socket] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._acceptor = threading.Thread(target=self._accept, name=f"shard-{shard.rank}-accept", daemon=True)
        self._acceptor.start()

    @property
    def port(self) -> int:
        return self.address.port

    def close(self) -> None:
        """End every link and thread, within CLOSE_S: a forward in progress cannot be interrupted. Idempotent."""
        with self._lock:
            self._closed = True
            threads = [self._acceptor, *self._links]
            for sock in (self._socket, *self._links.values()):
                shut(sock)
        deadline = time.monotonic() + CLOSE_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning(
                    "thread %s still computes %.0f s after the close of its link", thread.name, CLOSE_S
                )
        self._socket.close()

    def _accept(self) -> None:
        while True:
            try:
                sock, peer = self._socket.accept()
            except OSError:
                if self._closed:
                    return
                logger.exception("shard %d: accept failed", self._shard.rank)
                time.sleep(0.1)  # out of file descriptors, most likely
                continue
            name = f"shard-{self._shard.rank}-link-{peer[0]}:{peer[1]}"
            thread = threading.Thread(target=self._serve, args=(sock,), name=name, daemon=True)
            with self._lock:
                if self._closed:
                    sock.close()
                    return
                self._links[thread] = sock
            thread.start()

    def _serve(self, sock: socket.socket) -> None:
        try:
            serve_link(sock, self._shard, name=self.address.name, token=self.address.token)
        finally:
            with self._lock:
                del self._links[threading.current_thread()]
                sock.close()


def serve_link(sock: socket.socket, shard: LinkedShard, *, name: str, token: bytes) -> None:
    """Answer one router until it goes or breaks the protocol. Raises for nothing that a peer did.

    sock: connected; the caller's, to close afterwards.
    """
    thread = threading.current_thread().name
    try:
        prepare(sock)
        prove_shard(sock, name=name, token=token, within_s=HANDSHAKE_S)
        logger.info("%s: open", thread)
        with torch.no_grad():
            _answer_layers(sock, shard)
    except FabricError as error:
        logger.warning("%s: closed: %s", thread, error)
    except OSError as error:
        logger.info("%s: ended: %s", thread, error)


def _answer_layers(sock: socket.socket, shard: LinkedShard) -> None:
    """LAYER in, PARTIAL out, in buffers of this link. Returns after an ERROR."""
    request = LayerFrame(pinned=shard.device.type == "cuda")
    reply = PartialFrame(pinned=shard.device.type == "cuda")
    workspace = _Workspace(shard)
    while True:
        header = receive_frame(sock, request, accept=workspace.accepts, keep_waiting=_wait_on)
        request.shape_for(header.shape)
        reply.shape_for(header.shape)
        try:
            workspace.forward(header.layer, request, reply)
        except Exception as error:
            # Whatever a kernel raises, the router has to hear of it, or it would wait for its deadline.
            logger.exception("shard %d: layer %d failed", shard.rank, header.layer)
            send_frame(sock, error_frame(f"{type(error).__name__}: {error}"), keep_waiting=_wait_on)
            return
        header._replace(kind=Kind.PARTIAL, payload_bytes=header.shape.partial_bytes).write(reply.view)
        send_frame(sock, reply.frame, keep_waiting=_wait_on)


def _wait_on() -> None:
    """A router that stops within a frame is found like one that stops between two: by keepalive."""


class _Workspace:
    """The tensors that a forward works on: the frames' own memory, or copies in the shard's dtype on its device."""

    def __init__(self, shard: LinkedShard) -> None:
        self._shard = shard
        empty = partial(torch.empty, 0, device=shard.device)
        self._x_TD = empty(dtype=shard.dtype)
        self._out_TD = empty(dtype=shard.dtype)
        self._phys_TK = empty(dtype=torch.int32)
        self._w_TK = empty(dtype=torch.float32)

    def accepts(self, header: Header) -> bool:
        return header.kind is Kind.LAYER and header.shape.hidden == self._shard.shape.hidden

    def forward(self, layer: int, request: LayerFrame, reply: PartialFrame) -> None:
        x_TD, phys_TK, w_TK, out_TD = request.x_TD, request.phys_TK, request.w_TK, reply.partial_TD
        if (x_TD.dtype, x_TD.device) == (self._shard.dtype, self._shard.device):
            self._shard.forward(layer, x_TD, phys_TK, w_TK, out_TD=out_TD)
            return
        self._shard.forward(
            layer,
            _copied(self._x_TD, x_TD),
            _copied(self._phys_TK, phys_TK),
            _copied(self._w_TK, w_TK),
            out_TD=self._out_TD.resize_(out_TD.shape),
        )
        out_TD.copy_(self._out_TD)


def _copied(buffer: Tensor, source: Tensor) -> Tensor:
    """`buffer` with the source's shape and values; its memory grows to the largest shape and stays there."""
    return buffer.resize_(source.shape).copy_(source, non_blocking=True)
