"""Fabric `local`: it converts what a wire would convert, and ends as a wire ends."""

import pytest
import torch

from experts.fabric import Aborted
from experts.fabric.local import LocalFabric, local_membership
from tests.support.fake_shard import CPU, begin
from tests.support.in_process import placement_of, shards_of
from tests.support.places import DEMO_MODEL

MEMBERS = local_membership(placement_of(DEMO_MODEL, 2))
IDS_TK = torch.tensor([[0, 5], [3, 1], [2, 9]], dtype=torch.int32)
W_TK = torch.tensor([[0.25, 0.75]]).repeat(3, 1)


def linked(dtype: torch.dtype) -> LocalFabric:
    fabric = LocalFabric(shards_of(DEMO_MODEL, 2, "torch", dtype, CPU))
    fabric.connect(MEMBERS, timeout_s=1)
    return fabric


def rows(dtype: torch.dtype) -> torch.Tensor:
    hidden = shards_of(DEMO_MODEL, 2, "torch", dtype, CPU)[0].shape.hidden
    return torch.randn(3, hidden, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize(
    ("trunk", "shard"),
    [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=["bf16 shards", "bf16 trunk"],
)
def test_shards_compute_in_their_own_dtype(trunk: torch.dtype, shard: torch.dtype) -> None:
    fabric, x_TD = linked(shard), rows(trunk)
    out_TD = torch.full_like(x_TD, torch.nan)
    fabric.combine(fabric.dispatch(0, x_TD, IDS_TK, W_TK), out_TD)
    as_the_wire_does = torch.zeros(x_TD.shape)
    for one in shards_of(DEMO_MODEL, 2, "torch", shard, CPU):
        partial_TD = torch.empty(x_TD.shape, dtype=shard)
        one.forward(0, x_TD.to(shard), IDS_TK, W_TK, out_TD=partial_TD)
        as_the_wire_does += partial_TD
    assert torch.equal(out_TD, as_the_wire_does.to(trunk))


def test_after_abort_every_call_raises_until_connect_and_after_close_for_ever() -> None:
    fabric, x_TD = linked(torch.float32), rows(torch.float32)
    ticket = fabric.dispatch(0, x_TD, IDS_TK, W_TK)
    fabric.abort("the operator said so")
    for call in (
        lambda: fabric.combine(ticket, torch.empty_like(x_TD)),
        lambda: begin(fabric),
        lambda: fabric.dispatch(0, x_TD, IDS_TK, W_TK),
    ):
        with pytest.raises(Aborted, match="the operator said so"):
            call()
    fabric.connect(MEMBERS, timeout_s=1)
    fabric.combine(fabric.dispatch(0, x_TD, IDS_TK, W_TK), torch.empty_like(x_TD))
    fabric.close()
    with pytest.raises(Aborted, match="the fabric is closed"):
        fabric.connect(MEMBERS, timeout_s=1)


def test_one_shard_of_the_same_dtype_writes_into_the_callers_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = shards_of(DEMO_MODEL, 1, "torch", torch.float32, CPU)
    fabric, x_TD = LocalFabric([shard]), rows(torch.float32)
    fabric.connect(local_membership(placement_of(DEMO_MODEL, 1)), timeout_s=1)
    out_TD, written = torch.empty_like(x_TD), []
    monkeypatch.setattr(shard, "forward", lambda *args, out_TD: written.append(out_TD))
    fabric.combine(fabric.dispatch(0, x_TD, IDS_TK, W_TK), out_TD)
    assert len(written) == 1
    assert written[0] is out_TD
