"""Epochs: every router hears of every membership that it does not have, and of none twice."""

import asyncio

import pytest

from deploy.fleet.epochs import Epochs
from experts.fabric import Membership, ShardAddress
from experts.placement import even_placement

pytestmark = pytest.mark.anyio

PLACEMENT = even_placement((0,), num_layers=1, num_experts=4, num_ranks=2)
SOON_S = 60.0


def addresses(*names: str) -> list[ShardAddress]:
    return [ShardAddress(rank, "host", 1, name, 1, b"") for rank, name in enumerate(names)]


class Asked:
    """A router that remembers what it got."""

    def __init__(self, epochs: Epochs, *, epoch: int = 0, names: tuple[str, ...] = ()) -> None:
        self._epochs, self.epoch, self.names = epochs, epoch, names

    async def next(self, *, timeout_s: float = SOON_S) -> bool:
        members = await self._epochs.next(after=self.epoch, names=self.names, timeout_s=timeout_s)
        if members is not None:
            assert members.epoch > self.epoch
            self.epoch, self.names = members.epoch, tuple(shard.name for shard in members.shards)
        return members is not None


@pytest.fixture
def published() -> list[Membership]:
    return []


@pytest.fixture
def epochs(published: list[Membership]) -> Epochs:
    return Epochs(on_publish=published.append)


async def test_a_router_waits_for_the_first_membership(epochs: Epochs) -> None:
    router = Asked(epochs)
    waiting = asyncio.create_task(router.next(timeout_s=2 * SOON_S))
    await asyncio.sleep(SOON_S)
    await epochs.publish(addresses("a", "b"), PLACEMENT)
    assert await waiting
    assert (router.epoch, router.names) == (1, ("a", "b"))


async def test_what_a_router_has_is_not_published_again(epochs: Epochs, published: list[Membership]) -> None:
    router = Asked(epochs)
    for _ in range(2):
        await epochs.publish(addresses("a", "b"), PLACEMENT)
    assert await router.next()
    assert not await router.next()
    assert [members.epoch for members in published] == [1]


@pytest.mark.parametrize("epoch", [1, 7], ids=["equal", "ahead"])
async def test_a_router_of_another_fleet_gets_the_members_above_its_epoch(epochs: Epochs, epoch: int) -> None:
    await epochs.publish(addresses("c", "d"), PLACEMENT)
    router = Asked(epochs, epoch=epoch, names=("a", "b"))
    assert await router.next()
    assert (router.epoch, router.names) == (epoch + 1, ("c", "d"))
    assert not await router.next()


async def test_what_is_published_while_it_waits_is_above_its_epoch(epochs: Epochs) -> None:
    router = Asked(epochs, epoch=7, names=("a", "b"))
    waiting = asyncio.create_task(router.next(timeout_s=2 * SOON_S))
    await asyncio.sleep(SOON_S)
    await epochs.publish(addresses("c", "d"), PLACEMENT)
    assert await waiting
    assert (router.epoch, router.names) == (8, ("c", "d"))


async def test_two_routers_that_are_ahead_come_to_rest_in_one_epoch(
    epochs: Epochs, published: list[Membership]
) -> None:
    await epochs.publish(addresses("c", "d"), PLACEMENT)
    routers = [Asked(epochs, epoch=7, names=("a", "b")), Asked(epochs, epoch=9, names=("a", "b"))]
    while any([await router.next() for router in routers]):
        assert len(published) < 5
    assert {router.epoch for router in routers} == {10}


async def test_withdrawn_members_are_given_to_nobody(epochs: Epochs) -> None:
    await epochs.publish(addresses("a", "b"), PLACEMENT)
    epochs.withdraw()
    assert not await Asked(epochs).next()
    await epochs.publish(addresses("a", "b"), PLACEMENT)
    router = Asked(epochs)
    assert await router.next()
    assert router.epoch == 2
