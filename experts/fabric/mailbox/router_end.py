"""Fabric `mailbox`, the router's end: one outbox for all shards, an inbox and a control socket for each.

`begin` sends a step's header to every shard, which starts its step then. `dispatch` posts and `combine` takes the sum; neither
looks at sockets. What goes wrong raises the stop, so that they run through on garbage, and `end` tells of it: nothing of a
step counts before. Only shards of this host so far, and CPUs at both ends.

T rows of a step, D hidden, K top-k.
"""

import logging
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from experts.fabric import (
    FabricError,
    Membership,
    PeerLost,
    ShardAddress,
    ShardFailed,
    StepHeader,
    Ticket,
    Waited,
)
from experts.fabric.mailbox import words
from experts.fabric.mailbox.control import Control, Kind
from experts.fabric.mailbox.host import HostRouterLane
from experts.fabric.mailbox.region import LaneShape, Region
from experts.fabric.mailbox.shard_end import DTYPES
from experts.fabric.mailbox.words import StopWord
from experts.fabric.tcp.handshake import prove_router
from experts.fabric.tcp.open_sockets import OpenSockets, open_links
from experts.fabric.tcp.sockets import Deadline, prepare, shut

logger = logging.getLogger(__name__)

LOOK_S = 0.02
"""Seconds between two looks at the flags of a step that runs."""

ROWS_PER_DEADLINE = 256
"""A layer of T rows may take T / 256 times as long as a deadline says, if that is more."""

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class _Link:
    """The link to one shard. drained: the first flag of the newest step whose work has ended there."""

    def __init__(self, address: ShardAddress, sock: socket.socket, control: Control, inbox: Region) -> None:
        self.address, self.socket, self.control, self.inbox = address, sock, control, inbox
        self.drained = 0
        self.num_answers = 0
        self.seconds = 0.0


