"""The router's socket to one shard: one frame out, one answer in, under a step's deadlines."""

import logging
import socket
import time
from contextlib import suppress
from typing import NamedTuple, Self

import torch
from torch import Tensor

from experts.fabric import ShardAddress
from experts.fabric.frames import Header, PartialFrame
from experts.fabric.handshake import prove_router
from experts.fabric.sockets import prepare, receive_frame, send_frame, set_kernel_timeout, shut

logger = logging.getLogger(__name__)

ANSWER_GRACE_S = 1.0
"""For the bytes of an answer that is due: reading may begin late, because the links are read one after the other."""


class Patience(NamedTuple):
    """How long a shard may take over the layer at hand: it is reported after slow_s, dead after dead_s."""

    slow_s: float
    dead_s: float


class ShardLink:
    """Used by one thread, except `shut`. Owns its socket and the memory of the shard's last answer."""

    def __init__(self, address: ShardAddress, sock: socket.socket) -> None:
        self.address = address
        self._socket = sock
        self._reply = PartialFrame(pinned=torch.cuda.is_available())
        self._kernel_timeouts: dict[int, float] = {}
        self._owes_answer = False
        self._patience = Patience(0.0, 0.0)
        self._sent_at = 0.0
        self._give_up_at = 0.0
        self._reported_step = -1

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

    @property
    def idle(self) -> bool:
        """Open, and owed nothing: an answer that is still on its way would be taken for the next one."""
        if self._owes_answer:
            return False
        with suppress(BlockingIOError):
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return False  # the end of the stream, or bytes that nobody asked for
        return True

    def send(self, frame: memoryview, patience: Patience) -> None:
        """Raises OSError."""
        self._owes_answer = True
        self._patience = patience
        self._give_up_at = time.monotonic() + patience.dead_s
        self._set_kernel_timeout(socket.SO_SNDTIMEO, patience.dead_s)
        send_frame(self._socket, frame, keep_waiting=self._keep_sending)
        self._sent_at = time.monotonic()

    def receive(self, expected: Header) -> Tensor:
        """The partial sums that answer the last frame: [T, D], this link's memory, until the next receive.

        Raises OSError or FabricError.
        """
        self._reply.shape_for(expected.shape)
        self._expected = expected
        self._give_up_at = max(self._sent_at + self._patience.dead_s, time.monotonic() + ANSWER_GRACE_S)
        self._set_kernel_timeout(socket.SO_RCVTIMEO, self._patience.slow_s)
        receive_frame(self._socket, self._reply, accept=expected.__eq__, keep_waiting=self._keep_receiving)
        self._owes_answer = False
        return self._reply.partial_TD

    def shut(self) -> None:
        """From any thread: the call in progress and all later ones raise."""
        shut(self._socket)

    def close(self) -> None:
        self._socket.close()

    def _keep_sending(self) -> None:
        if time.monotonic() >= self._give_up_at:
            raise TimeoutError(f"took no bytes for {self._patience.dead_s:.3g} s")

    def _keep_receiving(self) -> None:
        now = time.monotonic()
        waited_s = now - self._sent_at
        if now >= self._give_up_at:
            raise TimeoutError(f"no answer for {waited_s:.3g} s")
        if waited_s < self._patience.slow_s:
            return
        if self._reported_step != self._expected.step:
            self._reported_step = self._expected.step
            logger.warning(
                "shard %d (%s) is slow: no answer to step %d, layer %d for %.3g s",
                self.address.rank, self.address.name, self._expected.step, self._expected.layer, waited_s,
            )  # fmt: skip
        self._set_kernel_timeout(socket.SO_RCVTIMEO, self._give_up_at - now)

    def _set_kernel_timeout(self, option: int, seconds: float) -> None:
        if self._kernel_timeouts.get(option) != seconds:
            self._kernel_timeouts[option] = seconds
            set_kernel_timeout(self._socket, option, seconds)
