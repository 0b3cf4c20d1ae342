"""The router's end of fabric `tcp`: one socket per shard. shard_end.py is the shard's end, frames.py the wire format.

A shard on the router's own host is reached over a Unix socket, which moves the same frames in half the time.

A layer costs two system calls per shard: one send of a frame that all shards get, one receive of the shard's answer.
Nothing can deadlock: a shard answers only what it has read to its end, and no shard has two frames at a time, so
whenever this end blocks in a send, the other end reads. T tokens, D hidden, K top-k.
"""

import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from experts.fabric import (
    FabricError,
    Membership,
    PeerLost,
    ShardFailed,
    StepHeader,
    Ticket,
    Waited,
)
from experts.fabric.tcp.frames import FrameShape, LayerFrame, write_step_half
from experts.fabric.tcp.open_sockets import OpenSockets, open_links
from experts.fabric.tcp.shard_link import Patience, ShardLink
from experts.fabric.tcp.sockets import PeerError

logger = logging.getLogger(__name__)

ROWS_PER_DEADLINE = 256
"""The rows of a layer up to which its deadlines are slow_after_s and dead_after_s; with more they grow in proportion."""

CLOSE_S = 5.0
"""The time that `close` waits for a call whose sockets it has shut."""


class TcpFabric:
    """A Fabric over sockets. x_TD and out_TD may have any dtype and device; after an error out_TD is undefined.

    hidden: D, even. wire_dtype: of x and of the partial sums on the wire, float32 or bfloat16; frames.max_rows says
        how many rows a layer may have.
    slow_after_s, dead_after_s: for a layer of up to 256 rows; T rows may take T / 256 times as long.
        A link that ends is a loss at once.
    """

    in_graph = False

    def __init__(
        self, *, hidden: int, wire_dtype: torch.dtype, slow_after_s: float, dead_after_s: float
    ) -> None:
        self._hidden = hidden
        self._wire_dtype = wire_dtype
        self._slow_after_s = slow_after_s
        self._dead_after_s = dead_after_s
        self._sockets = OpenSockets()
        self._one_call = threading.Lock()  # by this `close` waits for the call that it has ended
        self._links: dict[int, ShardLink] = {}
        self._lost: dict[int, str] = {}
        self._failed: dict[int, str] = {}
        self._header = StepHeader(epoch=0, step=-1, rows=0)
        self._request = LayerFrame(pinned=torch.cuda.is_available())
        self._dispatched_at = 0.0
        with torch.inference_mode(False):  # the sum is written inside and outside that mode
            self._sum_TD = torch.empty(0)

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        with self._one_call:
            self._sockets.allow()
            began = time.monotonic()
            self._header = StepHeader(epoch=members.epoch, step=-1, rows=0)
            self._failed = {}
            self._drop(
                r for r, link in self._links.items() if not (link.idle and link.address in members.shards)
            )
            missing = [shard for shard in members.shards if shard.rank not in self._links]
            opened, self._lost = open_links(
                missing, lambda shard: ShardLink.open(shard, self._sockets, timeout_s=timeout_s)
            )
            self._links = dict(sorted({**self._links, **opened}.items()))
            self._sockets.check()
            self._raise_if(PeerLost, self._lost, layer=-1, since=began)

    def begin(self, header: StepHeader) -> None:
        """Set the step and the deadlines of the layers that follow.

        Nothing is sent: each layer's frame names its step.
        """
        with self._one_call:
            self._sockets.check()
            assert header.epoch == self._header.epoch, (header, self._header)
            self._header = header
            scale = max(1.0, header.rows / ROWS_PER_DEADLINE)
            patience = Patience(self._slow_after_s * scale, self._dead_after_s * scale)
            for link in self._links.values():
                link.begin(header.step, patience)

    def dispatch(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> Ticket:
        with self._one_call:
            self._sockets.check()
            self._dispatched_at = time.monotonic()
            self._fill_request(layer, x_TD, phys_TK, w_TK)
            for rank, link in self._links.items():
                try:
                    link.send(self._request)
                except OSError as error:
                    self._lost[rank] = str(error)
        return Ticket(layer=layer, rows=x_TD.shape[0])

    def combine(self, ticket: Ticket, out_TD: Tensor) -> None:
        with self._one_call:
            partials = self._receive_all()
            self._sockets.check()
            self._raise_if(PeerLost, self._lost, layer=ticket.layer, since=self._dispatched_at)
            self._raise_if(ShardFailed, self._failed, layer=ticket.layer, since=self._dispatched_at)
            _sum_in_float32(partials, self._sum_TD, out_TD)

    def waited(self) -> Mapping[int, Waited]:
        return {rank: link.waited() for rank, link in list(self._links.items())}

    def abort(self, reason: str) -> None:
        self._sockets.abort(reason, for_ever=False)

    def close(self) -> None:
        self._sockets.abort("the fabric is closed", for_ever=True)
        if not self._one_call.acquire(timeout=CLOSE_S):
            logger.warning("a call still runs %.0f s after its sockets were shut: they stay open", CLOSE_S)
            return
        try:
            self._drop(self._links)
        finally:
            self._one_call.release()

    def _fill_request(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> None:
        request = self._request
        rows, hidden = x_TD.shape
        shape = FrameShape(rows, hidden, phys_TK.shape[1], self._wire_dtype)
        if shape != request.shape:
            assert hidden == self._hidden, (hidden, self._hidden)
            request.lay_out(shape)
            request.shape_half[:] = request.laid_out_shape_half
            self._sum_TD.resize_(request.x_TD.shape)
        request.x_TD.copy_(x_TD)
        request.phys_TK.copy_(phys_TK)
        request.w_TK.copy_(w_TK)
        write_step_half(request, epoch=self._header.epoch, step=self._header.step, layer=layer)

    def _receive_all(self) -> list[Tensor]:
        """Read every living shard's answer, even after a loss, so that their links are clean for the next epoch."""
        partials: list[Tensor] = []
        for rank, link in self._links.items():
            if rank in self._lost:
                continue
            try:
                partials.append(link.receive(self._request))
            except PeerError as error:
                self._failed[rank] = str(error)
            except (OSError, FabricError) as error:
                self._lost[rank] = str(error)
        return partials

    def _drop(self, ranks: Iterable[int]) -> None:
        for rank in list(ranks):
            if rank in self._links:
                self._links.pop(rank).close()

    def _raise_if(
        self, error: type[PeerLost | ShardFailed], whys: Mapping[int, str], *, layer: int, since: float
    ) -> None:
        """Raise the error for these ranks, if there are any.

        The links of all lost and failed ranks are closed before.
        """
        if whys:
            self._drop([*self._lost, *self._failed])
            raise error(
                sorted(whys),
                epoch=self._header.epoch,
                step=self._header.step,
                layer=layer,
                elapsed_s=time.monotonic() - since,
                why="; ".join(f"shard {rank}: {why}" for rank, why in sorted(whys.items())),
            )


def _sum_in_float32(partials: Sequence[Tensor], sum_TD: Tensor, out_TD: Tensor) -> None:
    """Set out_TD to the sum of the partials in order, rounded once to its dtype. sum_TD: float32 scratch on the host.

    Two partials of out_TD's dtype need no scratch: torch.add also adds bfloat16 in float32 and rounds once.
    """
    if len(partials) == 2 and out_TD.dtype == partials[0].dtype and out_TD.is_cpu:
        torch.add(partials[0], partials[1], out=out_TD)
        return
    sum_TD.copy_(partials[0])
    for partial_TD in partials[1:]:
        sum_TD.add_(partial_TD)
    out_TD.copy_(sum_TD)