class MailboxFabric:
    """See Fabric. One thread calls it, but for `waited`, `abort` and `close`.

    slow_after_s, dead_after_s: how long a shard may take over a layer of up to 256 rows, from the moment its rows are
    posted. One clock for all shards: as many as hang are lost together.
    """

    in_graph = False

    def __init__(
        self, shape: LaneShape, *, moe_layers: Sequence[int], slow_after_s: float, dead_after_s: float
    ) -> None:
        """shape: of every step; its dtype is that of the wire and of the shards. moe_layers: ascending."""
        self._shape = shape
        self._position = {layer: position for position, layer in enumerate(moe_layers)}
        self._slow_after_s, self._dead_after_s = slow_after_s, dead_after_s
        self._outbox = Region.create(shape.outbox_bytes)
        self._stop = StopWord(pinned=False)
        self._lane = HostRouterLane(shape, self._outbox, self._stop)
        self._sockets = OpenSockets()
        self._changed = threading.Condition()  # guards all below
        self._links: dict[int, _Link] = {}
        self._lost: dict[int, str] = {}
        self._failed: dict[int, str] = {}
        self._header = StepHeader(epoch=0, step=-1, rows=0)
        self._first = self._next = 1
        self._running = self._closed = False
        self._began_at = 0.0
        self._watch = threading.Thread(target=self._watch_steps, name="mailbox-watch", daemon=True)
        self._watch.start()

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        """See Fabric.connect."""
        self._sockets.allow()
        began = time.monotonic()
        with self._changed:
            self._header = StepHeader(epoch=members.epoch, step=-1, rows=0)
            stay = {
                rank
                for rank, link in self._links.items()
                if link.address in members.shards and rank not in self._lost and rank not in self._failed
            }
            self._drop(self._links.keys() - stay)
            self._lost, self._failed = {}, {}
            missing = [shard for shard in members.shards if shard.rank not in self._links]
        opened, lost = open_links(missing, lambda shard: self._open_one(shard, timeout_s=timeout_s))
        with self._changed:
            self._links = dict(sorted({**self._links, **opened}.items()))
            self._lost |= lost
            for link in opened.values():
                link.drained = self._first
                name = f"mailbox-link-{link.address.rank}"
                threading.Thread(target=self._read, args=(link,), name=name, daemon=True).start()
        self._sockets.check()
        self._raise_if(PeerLost, self._lost, since=began)

    def begin(self, header: StepHeader) -> None:
        """Send the header to every shard, once all have said that the work of the step before has ended."""
        self._sockets.check()
        with self._changed:
            assert header.epoch == self._header.epoch, (header, self._header)
            self._header = header
            self._wait_until_drained()
            self._first = self._next
            self._next += len(self._position)
            self._began_at = time.monotonic()
            links = list(self._links.values())
            self._lane.begin(first=self._first, rows=header.rows, inboxes=[link.inbox for link in links])
            self._running = True
            if self._lost or self._failed:  # since the last step
                self._stop_step()
            self._changed.notify_all()
        self._posted = 0

    def dispatch(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> Ticket:
        """Lay out the rows. The first layer's number of rows is that of the step."""
        if not self._posted:
            self._posted = len(x_TD)
            self._send_headers(self._posted)
        self._lane.post(self._position[layer], x_TD, phys_TK, w_TK)
        return Ticket(layer=layer, rows=len(x_TD))

    def combine(self, ticket: Ticket, out_TD: Tensor) -> None:
        """Wait for all shards' partial sums and add them. out_TD is garbage if the step is stopped: see `end`."""
        self._lane.take_sum(self._position[ticket.layer], None, out_TD)

    def end(self) -> None:
        """Say whether the step counts. Raises one PeerLost for all ranks that were lost, or one ShardFailed, or Aborted."""
        with self._changed:
            self._running = False
        self._sockets.check()
        self._raise_if(PeerLost, self._lost, since=self._began_at)
        self._raise_if(ShardFailed, self._failed, since=self._began_at)

    def waited(self) -> Mapping[int, Waited]:
        """See Fabric.waited: steps that each shard has drained, and the seconds since their headers were sent."""
        return {rank: Waited(link.num_answers, link.seconds) for rank, link in list(self._links.items())}

    def abort(self, reason: str) -> None:
        """See Fabric.abort."""
        self._sockets.abort(reason, for_ever=False)
        with self._changed:
            self._stop_step()

    def close(self) -> None:
        """See Fabric.close."""
        self._sockets.abort("the fabric is closed", for_ever=True)
        with self._changed:
            self._stop_step()
            self._closed = True
            self._changed.notify_all()
            self._drop(list(self._links))
        self._watch.join()
        self._outbox.close()

    # Links

    def _open_one(self, address: ShardAddress, *, timeout_s: float) -> _Link:
        deadline = Deadline(timeout_s)
        sock = self._sockets.connect(address, timeout_s=timeout_s)
        inbox = Region.create(
            self._shape.inbox_bytes
        )  # a new one for every link: an earlier peer may still write
        try:
            if sock.family != socket.AF_UNIX:
                raise FabricError("fabric mailbox reaches shards of the router's own host only")
            prepare(sock)
            prove_router(sock, name=address.name, token=address.token, within_s=deadline.left_s())
            sock.settimeout(deadline.left_s())
            control, shape = Control(sock), self._shape
            control.send(
                Kind.OPEN, shape.rows, shape.hidden, shape.top_k, _CODES[shape.dtype], len(self._position)
            )
            control.send_regions(self._outbox, inbox)
            if (answer := control.receive()).kind is not Kind.READY:
                raise FabricError(f"it answered {answer}")
            sock.settimeout(None)
        except BaseException:
            inbox.close()
            self._sockets.close(sock)
            raise
        return _Link(address, sock, control, inbox)

    def _drop(self, ranks: Iterable[int]) -> None:
        for rank in list(ranks):
            if (link := self._links.pop(rank, None)) is not None:
                shut(link.socket)  # its reader closes it

    def _read(self, link: _Link) -> None:
        """Follow what a shard says, until its socket is at its end."""
        try:
            while True:
                kind, (first, *_), sentence = link.control.receive()
                with self._changed:
                    if kind is Kind.DRAINED:
                        link.drained = first
                        link.num_answers += 1
                        link.seconds += time.monotonic() - self._began_at
                        self._changed.notify_all()
                    elif kind is Kind.FAILED:
                        self._note(link, sentence, self._failed)
                    else:
                        raise FabricError(f"a shard sends no {kind.name}")
        except (OSError, FabricError) as error:
            with self._changed:
                self._note(link, str(error), self._lost)
        finally:
            self._sockets.close(link.socket)
            link.inbox.close()

    def _note(self, link: _Link, why: str, whys: dict[int, str]) -> None:
        """Note what became of a shard, if it is still one of ours, and stop the step."""
        rank = link.address.rank
        if self._links.get(rank) is link and rank not in self._failed and rank not in self._lost:
            whys[rank] = why
            self._stop_step()
            self._changed.notify_all()

    # Steps

    def _send_headers(self, posted: int) -> None:
        header = self._header
        for rank, link in list(self._links.items()):
            try:
                link.control.send(Kind.STEP, header.epoch, header.step, self._first, header.rows, posted)
            except OSError as error:
                with self._changed:
                    self._note(link, str(error), self._lost)
                    assert rank in self._lost or rank in self._failed

    def _wait_until_drained(self) -> None:
        """Wait for the work of the step before; shards that do not end it in time are lost."""

        def late() -> list[_Link]:
            gone = self._lost.keys() | self._failed.keys()
            return [
                link for rank, link in self._links.items() if rank not in gone and link.drained < self._first
            ]

        self._changed.wait_for(lambda: not late() or self._sockets.aborted is not None, self._dead_after_s)
        for link in late():
            self._note(link, f"did not end a step within {self._dead_after_s:.3g} s", self._lost)

    def _stop_step(self) -> None:
        """Let every wait of the step return, here and at the shards."""
        last = self._next - 1
        self._stop.raise_to(last)
        for link in self._links.values():
            try:
                link.control.send(Kind.STOP, last)
            except OSError:
                continue  # its reader finds that out, too

    def _watch_steps(self) -> None:
        """Own the deadlines: a shard is late only while the outbox's flag is up and its inbox's is not."""
        since, seen, told = 0.0, (0, 0), set[int]()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._running or self._closed, None)
                if self._closed:
                    return
                posted, now = words.read(self._outbox.address), time.monotonic()
                if (self._first, posted) != seen:
                    since, seen, told = now, (self._first, posted), set()
                if posted >= self._first and self._stop.value < posted:
                    self._look(posted, now - since, told)
                self._changed.wait(LOOK_S)

    def _look(self, posted: int, late_s: float, told: set[int]) -> None:
        """Report shards that are slow over a layer, and give up those that are dead."""
        scale = max(1.0, self._header.rows / ROWS_PER_DEADLINE)
        for rank, link in list(self._links.items()):
            if words.read(link.inbox.address) >= posted:
                continue
            layer = list(self._position)[posted - self._first]
            if late_s >= self._dead_after_s * scale:
                self._note(link, f"no answer for {late_s:.3g} s", self._lost)
            elif late_s >= self._slow_after_s * scale and rank not in told:
                told.add(rank)
                logger.warning(
                    "shard %d (%s) is slow: no answer for %.3g s to step %d, layer %d",
                    *(rank, link.address.name, late_s, self._header.step, layer),
                )

    def _raise_if(
        self, error: type[PeerLost | ShardFailed], whys: Mapping[int, str], *, since: float
    ) -> None:
        """Raise the error for these ranks, if there are any, whose links then are no more."""
        with self._changed:
            if not whys:
                return
            posted = words.read(self._outbox.address)
            layers = list(self._position)
            layer = layers[posted - self._first] if posted >= self._first and self._header.step >= 0 else -1
            failure = error(
                sorted(whys),
                epoch=self._header.epoch,
                step=self._header.step,
                layer=layer,
                elapsed_s=time.monotonic() - since,
                why="; ".join(f"shard {rank}: {why}" for rank, why in sorted(whys.items())),
            )
            self._drop([*self._lost, *self._failed])
        raise failure
