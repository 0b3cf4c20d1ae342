"""The shard's end of fabric `tcp`: a listener, and one thread per router that answers its frames."""

import logging
import os
import socket
import threading
import time
from typing import Protocol

import torch
from torch import Tensor

from experts.fabric import FabricError, ShardAddress
from experts.fabric.frames import Form, Kind, LayerFrame, PartialFrame, error_frame, layer_of
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
        form = receive_frame(sock, request, accept=workspace.accepts, keep_waiting=_wait_on)
        if form is not None:
            request.lay_out(form.shape)
            reply.lay_out(form.shape)
            reply.form[:] = reply.known_form
            workspace.lay_out(request, reply)
        try:
            workspace.forward(layer_of(request))
        except Exception as error:
            # Whatever a kernel raises, the router has to hear of it, or it would wait for its deadline.
            logger.exception("shard %d: layer %d failed", shard.rank, layer_of(request))
            send_frame(sock, error_frame(f"{type(error).__name__}: {error}"), keep_waiting=_wait_on)
            return
        reply.moment[:] = request.moment
        send_frame(sock, reply.frame, keep_waiting=_wait_on)


def _wait_on() -> None:
    """A router that stops within a frame is found like one that stops between two: by keepalive."""


class _Workspace:
    """The tensors that a forward works on: the frames' own memory, or copies in the shard's dtype on its device."""

    def __init__(self, shard: LinkedShard) -> None:
        self._shard = shard
        self._x_TD = torch.empty(0, dtype=shard.dtype, device=shard.device)
        self._phys_TK = torch.empty(0, dtype=torch.int32, device=shard.device)
        self._w_TK = torch.empty(0, dtype=torch.float32, device=shard.device)
        self._out_TD = torch.empty_like(self._x_TD)

    def accepts(self, form: Form) -> bool:
        return form.kind is Kind.LAYER and form.shape.hidden == self._shard.shape.hidden

    def lay_out(self, request: LayerFrame, reply: PartialFrame) -> None:
        """For these frames. Memory of ours grows to the largest shape and stays there."""
        self._request, self._reply = request, reply
        self._in_place = (request.x_TD.dtype, request.x_TD.device) == (self._shard.dtype, self._shard.device)
        if not self._in_place:
            self._x_TD.resize_(request.x_TD.shape)
            self._phys_TK.resize_(request.phys_TK.shape)
            self._w_TK.resize_(request.w_TK.shape)
            self._out_TD.resize_(reply.partial_TD.shape)

    def forward(self, layer: int) -> None:
        """From the request's payload into the reply's."""
        request, reply = self._request, self._reply
        if self._in_place:
            self._shard.forward(layer, request.x_TD, request.phys_TK, request.w_TK, out_TD=reply.partial_TD)
            return
        self._x_TD.copy_(request.x_TD, non_blocking=True)
        self._phys_TK.copy_(request.phys_TK, non_blocking=True)
        self._w_TK.copy_(request.w_TK, non_blocking=True)
        self._shard.forward(layer, self._x_TD, self._phys_TK, self._w_TK, out_TD=self._out_TD)
        reply.partial_TD.copy_(self._out_TD)  # waits for the device, so the request may be overwritten
