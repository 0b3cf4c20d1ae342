"""Epochs: the newest membership, and the routers that wait for the next one."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

from experts.fabric import Membership, ShardAddress
from experts.placement import ExpertPlacement


class Epochs:
    """Epochs only rise, also above those that shards or routers remember of a Fleet before this one.

    on_publish: called with every new membership.
    """

    def __init__(self, *, on_publish: Callable[[Membership], None]) -> None:
        self.members: Membership | None = None
        self._on_publish = on_publish
        self._newest = 0
        self._published = asyncio.Condition()

    def remember(self, epoch: int) -> None:
        """The next epoch will be above this one."""
        self._newest = max(self._newest, epoch)

    async def publish(self, shards: Sequence[ShardAddress], placement: ExpertPlacement) -> None:
        """A new epoch, unless these are the members already."""
        if self.members is None or self.members.shards != tuple(shards):
            await self._publish(Membership(self._newest + 1, tuple(shards), placement))

    def withdraw(self) -> None:
        """There is no membership until the next is published."""
        self.members = None

    async def next(self, *, after: int, names: Sequence[str], timeout_s: float) -> Membership | None:
        """A membership of an epoch above `after`, once there is one; None when the time is up.

        names: of the shards that the asking router has in epoch `after`. If it is not behind, and yet has others than
        the members, it has them of a Fleet before this one: the members are published anew, above its epoch.
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
    same = members.epoch == after and [shard.name for shard in members.shards] == list(names)
    return members.epoch <= after and not same
