"""Lanes on a CPU: the calling thread copies and waits itself. They are the reference for the kernels of device.py.

T rows of a step, D hidden, K top-k.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from experts.fabric.mailbox import words
from experts.fabric.mailbox.region import LaneShape, Region
from experts.fabric.mailbox.words import StopWord
from experts.placement import EMPTY


class HostRouterLane:
    """The router's end of a lane."""

    def __init__(self, shape: LaneShape, outbox: Region, stop: StopWord) -> None:
        self._outbox, self._stop = outbox, stop
        self._x_TD = outbox.tensor(shape.x_offset, shape.rows, shape.hidden, shape.dtype)
        self._ids_TK = outbox.tensor(shape.ids_offset, shape.rows, shape.top_k, torch.int32)
        self._w_TK = outbox.tensor(shape.weights_offset, shape.rows, shape.top_k, torch.float32)
        self._shape = shape

    def begin(self, *, first: int, rows: int, inboxes: Sequence[Region]) -> None:
        """Start a step. first: the flag of its first layer. rows: how many are real; what is posted may have more.

        inboxes: those of the shards that answer, in rank order.
        """
        shape = self._shape
        self._first, self._rows = first, rows
        self._flags = [inbox.address for inbox in inboxes]
        self._partials = [
            inbox.tensor(shape.x_offset, shape.rows, shape.hidden, shape.dtype) for inbox in inboxes
        ]

    def post(self, position: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> None:
        """Lay out the rows of the MoE layer at this position, and raise the flag. Rows that are not real go to no expert."""
        num_rows = len(x_TD)
        self._x_TD[:num_rows].copy_(x_TD)
        self._ids_TK[:num_rows].copy_(phys_TK)
        self._ids_TK[self._rows : num_rows] = EMPTY
        self._w_TK[:num_rows].copy_(w_TK)
        _raise(self._outbox.address, self._stop, self._first + position)

    def take_sum(self, position: int, own_TD: Tensor | None, out_TD: Tensor) -> None:
        """Wait for the partial sums of all shards and write their sum: added in float32 in rank order, rounded once.

        own_TD: those of a rank before all others, in the wire's dtype. After a stop out_TD is garbage.
        """
        sum_TD = torch.zeros(out_TD.shape) if own_TD is None else own_TD.to(torch.float32, copy=True)
        for flag, partial_TD in zip(self._flags, self._partials, strict=True):
            words.wait(flag, self._stop.address, self._first + position)
            sum_TD += partial_TD[: len(out_TD)]
        out_TD.copy_(sum_TD)


class HostShardLane:
    """The shard's end of a lane."""

    def __init__(self, shape: LaneShape, outbox: Region, inbox: Region, stop: StopWord) -> None:
        self._outbox, self._inbox, self._stop = outbox, inbox, stop
        self._x_TD = outbox.tensor(shape.x_offset, shape.rows, shape.hidden, shape.dtype)
        self._ids_TK = outbox.tensor(shape.ids_offset, shape.rows, shape.top_k, torch.int32)
        self._w_TK = outbox.tensor(shape.weights_offset, shape.rows, shape.top_k, torch.float32)
        self._partial_TD = inbox.tensor(shape.x_offset, shape.rows, shape.hidden, shape.dtype)

    def begin(self, *, first: int, rows: int) -> None:
        """Start a step. first: the flag of its first layer. rows: how many are real."""
        self._first, self._rows = first, rows

    def take(self, position: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor) -> None:
        """Wait for the rows of the MoE layer at this position and copy them. After a stop they are garbage."""
        words.wait(self._outbox.address, self._stop.address, self._first + position)
        num_rows = len(x_TD)
        x_TD.copy_(self._x_TD[:num_rows])
        ids_TK.copy_(self._ids_TK[:num_rows])
        ids_TK[self._rows :] = EMPTY
        w_TK.copy_(self._w_TK[:num_rows])

    def post(self, position: int, partial_TD: Tensor) -> None:
        """Lay out the partial sums of that layer, and raise the flag."""
        self._partial_TD[: len(partial_TD)].copy_(partial_TD)
        _raise(self._inbox.address, self._stop, self._first + position)


def _raise(flag: int, stop: StopWord, value: int) -> None:
    if stop.value < value:
        words.write(flag, value)
