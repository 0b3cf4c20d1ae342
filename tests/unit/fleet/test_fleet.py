"""Fleet: shards are kept alive, taken over, refused and let go. Without Ray."""

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest

from deploy.fleet import fleet as fleet_module
from deploy.fleet.fleet import Fleet
from deploy.fleet.spec import FleetOverview
from experts.fabric import Membership
from experts.progress import Progress
from tests.support.fake_ray_shards import FakeRayShards, fleet_spec, kill_fleet

pytestmark = pytest.mark.anyio

LEASE_S = 60.0
TIMEOUT_S = 2 * LEASE_S


@pytest.fixture
async def shards() -> FakeRayShards:
    return FakeRayShards()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.1)


async def next_members(fleet: Fleet, having: Membership | None = None) -> Membership:
    members = await fleet.next_membership(
        after=having.epoch if having else 0,
        names=[shard.name for shard in having.shards] if having else [],
        timeout_s=TIMEOUT_S,
    )
    assert members is not None
    return members


async def started(shards: FakeRayShards, *, num_shards: int = 2) -> tuple[Fleet, Membership]:
    """Return a fleet that a router wants, and its first membership."""
    fleet = Fleet("app", lease_s=LEASE_S, shards=shards)
    assert not await fleet.renew("router", ttl_s=LEASE_S)
    assert await fleet.reconcile(fleet_spec(num_shards=num_shards)) == ""
    return fleet, await next_members(fleet)


def names(members: Membership) -> list[str]:
    return [shard.name for shard in members.shards]


async def test_a_shard_that_dies_is_replaced_in_the_next_epoch(shards: FakeRayShards) -> None:
    fleet, first = await started(shards)
    shards.kill(shards.handles[first.shards[1].name])
    second = await next_members(fleet, first)
    assert second.epoch == 2
    assert second.shards[0] == first.shards[0]
    assert second.shards[1].name != first.shards[1].name


async def test_a_shard_that_a_router_lost_is_replaced_only_in_that_epoch(shards: FakeRayShards) -> None:
    fleet, first = await started(shards)
    await fleet.report_lost("router", first.epoch + 1, [0])
    await fleet.report_lost("router", first.epoch, [1])
    second = await next_members(fleet, first)
    assert [old == new for old, new in zip(first.shards, second.shards, strict=True)] == [True, False]


async def test_shards_that_load_are_in_the_overview_and_those_that_do_not_run_yet_keep_nobody_waiting(
    shards: FakeRayShards,
) -> None:
    shards.may_start.clear()
    shards.may_load.clear()
    fleet = Fleet("app", lease_s=LEASE_S, shards=shards)
    await fleet.reconcile(fleet_spec())
    await until(lambda: len(shards.handles) == 2)
    assert (await fleet.overview()).shards == ()
    shards.may_start.set()
    await until(lambda: all(shard.runs for shard in fleet._living()))
    loading = [shard.loading for shard in (await fleet.overview()).shards]
    assert loading == [Progress(1, 2, "experts")] * 2
    shards.may_load.set()
    await next_members(fleet)
    assert [shard.loading for shard in (await fleet.overview()).shards] == [None, None]


# A Fleet after another


async def left_behind(shards: FakeRayShards) -> Membership:
    """Return what a router has of a Fleet that was killed."""
    fleet, members = await started(shards)
    await until(lambda: all(handle.actor.epoch == members.epoch for handle in shards.handles.values()))
    kill_fleet(fleet)
    return members


async def test_a_restarted_fleet_takes_over_what_lives(shards: FakeRayShards) -> None:
    first = await left_behind(shards)
    again = Fleet("app", lease_s=LEASE_S, shards=shards)
    second = await next_members(again, first)
    assert second == dataclasses.replace(first, epoch=2)
    assert await again.reconcile(fleet_spec()) == ""
    assert sorted(shards.handles) == names(first)


async def test_a_fleet_that_finds_no_shard_publishes_above_the_routers_epoch(shards: FakeRayShards) -> None:
    first = await left_behind(shards)
    having = dataclasses.replace(first, epoch=7)
    shards.kill_all()
    again = Fleet("app", lease_s=LEASE_S, shards=shards)
    waiting = asyncio.create_task(next_members(again, having))
    assert await again.reconcile(fleet_spec()) == ""
    assert (await waiting).epoch == 8


