"""Epochs: publishes the membership of the expert shards, each under a higher epoch, to the routers that wait."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from experts.fabric import Membership, ShardAddress
from experts.placement import ExpertPlacement


class Epochs:
    """The newest membership, and the routers that wait for the next one.

    An epoch is always higher than all before it, also than those that shards or routers remember of an
    earlier Fleet. members: the newest membership, None if there is none. on_publish: called with every new
    membership.
    """

    def __init__(self, *, on_publish: Callable[[Membership], None]) -> None:
        self.members: Membership | None = None
        self._on_publish = on_publish
        self._newest = 0
        self._published = asyncio.Condition()

    def remember(self, epoch: int) -> None:
        """Make the next epoch higher than this one."""
        self._newest = max(self._newest, epoch)

    async def publish(self, shards: Sequence[ShardAddress], placement: ExpertPlacement) -> None:
        """Publish a membership of these shards under a new epoch, unless they are the members already."""
        if self.members is None or self.members.shards != tuple(shards):
            await self._publish(Membership(self._newest + 1, tuple(shards), placement))

    def withdraw(self) -> None:
        """Withdraw the membership: there is none until the next is published."""
        self.members = None

    async def next(self, *, after: int, names: Sequence[str], timeout_s: float) -> Membership | None:
        """Wait for a membership of an epoch above `after` and return it; return None when the time is up.

        names: the names of the shards that the asking router has in epoch `after`. If the router is not
        behind, and yet has other shards than the members, it has them from an earlier Fleet: the members are
        published anew, above its epoch.
        """
        self.remember(after)
        if self.members is not None and _contradict(self.members, after, names):
            await self._publish(replace(self.members, epoch=self._newest + 1))
        try:
            async with asyncio.timeout(timeout_s), self._published:
                await self._published.wait_for(
                    lambda: self.members is not None and self.members.epoch > after
                )
                return self.members
        except TimeoutError:
            return None

    async def _publish(self, members: Membership) -> None:
        self.members = members
        self.remember(members.epoch)
        self._on_publish(members)
        async with self._published:
            self._published.notify_all()


def _contradict(members: Membership, after: int, names: Sequence[str]) -> bool:
    """Return whether a router in epoch `after` is not behind the members and yet has other shards."""
    same = members.epoch == after and [shard.name for shard in members.shards] == list(names)
    return members.epoch <= after and not same
