"""Keeper: where the shards of a fleet go, and how fast those that fail are started again. Without Ray."""

import asyncio

import pytest

from deploy.fleet import keeper as keeper_module
from deploy.fleet.fleet import Fleet
from deploy.fleet.keeper import STEADY_S, failures
from deploy.fleet.nodes import Seat
from deploy.fleet.spec import FleetOverview
from tests.support.fake_ray_shards import FakeRayShards, fleet_spec

pytestmark = pytest.mark.anyio

TIMEOUT_S = 120.0
LEASE_S = 3600.0


async def running(shards: FakeRayShards, *, num_shards: int, gpus: float = 0) -> Fleet:
    fleet = Fleet("app", lease_s=LEASE_S, shards=shards)
    await fleet.reconcile(fleet_spec(num_shards=num_shards, gpus=gpus))
    return fleet


async def overview_with(fleet: Fleet, text: str, *, rank: int) -> FleetOverview:
    async with asyncio.timeout(TIMEOUT_S):
        while text not in (overview := await fleet.overview()).problems.get(rank, ""):
            await asyncio.sleep(0.1)
    return overview


async def test_shards_do_not_all_take_the_same_room() -> None:
    shards = FakeRayShards(gpus={"a": 2, "b": 1})
    shards.may_start.clear()
    shards.may_load.clear()
    await running(shards, num_shards=3, gpus=1)
    await asyncio.sleep(keeper_module.START_LIMIT_S / 2)
    taken = [handle.actor._node for handle in shards.handles.values()]
    assert sorted(taken) == ["a", "a", "b"]


async def test_a_shard_that_runs_is_left_to_rays_own_numbers() -> None:
    shards = FakeRayShards(gpus={"a": 2})
    fleet = await running(shards, num_shards=2, gpus=1)
    assert await fleet.next_membership(after=0, names=[], timeout_s=TIMEOUT_S)
    assert fleet._seats() == [Seat("a"), Seat("a")]


async def test_a_shard_without_room_says_so() -> None:
    fleet = await running(FakeRayShards(gpus={"a": 1}), num_shards=1, gpus=2)
    await overview_with(fleet, "waits for a node: none has {'GPU': 2", rank=0)


async def test_a_shard_that_ray_does_not_start_says_so_and_is_given_up() -> None:
    shards = FakeRayShards()
    shards.may_start.clear()
    fleet = await running(shards, num_shards=1)
    await overview_with(fleet, "waits for Ray to start its process on node node", rank=0)
    await overview_with(fleet, "Ray has not started its process on node node", rank=0)
    shards.may_start.set()
    members = await fleet.next_membership(after=0, names=[], timeout_s=TIMEOUT_S)
    assert members is not None
    assert len(shards.started) > 1
    assert not (await fleet.overview()).problems


async def test_a_checkpoint_that_cannot_be_loaded_is_hopeless_while_other_ranks_load() -> None:
    shards = FakeRayShards()

    def damaged(name: str) -> None:
        if "shard-1" in name:
            raise ValueError("layer 3 is damaged")

    shards.at_load = damaged
    fleet = await running(shards, num_shards=2)
    overview = await overview_with(fleet, "does not start: layer 3 is damaged", rank=1)
    assert overview.hopeless == "layer 3 is damaged"
    assert 0 not in overview.problems


async def test_shards_that_die_when_they_have_loaded_are_started_ever_more_slowly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(keeper_module, "PAUSES_S", (0.0, 0.0, 0.0, 60.0))
    shards = FakeRayShards()
    fleet = await running(shards, num_shards=1)
    for _ in range(3):
        async with asyncio.timeout(TIMEOUT_S):
            while (await fleet.overview()).problems or not shards.handles:
                await asyncio.sleep(0.1)
        shards.kill_all()
        await asyncio.sleep(50)
    assert len(shards.started) == 3


def test_a_shard_that_lived_well_was_no_failure() -> None:
    assert failures(3, lived_s=STEADY_S + 1) == 0
    assert failures(3, lived_s=1) == 4
