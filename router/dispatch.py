"""Dispatcher: from the gate's logical experts to the sum of the shards' partial outputs.

T tokens, D hidden, K top-k, L layers, E logical experts.
"""

import torch
from torch import Tensor

from experts.fabric import Fabric, Membership, StepHeader


class Dispatcher:
    """What a MoE layer of the trunk calls. Lives in the engine's thread."""

    def __init__(self, fabric: Fabric, *, device: torch.device) -> None:
        self._fabric = fabric
        self._device = device
        self._members: Membership | None = None
        self._primary_LE = torch.empty(0)

    @property
    def epoch(self) -> int:
        """Of the membership in use; 0 before the first."""
        return self._members.epoch if self._members else 0

    @property
    def members(self) -> Membership:
        """In use; not before the first."""
        assert self._members is not None
        return self._members

    def adopt(self, members: Membership, *, timeout_s: float) -> None:
        """Enter an epoch; between steps only. Raises PeerLost or Aborted."""
        self._fabric.connect(members, timeout_s=timeout_s)
        self._members = members
        self._primary_LE = torch.from_numpy(members.placement.primary_LE).to(self._device)

    def begin(self, *, step: int, rows: int) -> None:
        """Announce a step of `rows` tokens to every shard."""
        self._fabric.begin(StepHeader(epoch=self.epoch, step=step, rows=rows))

    def moe(self, layer: int, x_TD: Tensor, logical_TK: Tensor, w_TK: Tensor) -> Tensor:
        """Choose copies, dispatch, combine: the routed experts' output [T, D] in x's dtype. Raises as combine does.

        logical_TK: any integer dtype; w_TK: any float dtype, weights of the top-k.
        """
        phys_TK = self._primary_LE[layer].take(logical_TK.long())
        ticket = self._fabric.dispatch(layer, x_TD, phys_TK, w_TK.float())
        out_TD = torch.empty_like(x_TD)
        self._fabric.combine(ticket, out_TD)
        return out_TD