async def test_a_fleet_that_finds_only_loading_shards_starts_them_anew(shards: FakeRayShards) -> None:
    fleet, first = await started(shards)
    shards.may_load.clear()
    await fleet.reconcile(fleet_spec(num_shards=3))
    await until(lambda: len(shards.handles) == 3)
    loading = set(shards.handles)
    kill_fleet(fleet)
    again = Fleet("app", lease_s=LEASE_S, shards=shards)
    assert not await again.renew("router", ttl_s=LEASE_S)
    shards.may_load.set()
    assert await again.reconcile(fleet_spec(num_shards=3)) == ""
    second = await next_members(again, dataclasses.replace(first, epoch=7))
    assert second.epoch == 8
    assert not loading & set(names(second))


async def test_a_recovery_that_fails_is_tried_again_by_the_next_call(shards: FakeRayShards) -> None:
    first = await left_behind(shards)
    shards.find_errors = [OSError("no answer")]
    again = Fleet("app", lease_s=LEASE_S, shards=shards)
    with pytest.raises(OSError, match="no answer"):
        await again.overview()
    assert names(await next_members(again, first)) == names(first)


async def test_taking_over_needs_no_checkpoint(
    shards: FakeRayShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await left_behind(shards)
    monkeypatch.setattr(fleet_module, "CheckpointIndex", None)
    again = Fleet("app", lease_s=LEASE_S, shards=shards)
    assert names(await next_members(again, first)) == names(first)


# What is refused


async def refused_and_hopeless(fleet: Fleet) -> tuple[str, str]:
    overview = await fleet.overview()
    assert isinstance(overview, FleetOverview)
    return overview.refused, overview.hopeless


async def test_a_refused_spec_leaves_what_runs(shards: FakeRayShards) -> None:
    fleet, first = await started(shards)
    why = await fleet.reconcile(fleet_spec(num_shards=33))
    assert "experts.shards=33" in why
    assert await refused_and_hopeless(fleet) == (why, "")
    assert sorted(shards.handles) == names(first)


@pytest.mark.parametrize("num_shards", [2, 3], ids=["the running one", "another"])
async def test_a_good_spec_clears_the_refusal(shards: FakeRayShards, num_shards: int) -> None:
    fleet, _ = await started(shards)
    await fleet.reconcile(fleet_spec(num_shards=33))
    assert await fleet.reconcile(fleet_spec(num_shards=num_shards)) == ""
    assert await refused_and_hopeless(fleet) == ("", "")


async def test_a_refused_first_spec_is_hopeless_until_its_checkpoint_is_there(
    shards: FakeRayShards, tmp_path: Path
) -> None:
    fleet = Fleet("app", lease_s=LEASE_S, shards=shards)
    spec = fleet_spec(checkpoint=tmp_path / "late")
    why = await fleet.reconcile(spec)
    assert "late" in why
    assert await refused_and_hopeless(fleet) == ("", why)
    (tmp_path / "late").symlink_to(fleet_spec().checkpoint)
    assert await fleet.reconcile(spec) == ""
    await next_members(fleet)
    assert await refused_and_hopeless(fleet) == ("", "")


# Leases


async def test_a_fleet_that_no_router_comes_to_goes_away_with_its_shards(shards: FakeRayShards) -> None:
    await left_behind(shards)
    shards.find_errors = [OSError("no answer")]  # when it is shut down
    Fleet("app", lease_s=LEASE_S, shards=shards)
    async with asyncio.timeout(TIMEOUT_S):
        await shards.exited.wait()
    assert not shards.handles


async def test_a_router_that_comes_back_while_the_fleet_cannot_stop_is_served_again(
    shards: FakeRayShards,
) -> None:
    fleet, first = await started(shards)
    shards.find_errors = [OSError("no answer") for _ in range(1000)]
    await fleet.renew("router", ttl_s=0)
    await until(lambda: not shards.handles)
    assert not await fleet.renew("router", ttl_s=LEASE_S), "so the router says what it wants"
    assert await fleet.reconcile(fleet_spec()) == ""
    assert (await next_members(fleet, first)).epoch > first.epoch


async def test_shards_are_let_go_when_the_last_router_has_left(shards: FakeRayShards) -> None:
    fleet, members = await started(shards)
    shard = shards.handles[members.shards[0].name].actor
    assert await fleet.renew("router", ttl_s=40)
    await until(lambda: shard.ttl_s == pytest.approx(40, abs=1))
    await fleet.renew("another", ttl_s=15)
    await asyncio.sleep(0.5)
    assert shard.ttl_s == pytest.approx(40, abs=1), "the longest counts"
    for router in ("router", "another"):
        await fleet.renew(router, ttl_s=0.1)
    assert not shards.exited.is_set()
    async with asyncio.timeout(TIMEOUT_S):
        await shards.exited.wait()
    assert not shards.handles


def test_another_log_format_is_no_reason_to_load_shards_anew() -> None:
    assert fleet_spec() == dataclasses.replace(fleet_spec(), log_format="json")
