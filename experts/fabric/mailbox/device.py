"""Lanes on a GPU: the operations of host.py as kernels on the current stream. A CUDA graph may hold all but `begin`.

T rows of a step, D hidden, K top-k.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from experts.fabric.mailbox import kernels as triton_kernels
from experts.fabric.mailbox.region import LaneShape, Region
from experts.fabric.mailbox.words import StopWord

kernels: Any = triton_kernels  # calls of Triton's language are not Python's

MAX_PEERS = 16
"""Most shards that answer one lane."""

BLOCK = 2048
"""Elements that a block copies: 16 bytes for each of 256 threads."""

BLOCK_K = 256
"""Ids and weights that a block copies. A block of x has at most so many: rows are no shorter than 8 elements an id."""

_WIRE = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class _Table:
    """The table that kernels read: written in stream order at the beginning of a step, from pinned memory that is then at rest."""

    def __init__(self, device: torch.device) -> None:
        size = kernels.PEERS.value + 2 * MAX_PEERS
        with torch.inference_mode(False):
            self._staged = torch.zeros(size, dtype=torch.int64, pin_memory=True)
            self.device = torch.zeros(size, dtype=torch.int64, device=device)
            self.arrived = torch.zeros(1, dtype=torch.int32, device=device)

    def write(self, values: Sequence[int]) -> None:
        """Write the entries. The stream must have done with those of the step before."""
        self._staged[: len(values)] = torch.tensor(values, dtype=torch.int64)
        self.device.copy_(self._staged, non_blocking=True)


class DeviceRouterLane:
    """The router's end of a lane on a GPU; see HostRouterLane for the contract of each operation."""

    def __init__(self, shape: LaneShape, outbox: Region, stop: StopWord, *, device: torch.device) -> None:
        """outbox: registered, as all inboxes must be. stop: pinned."""
        _check(shape)
        self._shape, self._outbox, self._stop = shape, outbox, stop
        self._table = _Table(device)

    def begin(self, *, first: int, rows: int, inboxes: Sequence[Region]) -> None:
        """Start a step, whose predecessor's work on the stream has ended."""
        assert len(inboxes) <= MAX_PEERS, len(inboxes)
        peers = [
            place for inbox in inboxes for place in (inbox.address, inbox.address + self._shape.x_offset)
        ]
        self._table.write(_entries(self._shape, self._outbox, self._stop, first, rows, peers))

    def post(self, position: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor) -> None:
        """See HostRouterLane. x_TD: contiguous, in the wire's dtype; phys_TK int32, w_TK float32, contiguous."""
        num_rows, hidden = x_TD.shape
        kernels.post_rows[_blocks(num_rows, hidden)](
            table=self._table.device,
            position=position,
            x_TD=x_TD,
            ids_TK=phys_TK,
            w_TK=w_TK,
            arrived=self._table.arrived,
            num_rows=num_rows,
            D=hidden,
            K=phys_TK.shape[1],
            BLOCK=BLOCK,
            BLOCK_K=BLOCK_K,
            num_warps=8,
        )

    def take_sum(self, position: int, own_TD: Tensor | None, out_TD: Tensor) -> None:
        """See HostRouterLane. own_TD, out_TD: contiguous."""
        num_rows, hidden = out_TD.shape
        kernels.wait_for_inboxes[(1,)](table=self._table.device, position=position, num_warps=1)
        kernels.sum_partials[_blocks(num_rows, hidden)](
            table=self._table.device,
            own_TD=out_TD if own_TD is None else own_TD,
            out_TD=out_TD,
            num_rows=num_rows,
            D=hidden,
            WIRE=_WIRE[self._shape.dtype],
            OWN=own_TD is not None,
            BLOCK=BLOCK,
            num_warps=8,
        )


class DeviceShardLane:
    """The shard's end of a lane on a GPU; see HostShardLane for the contract of each operation."""

    def __init__(
        self, shape: LaneShape, outbox: Region, inbox: Region, stop: StopWord, *, device: torch.device
    ) -> None:
        """outbox, inbox: registered. stop: pinned."""
        _check(shape)
        self._shape, self._outbox, self._inbox, self._stop = shape, outbox, inbox, stop
        self._table = _Table(device)

    def begin(self, *, first: int, rows: int) -> None:
        """Start a step, whose predecessor's work on the stream has ended."""
        peers = [self._inbox.address, self._inbox.address + self._shape.x_offset]
        self._table.write(_entries(self._shape, self._outbox, self._stop, first, rows, peers))

    def take(self, position: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor) -> None:
        """See HostShardLane. All tensors contiguous."""
        num_rows, hidden = x_TD.shape
        kernels.wait_for_outbox[(1,)](table=self._table.device, position=position, num_warps=1)
        kernels.fetch_rows[_blocks(num_rows, hidden)](
            table=self._table.device,
            x_TD=x_TD,
            ids_TK=ids_TK,
            w_TK=w_TK,
            num_rows=num_rows,
            D=hidden,
            K=ids_TK.shape[1],
            BLOCK=BLOCK,
            BLOCK_K=BLOCK_K,
            num_warps=8,
        )

    def post(self, position: int, partial_TD: Tensor) -> None:
        """See HostShardLane. partial_TD: contiguous, in the wire's dtype."""
        num_rows, hidden = partial_TD.shape
        kernels.post_partial[_blocks(num_rows, hidden)](
            table=self._table.device,
            position=position,
            partial_TD=partial_TD,
            arrived=self._table.arrived,
            D=hidden,
            BLOCK=BLOCK,
            num_warps=8,
        )


def _entries(
    shape: LaneShape, outbox: Region, stop: StopWord, first: int, rows: int, peers: Sequence[int]
) -> list[int]:
    """Return the table's entries in the order that kernels.py names. A step that is stopped already raises no flag."""
    x, ids, weights = shape.x_offset, shape.ids_offset, shape.weights_offset
    places = [outbox.address + offset for offset in (0, x, ids, weights)]
    stopped = int(stop.value >= first)
    return [first, rows, stop.address, *places, stopped, len(peers) // 2, *peers]


def _blocks(num_rows: int, hidden: int) -> tuple[int]:
    return (triton.cdiv(num_rows * hidden, BLOCK),)


def _check(shape: LaneShape) -> None:
    """Raise ValueError for sizes that the kernels cannot copy 16 bytes at a time, or whose ids do not fit a block."""
    if shape.hidden % 8 or shape.hidden * BLOCK_K < shape.top_k * BLOCK:
        raise ValueError(
            f"fabric mailbox needs a hidden size that is a multiple of 8 and at least {BLOCK // BLOCK_K} times the top-k, "
            f"not {shape.hidden} with a top-k of {shape.top_k}"
        )
