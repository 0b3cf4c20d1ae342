"""FleetClient: what a router gets to hear while Fleets and shards die. Without Ray."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deploy.fleet import client
from deploy.fleet.client import LAST_WILL_S, FleetClient
from deploy.fleet.fleet import Fleet
from deploy.logs import LogFormat
from experts.fabric import Membership, PeerLost
from tests.support.fake_ray_shards import FakeRayShards, Proxy, fleet_spec, kill_fleet

pytestmark = pytest.mark.anyio

LEASE_S = 60.0
TIMEOUT_S = 120.0
QUIET_S = 300.0
"""A router that does nothing for so long never will: it asks and renews every few seconds."""

LOSS = PeerLost([0], epoch=1, step=0, layer=0, elapsed_s=0.0, why="a test")


class World:
    """One application on a fake Ray. num_fleets: how often a Fleet was started."""

    def __init__(self, *, lease_s: float = LEASE_S) -> None:
        self.shards = FakeRayShards()
        self.num_fleets = 0
        self.heard: list[Membership] = []
        self.link = FleetClient(
            "app", "router", lease_s=lease_s, log_format="text", on_members=self.heard.append
        )
        self._proxy: Any = None

    @property
    def fleet(self) -> Fleet:
        return self._proxy.actor

    def start_fleet(self, app: str, *, lease_s: float, log_format: LogFormat) -> Any:
        if self._proxy is None or self._proxy.died.is_set():
            self.num_fleets += 1
            self._proxy = Proxy(Fleet(app, lease_s=lease_s, log_format=log_format, shards=self.shards))
        return self._proxy

    def kill_fleet(self) -> None:
        self._proxy.died.set()
        kill_fleet(self.fleet)

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                await asyncio.sleep(0.1)

    async def until_heard(self, number: int) -> Membership:
        await self.until(lambda: len(self.heard) >= number)
        return self.heard[-1]


@pytest.fixture
async def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(client, "start_fleet", world.start_fleet)
    return world


def names(members: Membership) -> list[str]:
    return [shard.name for shard in members.shards]


async def test_a_router_hears_of_new_shards_when_the_fleet_and_all_shards_die_together(world: World) -> None:
    await world.link.want(fleet_spec())
    first = await world.until_heard(1)
    await world.link.want(fleet_spec(num_shards=3))
    second = await world.until_heard(2)
    world.kill_fleet()
    world.shards.kill_all()
    third = await world.until_heard(3)
    assert first.epoch < second.epoch < third.epoch
    assert not set(names(second)) & set(names(third))
    await asyncio.sleep(QUIET_S)
    assert len(world.heard) == 3, "and of nothing twice"


async def test_a_router_hears_of_new_shards_when_the_fleet_dies_while_all_are_replaced(world: World) -> None:
    await world.link.want(fleet_spec())
    first = await world.until_heard(1)
    world.shards.may_load.clear()
    await world.link.want(fleet_spec(num_shards=3))
    await world.until(lambda: len(world.shards.handles) == 3)
    world.kill_fleet()
    world.shards.may_load.set()
    second = await world.until_heard(2)
    assert second.epoch > first.epoch
    assert len(second.shards) == 3


async def test_a_router_that_froze_until_its_fleet_was_gone_gets_another(world: World) -> None:
    await world.link.want(fleet_spec())
    first = await world.until_heard(1)
    await world.fleet.shutdown()
    world.kill_fleet()
    assert not world.shards.handles
    assert (await world.until_heard(2)).epoch > first.epoch


async def test_a_failed_reconcile_is_repeated(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    reconcile, failures = Fleet.reconcile, iter([OSError("once"), OSError("twice")])

    async def failing(fleet: Fleet, want: Any) -> str:
        for error in failures:
            raise error
        return await reconcile(fleet, want)

    monkeypatch.setattr(Fleet, "reconcile", failing)
    await world.link.want(fleet_spec())
    await world.until_heard(1)


async def test_a_spec_whose_checkpoint_is_mounted_late_comes_up(world: World, tmp_path: Path) -> None:
    await world.link.want(fleet_spec(checkpoint=tmp_path / "late"))
    await asyncio.sleep(QUIET_S)
    (tmp_path / "late").symlink_to(fleet_spec().checkpoint)
    await world.until_heard(1)


async def test_a_changed_spec_that_is_refused_leaves_what_runs(world: World) -> None:
    await world.link.want(fleet_spec())
    members = await world.until_heard(1)
    await world.link.want(fleet_spec(num_shards=33))

    async def refused() -> str:
        overview = await world.link.overview()
        assert overview is not None
        return overview.refused

    async with asyncio.timeout(TIMEOUT_S):
        while not await refused():
            await asyncio.sleep(0.1)
    assert "experts.shards=33" in await refused()
    assert sorted(world.shards.handles) == names(members)
    await world.link.want(fleet_spec())
    async with asyncio.timeout(TIMEOUT_S):
        while await refused():
            await asyncio.sleep(0.1)
    assert len(world.heard) == 1


async def test_a_loss_is_reported_though_the_fleet_was_too_busy_for_our_lease(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.link.want(fleet_spec())
    first = await world.until_heard(1)
    calls = []

    async def busy(fleet: Fleet, router: str, *, ttl_s: float) -> bool:
        calls.append(router)
        raise TimeoutError

    monkeypatch.setattr(client, "RETRY_S", 2 * TIMEOUT_S)
    monkeypatch.setattr(Fleet, "renew", busy)
    await world.until(lambda: calls)
    await asyncio.sleep(0.05)
    world.link.report_lost(PeerLost([0], epoch=first.epoch, step=0, layer=0, elapsed_s=0.0, why="a test"))
    second = await world.until_heard(2)
    assert [old == new for old, new in zip(first.shards, second.shards, strict=True)] == [False, True]


async def test_a_router_that_leaves_wills_its_shards_a_short_lease(world: World) -> None:
    await world.link.want(fleet_spec())
    members = await world.until_heard(1)
    await world.link.leave()
    shard = world.shards.handles[members.shards[0].name].actor
    await world.until(lambda: shard.ttl_s == pytest.approx(LAST_WILL_S, abs=1))


async def test_only_a_router_that_wants_a_fleet_starts_one(world: World) -> None:
    world.link.report_lost(LOSS)
    await world.link.leave()
    assert world.num_fleets == 0
    await world.link.want(fleet_spec())
    await world.until_heard(1)
    world.kill_fleet()
    await world.link.leave()
    before = world.num_fleets
    world.link.report_lost(LOSS)
    assert await world.link.overview() is None
    await asyncio.sleep(QUIET_S)
    assert world.num_fleets == before
