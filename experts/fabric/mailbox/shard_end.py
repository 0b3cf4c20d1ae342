"""The shard's end of a mailbox's link: it runs whole steps as their headers come, until its router goes.

T rows of a step, D hidden, K top-k.
"""

import logging
import queue
import socket
import threading
from typing import NamedTuple

import torch

from experts.fabric import FabricError, LinkedShard
from experts.fabric.mailbox.control import Control, Kind
from experts.fabric.mailbox.host import HostShardLane
from experts.fabric.mailbox.region import LaneShape
from experts.fabric.mailbox.words import StopWord
from experts.fabric.tcp.sockets import set_kernel_timeout, shut

logger = logging.getLogger(__name__)

OPEN_S = 5.0
"""Seconds in which a router that has proved itself has to hand its regions over."""

MAX_REGION_BYTES = 1 << 30
"""The largest region that a shard maps: a router names its size."""

FOR_GOOD = 2**62
"""A stop that ends every step."""

DTYPES = {1: torch.float32, 2: torch.bfloat16}


class _Step(NamedTuple):
    """The header of a step. posted: the rows that the router lays out, of which `rows` are real."""

    epoch: int
    step: int
    first: int
    rows: int
    posted: int


def serve_mailbox(sock: socket.socket, shard: LinkedShard) -> None:
    """Serve a router that has proved itself and opens a mailbox, until it goes. The socket is the caller's, to close.

    Raises FabricError for what the router did wrong, and OSError when it goes.
    """
    if shard.device.type != "cpu":
        raise FabricError("a shard on a GPU serves no mailbox yet")
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        set_kernel_timeout(sock, option, 0)
    sock.settimeout(OPEN_S)
    control = Control(sock)
    shape = _opened(control.receive(), shard)
    outbox, inbox = control.receive_regions(shape.outbox_bytes, shape.inbox_bytes)
    sock.settimeout(None)
    stop = StopWord(pinned=False)
    steps: queue.SimpleQueue[_Step | None] = queue.SimpleQueue()
    reader = threading.Thread(
        target=_read,
        args=(control, stop, steps),
        name=f"{threading.current_thread().name}-reader",
        daemon=True,
    )
    try:
        lane = HostShardLane(shape, outbox, inbox, stop)
        control.send(Kind.READY)
        reader.start()
        while (step := steps.get()) is not None:
            _serve_step(control, shard, lane, shape, stop, step)
    finally:
        shut(sock)
        if reader.ident is not None:
            reader.join()
        for region in (outbox, inbox):
            region.close()


def _opened(message: tuple, shard: LinkedShard) -> LaneShape:
    """Return the lane that an OPEN message asks for. Raises FabricError for one that this shard cannot serve."""
    kind, (rows, hidden, top_k, code, layers), _ = message
    if kind is not Kind.OPEN or code not in DTYPES:
        raise FabricError(f"a mailbox must be opened first, with a dtype: {message}")
    shape = LaneShape(rows, hidden, top_k, DTYPES[code])
    if (hidden, layers) != (shard.shape.hidden, len(shard.shape.moe_layers)):
        raise FabricError(
            f"the router has {layers} MoE layers of hidden size {hidden}, this shard "
            f"{len(shard.shape.moe_layers)} of {shard.shape.hidden}"
        )
    if not (rows >= 1 and 1 <= top_k <= 64 and shape.outbox_bytes <= MAX_REGION_BYTES):
        raise FabricError(f"no lane has {rows} rows with a top-k of {top_k}")
    return shape


def _read(control: Control, stop: StopWord, steps: "queue.SimpleQueue[_Step | None]") -> None:
    """Hand on headers, and stop what runs: when the router says so, and for good when it is gone."""
    try:
        while True:
            kind, numbers, _ = control.receive()
            if kind is Kind.STEP:
                steps.put(_Step(*numbers))
            elif kind is Kind.STOP:
                stop.raise_to(numbers[0])
            else:
                raise FabricError(f"a router sends no {kind.name}")
    except (OSError, FabricError) as error:
        logger.info("%s: %s", threading.current_thread().name, error)
    finally:
        stop.raise_to(FOR_GOOD)
        steps.put(None)


def _serve_step(
    control: Control,
    shard: LinkedShard,
    lane: HostShardLane,
    shape: LaneShape,
    stop: StopWord,
    step: _Step,
) -> None:
    """Compute every layer of a step, and say that its work has ended. Raises FabricError if a layer fails."""
    x_TD = torch.empty(step.posted, shape.hidden, dtype=shard.dtype)
    ids_TK = torch.empty(step.posted, shape.top_k, dtype=torch.int32)
    w_TK = torch.empty(step.posted, shape.top_k)
    partial_TD = torch.empty_like(x_TD)
    lane.begin(first=step.first, rows=step.rows)
    for position, layer in enumerate(shard.shape.moe_layers):
        lane.take(position, x_TD, ids_TK, w_TK)
        if stop.value >= step.first + position:
            break
        try:
            shard.forward(layer, x_TD, ids_TK, w_TK, out_TD=partial_TD)
        except Exception as error:  # whatever a kernel raises, the router has to hear of it
            logger.exception("shard %d: layer %d failed", shard.rank, layer)
            sentence = f"{type(error).__name__}: {error}"
            control.send(Kind.FAILED, step.first, layer, sentence=sentence)
            raise FabricError(sentence) from error
        lane.post(position, partial_TD)
    control.send(Kind.DRAINED, step.first)
