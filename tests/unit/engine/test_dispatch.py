"""Dispatcher: from logical experts to the sum of the shards, and the epoch that it is in."""

import numpy as np
import torch

from experts.fabric import Aborted, Membership, PeerLost, StepFailed, StepHeader, Ticket, Waited
from experts.fabric.local import local_membership
from experts.placement import ExpertPlacement
from router.dispatch import Dispatcher

CPU = torch.device("cpu")


class FakeFabric:
    """A fabric that answers with the sum of weights times physical ids, and fails to connect when it is told to."""

    in_graph = False

    def __init__(self) -> None:
        self.fails: PeerLost | Aborted | None = None
        self.headers: list[StepHeader] = []
        self._sent: tuple[torch.Tensor, torch.Tensor] = torch.empty(0), torch.empty(0)

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        if self.fails:
            raise self.fails

    def begin(self, header: StepHeader) -> None:
        self.headers.append(header)

    def dispatch(self, layer: int, x_TD: torch.Tensor, phys_TK: torch.Tensor, w_TK: torch.Tensor) -> Ticket:
        assert w_TK.dtype == torch.float32
        self._sent = phys_TK, w_TK
        return Ticket(layer=layer, rows=len(x_TD))

    def combine(self, ticket: Ticket, out_TD: torch.Tensor) -> None:
        phys_TK, w_TK = self._sent
        out_TD.copy_((phys_TK * w_TK).sum(-1, keepdim=True).expand(out_TD.shape))

    def waited(self) -> dict[int, Waited]:
        return {}

    def abort(self, reason: str) -> None: ...

    def close(self) -> None: ...


def members(*slots_LP: list[int], epoch: int) -> Membership:
    """One rank with these slots of each layer."""
    slots = np.array(slots_LP, np.int32)
    return local_membership(ExpertPlacement(slots, slots_per_rank=slots.shape[1]), epoch=epoch)


def lost(epoch: int) -> PeerLost:
    return PeerLost([0], epoch=epoch, step=3, layer=1, elapsed_s=0.1, why="played by a test")


def test_rows_go_to_the_first_slot_of_their_experts() -> None:
    dispatcher = Dispatcher(FakeFabric(), device=CPU, on_lost=lambda loss: None)
    dispatcher.adopt(members([2, 0, 1, 0], [1, 1, 2, 0], epoch=1))
    logical_TK, w_TK = torch.tensor([[0, 1], [2, 0]]), torch.tensor([[1.0, 0.5], [2.0, 3.0]]).bfloat16()
    x_TD = torch.zeros(2, 3, dtype=torch.bfloat16)
    first, second = (dispatcher.moe(layer, x_TD, logical_TK, w_TK) for layer in (0, 1))
    assert first.dtype == x_TD.dtype
    assert first[:, 0].tolist() == [1 * 1 + 2 * 0.5, 0 * 2 + 1 * 3]
    assert second[:, 0].tolist() == [3 * 1 + 0 * 0.5, 2 * 2 + 3 * 3]


def test_the_placement_never_moves_in_memory() -> None:
    """Captured graphs read it where it stood when they were captured: a table made anew would be freed under them."""
    dispatcher = Dispatcher(FakeFabric(), device=CPU, on_lost=lambda loss: None)
    with torch.inference_mode():
        dispatcher.adopt(members([0, 1, 2], epoch=1))
    table_LE = dispatcher._primary_LE
    assert table_LE is not None
    dispatcher.renew()
    assert table_LE.tolist() == [[0, 1, 2]]
    dispatcher.adopt(members([2, 1, 0], epoch=2))
    assert dispatcher._primary_LE is table_LE
    assert table_LE.tolist() == [[2, 1, 0]]


def test_an_epoch_that_cannot_be_entered_leaves_the_links_down_and_tells_of_it() -> None:
    fabric, losses = FakeFabric(), list[StepFailed]()
    dispatcher = Dispatcher(fabric, device=CPU, on_lost=losses.append)
    assert dispatcher.epoch == 0
    assert not dispatcher.linked
    fabric.fails = lost(epoch=1)
    dispatcher.adopt(members([0, 1], epoch=1))
    assert (losses, dispatcher.linked) == ([fabric.fails], False)
    fabric.fails = None
    dispatcher.adopt(members([0, 1], epoch=2))
    assert (dispatcher.linked, dispatcher.epoch, dispatcher.away_s) == (True, 2, 0.0)
    fabric.fails = Aborted("the fabric is closed")
    dispatcher.adopt(members([0, 1], epoch=3))
    assert (len(losses), dispatcher.epoch) == (1, 2), "an abort is nobody's loss"


def test_a_step_is_announced_with_the_epoch_in_use() -> None:
    fabric = FakeFabric()
    dispatcher = Dispatcher(fabric, device=CPU, on_lost=lambda loss: None)
    dispatcher.adopt(members([0, 1], epoch=7))
    dispatcher.begin(step=4, rows=9)
    assert fabric.headers == [StepHeader(epoch=7, step=4, rows=9)]
