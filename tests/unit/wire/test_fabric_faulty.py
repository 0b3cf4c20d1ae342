"""Fabric `faulty`: faults are data, and strike once."""

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest
import torch

from experts.fabric import Membership, PeerLost, ShardFailed
from experts.fabric.faulty import Failed, Fault, FaultyFabric, Lost, Slow, Unreachable
from tests.support.fake_shard import (
    addresses_of,
    begin,
    fake_shards,
    in_process,
    layer_input,
    listening,
    members_of,
    tcp_fabric,
    through,
)

SHARDS = fake_shards(2)
GIVEN = layer_input(3)


@contextmanager
def faulty(*faults: Fault) -> Iterator[tuple[FaultyFabric, Membership]]:
    """Yield a faulty fabric over tcp, in epoch 1."""
    with listening(SHARDS) as listeners, closing(FaultyFabric(tcp_fabric(), faults)) as fabric:
        yield fabric, members_of(addresses_of(listeners), epoch=1)


def test_a_lost_shard_stays_lost_until_connect_and_is_lost_once() -> None:
    with faulty(Lost(rank=1, step=3, layer=2)) as (fabric, members):
        fabric.connect(members, timeout_s=5)
        for step in (2, 3):
            begin(fabric, step=step)
            through(fabric, 0, GIVEN)
        with pytest.raises(PeerLost, match="lost shard 1 at epoch 1, step 3, layer 2") as lost:
            through(fabric, 2, GIVEN)
        assert lost.value.ranks == (1,)
        with pytest.raises(PeerLost):
            through(fabric, 3, GIVEN)
        fabric.connect(members, timeout_s=5)
        begin(fabric, step=3)
        assert torch.equal(through(fabric, 2, GIVEN), in_process(SHARDS, 2, GIVEN))
        assert fabric.pending == []


def test_a_shard_that_failed_is_named_unless_another_is_lost() -> None:
    faults = (Failed(rank=0, step=0, layer=1), Lost(rank=1, step=0, layer=2))
    with faulty(*faults) as (fabric, members):
        fabric.connect(members, timeout_s=5)
        begin(fabric)
        with pytest.raises(ShardFailed, match="living shard 0 at epoch 1, step 0, layer 1") as failed:
            through(fabric, 1, GIVEN)
        assert failed.value.ranks == (0,)
        with pytest.raises(PeerLost) as lost:
            through(fabric, 2, GIVEN)
        assert lost.value.ranks == (1,)
        fabric.connect(members, timeout_s=5)
        begin(fabric)
        assert torch.equal(through(fabric, 1, GIVEN), in_process(SHARDS, 1, GIVEN))


def test_a_slow_layer_is_slow_once_and_right() -> None:
    with faulty(Slow(seconds=0.1, step=0, layer=1)) as (fabric, members):
        fabric.connect(members, timeout_s=5)
        begin(fabric)
        began = time.monotonic()
        assert torch.equal(through(fabric, 1, GIVEN), in_process(SHARDS, 1, GIVEN))
        assert time.monotonic() - began >= 0.1
        assert fabric.pending == []


def test_an_unreachable_shard_is_reached_at_the_second_try() -> None:
    with faulty(Unreachable(rank=0, epoch=1), Unreachable(rank=1, epoch=2)) as (fabric, members):
        with pytest.raises(PeerLost) as lost:
            fabric.connect(members, timeout_s=5)
        assert lost.value.ranks == (0,)
        fabric.connect(members, timeout_s=5)
        begin(fabric)
        assert torch.equal(through(fabric, 0, GIVEN), in_process(SHARDS, 0, GIVEN))
        assert fabric.pending == [Unreachable(rank=1, epoch=2)]
