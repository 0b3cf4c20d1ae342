"""Fabric `tcp`, the router's end: a star of sockets, one per shard. link.py is the shard's end, frames.py the format.

A layer costs two system calls per shard: one send of a frame that all shards get, one receive of the shard's answer.
Nothing can deadlock: a shard answers only what it has read to its end, and no shard has two frames at a time, so
whenever this end blocks in a send, the other end reads. T tokens, D hidden, K top-k.
"""

import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from experts.fabric import FabricError, Membership, PeerLost, ShardAddress, StepHeader, Ticket
from experts.fabric.frames import FrameShape, LayerFrame, write_moment
from experts.fabric.shard_link import Patience, ShardLink

ROWS_PER_DEADLINE = 256
WARMING = Patience(slow_s=600.0, dead_s=600.0)


class TcpFabric:
    """See Fabric. out_TD may be of any dtype and on any device, like x_TD; after a PeerLost its content is undefined.

    hidden: D, even. wire_dtype: of x and of the partial sums on the wire, float32 or bfloat16.
    slow_after_s, dead_after_s: for a layer of up to 256 rows; T rows may take T / 256 times as long. A warming step
        has 10 minutes per layer. A shard's link that ends is a loss at once.
    """

    def __init__(
        self, *, hidden: int, wire_dtype: torch.dtype, slow_after_s: float, dead_after_s: float
    ) -> None:
        self._hidden = hidden
        self._wire_dtype = wire_dtype
        self._slow_after_s = slow_after_s
        self._dead_after_s = dead_after_s
        self._links: dict[int, ShardLink] = {}
        self._lost: dict[int, str] = {}
        self._ranks: tuple[int, ...] = ()
        self._lock = threading.Lock()  # abort shuts sockets down, nobody closes one meanwhile
        self._aborted: str | None = None
        self._header = StepHeader(epoch=0, step=-1, rows=0)
        self._request = LayerFrame(pinned=torch.cuda.is_available())
        self._dispatched_at = 0.0
        with torch.inference_mode(False):  # written inside and outside that mode
            self._sum_TD = torch.empty(0)

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        began = time.monotonic()
        with self._lock:
            self._aborted = None
        self._ranks = tuple(shard.rank for shard in members.shards)
        self._header = StepHeader(epoch=members.epoch, step=-1, rows=0)
        stale = [r for r, link in self._links.items() if not (link.idle and link.address in members.shards)]
        self._drop(stale)
        missing = [shard for shard in members.shards if shard.rank not in self._links]
        opened, self._lost = _open_links(missing, timeout_s=timeout_s, silence_s=self._dead_after_s)
        with self._lock:
            self._links = dict(sorted({**self._links, **opened}.items()))
        self._raise_if_aborted()
        if self._lost:
            raise self._peer_lost(layer=-1, since=began)

    def begin(self, header: StepHeader) -> None:
        """Nothing crosses the wire: every layer's frame says which step it belongs to."""
        self._raise_if_aborted()
        assert header.epoch == self._header.epoch, (header, self._header)
        self._header = header
        scale = max(1.0, header.rows / ROWS_PER_DEADLINE)
        patience = Patience(self._slow_after_s * scale, self._dead_after_s * scale)
        for link in self._links.values():
            link.begin(header.step, WARMING if header.warming else patience)

    def dispatch(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> Ticket:
        self._raise_if_aborted()
        self._dispatched_at = time.monotonic()
        request = self._request
        rows, hidden = x_TD.shape
        shape = FrameShape(rows, hidden, phys_TK.shape[1], self._wire_dtype)
        if shape != request.shape:
            assert hidden == self._hidden, (hidden, self._hidden)
            request.lay_out(shape)
            request.form[:] = request.known_form
            self._sum_TD.resize_(request.x_TD.shape)
        request.x_TD.copy_(x_TD)
        request.phys_TK.copy_(phys_TK)
        request.w_TK.copy_(w_TK)
        write_moment(request, epoch=self._header.epoch, step=self._header.step, layer=layer)
        for rank, link in self._links.items():
            try:
                link.send(request)
            except OSError as error:
                self._lost[rank] = str(error)
        return Ticket(layer=layer, rows=rows)

    def combine(self, ticket: Ticket, out_TD: Tensor) -> None:
        """Reads every living shard's answer, even after a loss, so that their links are clean for the next epoch."""
        partials: list[Tensor] = []
        for rank, link in self._links.items():
            if rank in self._lost:
                continue
            try:
                partials.append(link.receive(self._request))
            except (OSError, FabricError) as error:
                self._lost[rank] = str(error)
        self._raise_if_aborted(ticket.layer)
        if self._lost:
            self._drop(self._lost)
            raise self._peer_lost(layer=ticket.layer, since=self._dispatched_at)
        _sum_in_float32(partials, self._sum_TD, out_TD)

    def abort(self, reason: str) -> None:
        with self._lock:
            self._aborted = self._aborted or reason
            for link in self._links.values():
                link.shut()

    def close(self) -> None:
        self.abort("the fabric is closed")
        self._drop(self._links)

    def _drop(self, ranks: Iterable[int]) -> None:
        with self._lock:
            for rank in list(ranks):
                if rank in self._links:
                    self._links.pop(rank).close()

    def _raise_if_aborted(self, layer: int = -1) -> None:
        if self._aborted is not None:
            self._lost = dict.fromkeys(self._ranks, self._aborted)
            raise self._peer_lost(layer=layer, since=time.monotonic())

    def _peer_lost(self, *, layer: int, since: float) -> PeerLost:
        return PeerLost(
            sorted(self._lost),
            epoch=self._header.epoch,
            step=self._header.step,
            layer=layer,
            elapsed_s=time.monotonic() - since,
            why="; ".join(f"shard {rank}: {why}" for rank, why in sorted(self._lost.items())),
        )


def _sum_in_float32(partials: Sequence[Tensor], sum_TD: Tensor, out_TD: Tensor) -> None:
    """out_TD = the sum in order, rounded once to its dtype. sum_TD: scratch on the host.

    Two partials of out_TD's dtype need no scratch: a kernel adds bfloat16 in float32 and rounds once, too.
    """
    if len(partials) == 2 and out_TD.dtype == partials[0].dtype and out_TD.is_cpu:
        torch.add(partials[0], partials[1], out=out_TD)
        return
    sum_TD.copy_(partials[0])
    for partial_TD in partials[1:]:
        sum_TD.add_(partial_TD)
    out_TD.copy_(sum_TD)


def _open_links(
    shards: Sequence[ShardAddress], *, timeout_s: float, silence_s: float
) -> tuple[dict[int, ShardLink], dict[int, str]]:
    """All at once, so that one dead host costs one time-out. Returns the links, and why the others failed, by rank."""
    links: dict[int, ShardLink] = {}
    lost: dict[int, str] = {}
    if not shards:
        return links, lost
    with ThreadPoolExecutor(len(shards)) as pool:
        futures = {
            shard: pool.submit(ShardLink.open, shard, timeout_s=timeout_s, silence_s=silence_s)
            for shard in shards
        }
    for shard, future in futures.items():
        try:
            links[shard.rank] = future.result()
        except (OSError, FabricError) as error:
            lost[shard.rank] = f"cannot reach {shard.name} at {shard.host}:{shard.port}: {error}"
    return links, lost
