"""Fleet: the actor that keeps the expert shards alive, and the only writer of epochs.

It is a detached named Ray actor, which ends when its last lease lapses. If it is killed, Ray restarts it, and
it asks the shards that live what they are. Every rank has a Keeper, which starts a shard, waits until it is
gone, and starts another.
"""

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.exceptions import RayError

from deploy import logs
from deploy.fleet.epochs import Epochs
from deploy.fleet.keeper import Keeper
from deploy.fleet.nodes import Seat
from deploy.fleet.ray_shards import RayShards, Shard
from deploy.fleet.spec import FleetOverview, FleetSpec, ShardState, ShardStats
from deploy.logs import LogFormat
from deploy.within import within
from experts.checkpoint.index import CheckpointIndex
from experts.fabric import Membership
from experts.placement import ExpertPlacement, place_evenly

logger = logging.getLogger(__name__)

POLL_S = 1.0

DESCRIBE_S = 10.0
"""Seconds within which a shard must say what it is, or it cannot be taken over."""

FIRST_LEASE = ""
"""The name of the holder of the first lease, which counts until a router comes."""


class Fleet:
    """The keeper of an application's shards.

    All methods run in one event loop; none is on the path of a token.
    """

    def __init__(
        self, app: str, *, lease_s: float, log_format: LogFormat = "text", shards: RayShards | None = None
    ) -> None:
        """Start to watch the leases; called in that event loop.

        lease_s: how long it waits for its first router, also when it is restarted.
        """
        logs.configure(log_format)
        self._app = app
        self._shards = shards or RayShards(app)
        self._spec: FleetSpec | None = None
        self._placement: ExpertPlacement | None = None
        self._keepers: dict[int, Keeper] = {}
        self._epochs = Epochs(on_publish=self._on_publish)
        self._refused = ""
        self._recovered = False
        self._one_recovery = asyncio.Lock()
        self._one_change = asyncio.Lock()
        self._leases = {FIRST_LEASE: _now() + lease_s}
        self._watchdog = asyncio.get_running_loop().create_task(self._watch_leases())

    # Called by routers

    async def reconcile(self, want: FleetSpec) -> str:
        """Make the fleet as the spec says.

        A changed spec replaces every shard, and requests wait for the new ones. Returns "", or why the spec
        is refused; what runs then stays as it is.
        """
        await self._recover()
        async with self._one_change:
            if want != self._spec:
                try:
                    placement = await asyncio.to_thread(_read_placement, want)
                except (OSError, ValueError) as error:
                    self._refused = str(error)
                    logger.error("refused %d shards of %s: %s", want.experts.shards, want.checkpoint, error)
                    return self._refused
                logger.info("fleet of %s: %d shards of %s", self._app, want.experts.shards, want.checkpoint)
                await self._stop_keepers()
                self._start_keepers(want, placement, {})
            self._refused = ""
            return ""

    async def next_membership(
        self, *, after: int, names: Sequence[str], timeout_s: float
    ) -> Membership | None:
        """Wait for a membership that the router does not have yet; None when the time is up.

        It is a long poll, see Epochs.next.
        """
        await self._recover()
        return await self._epochs.next(after=after, names=names, timeout_s=timeout_s)

    async def report_lost(self, router: str, epoch: int, ranks: Sequence[int]) -> None:
        """Replace the shards of this epoch to which a router lost its link, whether they hang or are dead."""
        members = self._epochs.members
        if members is None or epoch != members.epoch:
            return
        for rank in ranks:
            address, shard = members.shards[rank], self._keepers[rank].shard
            if shard is not None and shard.name == address.name:
                logger.warning(
                    "%s lost shard %d (pid %d) in epoch %d: replacing it", router, rank, address.pid, epoch
                )
                shard.lost.set()

    async def renew(self, router: str, *, ttl_s: float) -> bool:
        """Keep the fleet for this long.

        Returns False if this Fleet, having been restarted, does not know the router.
        """
        known = router in self._leases
        self._leases[router] = _now() + ttl_s
        self._leases.pop(FIRST_LEASE, None)
        await self._recover()
        for shard in self._living():
            shard.handle.renew.remote(self._lease_left_s())
        return known

    async def overview(self) -> FleetOverview:
        """Return the shards that answer, and why the others do not, for people and metrics."""
        await self._recover()
        asked = [shard.handle.stats.remote() for shard in self._living() if shard.runs]
        answers = await asyncio.gather(*(within(POLL_S, one) for one in asked), return_exceptions=True)
        stats = sorted((one for one in answers if isinstance(one, ShardStats)), key=lambda one: one.rank)
        hopeless = next((keeper.hopeless for keeper in self._keepers.values() if keeper.hopeless), "")
        return FleetOverview(
            pid=os.getpid(),
            shards=tuple(stats),
            problems={rank: keeper.problem for rank, keeper in self._keepers.items() if keeper.problem},
            hopeless=hopeless if self._spec else self._refused,
            refused=self._refused if self._spec else "",
        )

    async def shutdown(self) -> None:
        """Stop every shard, also those of earlier Fleets, then this actor: the call ends with its death."""
        self._leases.clear()  # so that if this fails, a router that comes must say anew what it wants
        await self._stop_keepers()
        for handle in (await self._shards.find()).values():
            self._shards.kill(handle)
        self._shards.exit()

    # Keepers

    def _start_keepers(self, spec: FleetSpec, placement: ExpertPlacement, taken: Mapping[int, Shard]) -> None:
        self._spec, self._placement = spec, placement
        for rank in range(spec.experts.shards):
            self._keepers[rank] = Keeper(
                spec,
                rank,
                shards=self._shards,
                seats=self._seats,
                on_loaded=self._publish_if_complete,
                shard=taken.get(rank),
            )

    async def _stop_keepers(self) -> None:
        await asyncio.gather(*(keeper.stop() for keeper in self._keepers.values()))
        self._keepers.clear()
        self._epochs.withdraw()
        self._spec = self._placement = None

    def _living(self) -> list[Shard]:
        return [keeper.shard for keeper in self._keepers.values() if keeper.shard is not None]

    def _seats(self) -> list[Seat]:
        return [shard.seat for shard in self._living()]

    async def _publish_if_complete(self) -> None:
        """Publish a new epoch if every rank has a shard that listens and one of them is new."""
        assert self._placement is not None
        addresses = [shard.address for shard in self._living() if shard.address is not None]
        if len(addresses) == self._placement.num_ranks:
            await self._epochs.publish(addresses, self._placement)

    def _on_publish(self, members: Membership) -> None:
        for shard in self._living():
            shard.handle.note_epoch.remote(members.epoch)
        where = ", ".join(f"{shard.rank}={shard.host}:{shard.port}" for shard in members.shards)
        logger.info("epoch %d: %s", members.epoch, where)

    # Life and death of the Fleet itself

    async def _recover(self) -> None:
        """Take over, once, the shards that an earlier Fleet left.

        If that fails, the next call tries again.
        """
        async with self._one_recovery:
            if not self._recovered:
                await self._take_over()
                self._recovered = True

    async def _take_over(self) -> None:
        found = await self._shards.find()
        answers = await asyncio.gather(*map(_describe, found.values()))
        states = {name: state for name, state in zip(found, answers, strict=True) if state is not None}
        chosen = survivors(states)
        for name in found.keys() - chosen.values():
            self._shards.kill(found[name])
        for state in states.values():
            self._epochs.remember(state.epoch)
        if not chosen:
            return
        taken = {
            rank: Shard(rank, name, Seat(states[name].node), found[name], states[name].address, runs=True)
            for rank, name in chosen.items()
        }
        logger.info("took over shards %s of %s", sorted(taken), self._app)
        one = states[chosen[min(chosen)]]
        assert one.placement is not None
        self._start_keepers(one.spec, one.placement, taken)

    def _lease_left_s(self) -> float:
        """Return the seconds left of the longest of the routers' leases.

        The shards are given the same, so that theirs ends with it, whether this Fleet lives or not.
        """
        return max(0.0, max(self._leases.values(), default=0.0) - _now())

    async def _watch_leases(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            if self._lease_left_s() > 0:
                continue
            logger.info("no router holds a lease of %s any more", self._app)
            try:
                await self.shutdown()
            except Exception:  # whatever happens to Ray, a Fleet without a lease must end
                logger.exception("cannot stop; trying again")


def survivors(states: Mapping[str, ShardState]) -> dict[int, str]:
    """Return the name of the shard to keep, by rank.

    Those are kept that have loaded and have the spec of the newest epoch.
    """
    loaded = {name: state for name, state in states.items() if state.address is not None}
    if not loaded:
        return {}
    newest = max(loaded.values(), key=lambda state: state.epoch)
    return {state.rank: name for name, state in loaded.items() if state.spec == newest.spec}


def _now() -> float:
    return asyncio.get_running_loop().time()


def _read_placement(spec: FleetSpec) -> ExpertPlacement:
    with CheckpointIndex(Path(spec.checkpoint)) as checkpoint:
        return place_evenly(checkpoint.shape, num_ranks=spec.experts.shards)


async def _describe(handle: Any) -> ShardState | None:
    try:
        return await within(DESCRIBE_S, handle.describe.remote())
    except (RayError, TimeoutError):
        return None
