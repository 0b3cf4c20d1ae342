"""Fabric `faulty`: another fabric that plays given faults, each of them once. It is for tests."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from experts.fabric import Fabric, Membership, PeerLost, ShardFailed, StepHeader, Ticket, Waited


@dataclass(frozen=True)
class Lost:
    """`combine` of this layer raises PeerLost for the rank, and so does every one after it, until `connect`."""

    rank: int
    step: int
    layer: int


@dataclass(frozen=True)
class Failed:
    """`combine` of this layer raises ShardFailed for the rank, and so does every one after it, until `connect`."""

    rank: int
    step: int
    layer: int


@dataclass(frozen=True)
class Slow:
    """`combine` of this layer takes this many seconds longer."""

    seconds: float
    step: int
    layer: int


@dataclass(frozen=True)
class Unreachable:
    """`connect` to this epoch raises PeerLost for the rank, after the other ranks were connected."""

    rank: int
    epoch: int


Fault = Lost | Failed | Slow | Unreachable


class FaultyFabric:
    """A fabric that passes every call to `inner` and then plays the faults, so the inner links stay clean.

    pending: the faults that have not struck yet.
    """

    in_graph = False

    def __init__(self, inner: Fabric, faults: Sequence[Fault]) -> None:
        self.pending = list(faults)
        self._inner = inner
        self._header = StepHeader(epoch=0, step=-1, rows=0)
        self._lost: set[int] = set()
        self._failed: set[int] = set()

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        self._header = StepHeader(epoch=members.epoch, step=-1, rows=0)
        self._lost.clear()
        self._failed.clear()
        self._inner.connect(members, timeout_s=timeout_s)
        for fault in self._take(
            lambda fault: isinstance(fault, Unreachable) and fault.epoch == members.epoch
        ):
            self._play(fault)
        self._raise_if_due(layer=-1)

    def begin(self, header: StepHeader) -> None:
        self._header = header
        self._inner.begin(header)

    def dispatch(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> Ticket:
        return self._inner.dispatch(layer, x_TD, phys_TK, w_TK)

    def combine(self, ticket: Ticket, out_TD: Tensor) -> None:
        self._inner.combine(ticket, out_TD)
        here = (self._header.step, ticket.layer)
        for fault in self._take(
            lambda fault: isinstance(fault, Lost | Failed | Slow) and (fault.step, fault.layer) == here
        ):
            self._play(fault)
        self._raise_if_due(layer=ticket.layer)

    def waited(self) -> Mapping[int, Waited]:
        return self._inner.waited()

    def abort(self, reason: str) -> None:
        self._inner.abort(reason)

    def close(self) -> None:
        self._inner.close()

    def _take(self, due: Callable[[Fault], bool]) -> list[Fault]:
        taken = [fault for fault in self.pending if due(fault)]
        self.pending = [fault for fault in self.pending if fault not in taken]
        return taken

    def _play(self, fault: Fault) -> None:
        if isinstance(fault, Slow):
            time.sleep(fault.seconds)
        elif isinstance(fault, Failed):
            self._failed.add(fault.rank)
        else:
            self._lost.add(fault.rank)

    def _raise_if_due(self, *, layer: int) -> None:
        for error, ranks in ((PeerLost, self._lost), (ShardFailed, self._failed)):
            if ranks:
                raise error(
                    sorted(ranks),
                    epoch=self._header.epoch,
                    step=self._header.step,
                    layer=layer,
                    elapsed_s=0.0,
                    why="played by a test",
                )
