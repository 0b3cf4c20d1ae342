"""The router's link to one shard: it sends a layer's frame and receives the answer, under the deadlines of the step."""

import logging
import socket
import time
from typing import NamedTuple, Self

import torch
from torch import Tensor

from experts.fabric import ShardAddress, Waited
from experts.fabric.tcp.frames import BadFrame, LayerFrame, PartialFrame, ShapeHalf, layer_of
from experts.fabric.tcp.handshake import prove_router
from experts.fabric.tcp.open_sockets import OpenSockets
from experts.fabric.tcp.sockets import Deadline, prepare, receive_frame, send_frame, set_kernel_timeout

logger = logging.getLogger(__name__)

SPIN_S = 60e-6
"""The time that a router polls before it sleeps: the round trip of a small layer. After that it gives its core up, since
a shard on the same host may be waiting for one."""

ANSWER_GRACE = 0.1
"""The part of dead_s that a read may take at least: links are read in turn, so a read may begin late."""


class Patience(NamedTuple):
    """The time that a shard may take over one layer: it is reported as slow after slow_s and is dead after dead_s."""

    slow_s: float
    dead_s: float


class ShardLink:
    """A link from the router to one shard, used by one thread, except `waited`.

    It owns its socket, which is one of `sockets`, and the memory of the shard's last answer.
    """

    def __init__(self, address: ShardAddress, sock: socket.socket, sockets: OpenSockets) -> None:
        self.address = address
        self._socket = sock
        self._sockets = sockets
        self._reply = PartialFrame(pinned=torch.cuda.is_available())
        self._owes_answer = False
        self._patience = Patience(slow_s=0.0, dead_s=0.0)
        self._wakes_after_s = 0.0
        self._step = -1
        self._reported = False
        self._began_at = 0.0
        self._sent_at = 0.0
        self._num_answers = 0
        self._waited_s = 0.0

    @classmethod
    def open(cls, address: ShardAddress, sockets: OpenSockets, *, timeout_s: float) -> Self:
        """Connect to a shard and shake hands. Raises OSError or FabricError."""
        deadline = Deadline(timeout_s)
        sock = sockets.connect(address, timeout_s=timeout_s)
        try:
            prepare(sock)
            prove_router(sock, name=address.name, token=address.token, within_s=deadline.left_s())
        except BaseException:
            sockets.close(sock)
            raise
        return cls(address, sock, sockets)

    @property
    def idle(self) -> bool:
        """Return whether the link is open and no answer is outstanding.

        A late answer would be taken for the answer to the next layer.
        """
        if self._owes_answer:
            return False
        try:
            self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        except OSError:  # a reset, or a host that cannot be reached any more
            return False
        return False  # the end of the stream, or bytes that were not asked for

    def begin(self, step: int, patience: Patience) -> None:
        """Set the step and the deadlines of the layers that follow."""
        self._step = step
        self._reported = False
        if patience != self._patience:
            self._patience = patience
            set_kernel_timeout(self._socket, socket.SO_SNDTIMEO, patience.dead_s)
        self._wake_after(patience.slow_s)

    def send(self, request: LayerFrame) -> None:
        """Send a layer's frame. Raises OSError."""
        self._owes_answer = True
        self._began_at = time.monotonic()
        send_frame(self._socket, request.frame, keep_waiting=self._keep_sending)
        self._sent_at = time.monotonic()

    def receive(self, request: LayerFrame) -> Tensor:
        """Return the partial sums that answer this request: [T, D] in this link's memory, valid until the next receive.

        Raises OSError or FabricError.
        """
        reply = self._reply
        if reply.shape != request.shape:
            reply.lay_out(request.shape)
        self._awaiting = request
        self._began_at = time.monotonic()
        receive_frame(
            self._socket, reply, accept=_no_other_shape, keep_waiting=self._keep_receiving, spin_s=SPIN_S
        )
        if reply.step_half != request.step_half:
            raise BadFrame("an answer to another layer")
        self._owes_answer = False
        self._num_answers += 1
        self._waited_s += time.monotonic() - self._began_at
        return reply.partial_TD

    def waited(self) -> Waited:
        """Return the answers that came and the seconds waited for them. From any thread."""
        return Waited(self._num_answers, self._waited_s)

    def close(self) -> None:
        """Close the socket."""
        self._sockets.close(self._socket)

    def _keep_sending(self) -> None:
        if time.monotonic() >= self._began_at + self._patience.dead_s:
            raise TimeoutError(f"took no bytes for {self._patience.dead_s:.3g} s")

    def _keep_receiving(self) -> None:
        now = time.monotonic()
        waited_s = now - self._sent_at
        slow_s, dead_s = self._patience
        give_up_at = max(self._sent_at + dead_s, self._began_at + dead_s * ANSWER_GRACE)
        if now >= give_up_at:
            raise TimeoutError(f"no answer for {waited_s:.3g} s")
        if waited_s < slow_s:
            self._wake_after(slow_s - waited_s)
            return
        self._wake_after(give_up_at - now)
        if not self._reported:
            self._reported = True
            who, layer = f"shard {self.address.rank} ({self.address.name})", layer_of(self._awaiting)
            logger.warning(
                "%s is slow: no answer for %.3g s to step %d, layer %d", who, waited_s, self._step, layer
            )

    def _wake_after(self, seconds: float) -> None:
        """Have a receive that gets nothing for this long call _keep_receiving."""
        if seconds != self._wakes_after_s:
            self._wakes_after_s = seconds
            set_kernel_timeout(self._socket, socket.SO_RCVTIMEO, seconds)


def _no_other_shape(_: ShapeHalf) -> bool:
    """Refuse every other frame: the reply's buffer is laid out for the only one that may come."""
    return False
