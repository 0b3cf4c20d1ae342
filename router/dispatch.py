"""Dispatcher: the engine's one object of the wire, from the gate's logical experts to the sum of the shards' partial outputs.

T tokens, D hidden, K top-k, L layers, E logical experts.
"""

import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from experts.fabric import Aborted, Fabric, Membership, PeerLost, StepFailed, StepHeader

logger = logging.getLogger(__name__)

LINK_TIMEOUT_S = 10.0
"""Seconds to open the links of a new epoch: its shards listen already when it is published."""


class Dispatcher:
    """The router's end of the fabric, and the epoch it is in. Lives in the engine's thread, but for `close`.

    linked: the shards of the newest epoch are linked, and a step may run. in_graph: a CUDA graph may hold `moe`.
    """

    def __init__(
        self, fabric: Fabric, *, device: torch.device, on_lost: Callable[[StepFailed], None]
    ) -> None:
        """on_lost: told, in the engine's thread, which shards failed whenever `linked` becomes false."""
        self.linked = False
        self.in_graph = fabric.in_graph
        self._fabric = fabric
        self._device = device
        self._on_lost = on_lost
        self._unlinked_at = time.monotonic()
        self._members: Membership | None = None
        self._primary_LE: Tensor | None = None  # int32 on the device; never moves once it is there

    @property
    def epoch(self) -> int:
        """The epoch of the membership in use; 0 before the first."""
        return self._members.epoch if self._members else 0

    @property
    def away_s(self) -> float:
        """Seconds since the shards were lost, or since the start; 0 while they are linked."""
        return 0.0 if self.linked else time.monotonic() - self._unlinked_at

    # Between steps

    def adopt(self, members: Membership) -> None:
        """Enter an epoch: link its shards. Where that fails, `linked` stays or becomes false and on_lost hears of it."""
        try:
            self._fabric.connect(members, timeout_s=LINK_TIMEOUT_S)
        except PeerLost as loss:
            self.lose(loss)
            return
        except Aborted:
            return
        self._members = members
        self._write_placement(torch.from_numpy(members.placement.primary_LE))
        self.linked = True
        logger.info("epoch %d: %d shards linked", members.epoch, len(members.shards))

    def _write_placement(self, primary_LE: Tensor) -> None:
        """Write the placement in place: captured graphs read the table where it stood when they were captured."""
        if self._primary_LE is None:
            with torch.inference_mode(False):  # an inference tensor could not be written outside that mode
                self._primary_LE = torch.empty_like(primary_LE, device=self._device)
        assert self._primary_LE.shape == primary_LE.shape, (self._primary_LE.shape, primary_LE.shape)
        self._primary_LE.copy_(primary_LE)

    def renew(self) -> None:
        """Enter the same epoch again: links that still owe an answer are made anew."""
        assert self._members is not None
        self.adopt(self._members)

    def lose(self, loss: StepFailed) -> None:
        """Give the shards of this epoch up: no step runs before the next epoch."""
        logger.warning("%s", loss)
        if self.linked:
            self._unlinked_at = time.monotonic()
        self.linked = False
        self._on_lost(loss)

    def close(self) -> None:
        """Close every link, from any thread: the pending call raises Aborted, and so do all later ones."""
        self._fabric.close()

    # In a step

    def begin(self, *, step: int, rows: int) -> None:
        """Announce a step of `rows` tokens to every shard."""
        self._fabric.begin(StepHeader(epoch=self.epoch, step=step, rows=rows))

    def moe(self, layer: int, x_TD: Tensor, logical_TK: Tensor, w_TK: Tensor) -> Tensor:
        """Dispatch to the shards and combine: the routed experts' output [T, D] in x's dtype. Raises as Fabric.combine does.

        logical_TK: the top-k experts, any integer dtype; w_TK: their weights, any float dtype.
        """
        assert self._primary_LE is not None
        phys_TK = self._primary_LE[layer].take(logical_TK.long())
        ticket = self._fabric.dispatch(layer, x_TD, phys_TK, w_TK.float())
        out_TD = torch.empty_like(x_TD)
        self._fabric.combine(ticket, out_TD)
        return out_TD
