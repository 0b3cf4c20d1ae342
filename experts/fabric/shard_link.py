"""The router's socket to one shard: one frame out, one answer in, under a step's deadlines."""

import logging
import socket
import time
from contextlib import suppress
from typing import NamedTuple, Self

import torch
from torch import Tensor

from experts.fabric import ShardAddress, StepHeader
from experts.fabric.frames import BadFrame, Form, FrameShape, LayerFrame, PartialFrame, layer_of
from experts.fabric.handshake import prove_router
from experts.fabric.sockets import prepare, receive_frame, send_frame, set_kernel_timeout, shut

logger = logging.getLogger(__name__)

ANSWER_GRACE_S = 1.0
"""For the bytes of an answer that is due: reading may begin late, because the links are read one after the other."""


class Patience(NamedTuple):
    """How long a shard may take over one layer: it is reported after slow_s and dead after dead_s."""

    slow_s: float
    dead_s: float


class ShardLink:
    """Used by one thread, except `shut`. Owns its socket and the memory of the shard's last answer."""

    def __init__(self, address: ShardAddress, sock: socket.socket) -> None:
        self.address = address
        self._socket = sock
        self._reply = PartialFrame(pinned=torch.cuda.is_available())
        self._owes_answer = False
        self._sent_at = 0.0
        self._give_up_at = 0.0
        self._step = -1
        self._layer = -1
        self._reported = False
        self._patience: Patience | None = None

    @classmethod
    def open(cls, address: ShardAddress, *, timeout_s: float, silence_s: float) -> Self:
        """Connect and shake hands. silence_s: the kernel ends a link whose bytes stay unacknowledged for so long.

        Raises OSError or FabricError.
        """
        began = time.monotonic()
        sock = socket.create_connection((address.host, address.port), timeout=timeout_s)
        try:
            prepare(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(silence_s * 1000))
            left_s = max(0.001, timeout_s - (time.monotonic() - began))
            prove_router(sock, name=address.name, token=address.token, within_s=left_s)
        except BaseException:
            sock.close()
            raise
        return cls(address, sock)
