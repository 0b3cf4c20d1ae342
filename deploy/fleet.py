"""Fleet: keeps the expert shards alive, and is the only writer of epochs.

A detached named actor. It dies with its last lease; if it is killed, Ray restarts it and it learns the shards that
live from themselves. Every rank has a keeper, a task that starts a shard, waits until it is gone, and starts another.
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.nodes import Node, choose_node
from deploy.shard_actor import ShardActor
from deploy.spec import NAMESPACE, FleetOverview, FleetSpec, ShardState, ShardStats, shard_prefix
from experts.checkpoint_index import CheckpointIndex
from experts.fabric import Membership, ShardAddress
from experts.placement import ExpertPlacement, place_evenly

logger = logging.getLogger(__name__)

POLL_S = 1.0
RETRY_S = (0.0, 1.0, 5.0, 30.0)
"""Pauses before a rank is started again, by how often it failed in a row before it had loaded."""


@dataclass(eq=False)
class Shard:
    """A shard that lives, as far as the Fleet knows. lost: set when a router could not reach it."""

    rank: int
    name: str
    node: str
    handle: Any  # ray's proxy of a ShardActor; its methods are not typed
    address: ShardAddress | None = None
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class Fleet:
    """All methods run in one event loop; nothing here is on the path of a token."""

    def __init__(self, app: str) -> None:
        self._app = app
        self._spec: FleetSpec | None = None
        self._placement: ExpertPlacement | None = None
        self._shards: dict[int, Shard] = {}
        self._keepers: dict[int, asyncio.Task[None]] = {}
        self._problems: dict[int, str] = {}
        self._hopeless = ""
        self._epoch = 0
        self._members: Membership | None = None
        self._published = asyncio.Condition()
        self._one_change = asyncio.Lock()
        self._leases: dict[str, float] = {}
        self._recovered: asyncio.Task[None] | None = None
        self._watchdog: asyncio.Task[None] | None = None

    # Called by routers

    async def reconcile(self, want: FleetSpec) -> None:
        """Make the fleet as `want` says. A changed spec replaces every shard; requests wait for the new ones."""
        await self._recover()
        async with self._one_change:
            if want == self._spec:
                return
            try:
                placement = _placement(want)
            except ValueError as error:  # what runs stays as it is
                self._hopeless = str(error)
                raise
            logger.info("fleet of %s: %d shards of %s", self._app, want.num_shards, want.checkpoint)
            await self._stop_keepers()
            self._start_keepers(want, placement)

    async def next_membership(self, *, after: int, timeout_s: float) -> Membership | None:
        """Long poll: the newest membership once its epoch is above `after`; None when the time is up."""
        await self._recover()
        try:
            async with asyncio.timeout(timeout_s), self._published:
                await self._published.wait_for(
                    lambda: self._members is not None and self._members.epoch > after
                )
                return self._members
        except TimeoutError:
            return None

    async def report_lost(self, router: str, epoch: int, ranks: Sequence[int]) -> None:
        """A router lost its link to these shards of this epoch: they are replaced, hung or dead."""
        if self._members is None or epoch != self._members.epoch:
            return
        for rank in ranks:
            address = self._members.shards[rank]
            shard = self._shards.get(rank)
            if shard is not None and shard.name == address.name:
                logger.warning(
                    "%s lost shard %d (pid %d) in epoch %d: replacing it", router, rank, address.pid, epoch
                )
                shard.lost.set()

    async def renew(self, router: str, *, ttl_s: float) -> bool:
        """Keep the shards for this long. False: this Fleet does not know the router (it was restarted)."""
        self._watchdog = self._watchdog or asyncio.create_task(self._watch_leases())
        known = router in self._leases
        self._leases[router] = time.monotonic() + ttl_s
        for shard in self._shards.values():
            shard.handle.renew.remote(self._shard_ttl_s())
        return known

    async def overview(self) -> FleetOverview:
        """For people and metrics: the shards that answer, and why the others do not."""
        await self._recover()
        asked = [shard.handle.stats.remote() for shard in self._shards.values() if shard.address]
        answers = await asyncio.gather(
            *(asyncio.wait_for(one, POLL_S) for one in asked), return_exceptions=True
        )
        stats = sorted((one for one in answers if isinstance(one, ShardStats)), key=lambda one: one.rank)
        return FleetOverview(
            pid=os.getpid(), shards=tuple(stats), problems=dict(self._problems), hopeless=self._hopeless
        )

    async def shutdown(self) -> None:
        """Stop every shard, then this actor: the call ends with its death."""
        await self._stop_keepers()
        for shard in await self._live_shards():
            _kill(shard)
        # exit_actor would wait for the routers' long polls.
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)

    # Keepers

    def _start_keepers(self, spec: FleetSpec, placement: ExpertPlacement) -> None:
        self._spec, self._placement = spec, placement
        for rank in range(spec.num_shards):
            self._keepers[rank] = asyncio.create_task(self._keep(rank), name=f"keeper-{rank}")

    async def _stop_keepers(self) -> None:
        for task in self._keepers.values():
            task.cancel()
        await asyncio.gather(*self._keepers.values(), return_exceptions=True)
        self._keepers.clear()
        for shard in self._shards.values():
            _kill(shard)
        self._shards.clear()
        self._problems.clear()
        self._hopeless = ""

    async def _keep(self, rank: int) -> None:
        """Forever: a shard of this rank lives, or is being started."""
        num_failures = 0
        while True:
            try:
                shard = self._shards.get(rank) or await self._create(rank)
                shard.address = shard.address or await self._load(shard)
            except Exception as error:  # noqa: BLE001 a keeper outlives whatever a checkpoint or a node does
                self._note_problem(rank, error)
                self._drop(rank)
                await asyncio.sleep(RETRY_S[min(num_failures, len(RETRY_S) - 1)])
                num_failures += 1
                continue
            num_failures = 0
            self._problems.pop(rank, None)
            self._hopeless = ""
            await self._publish_if_complete()
            why = await _until_gone(shard)
            logger.warning("shard %d (%s) is gone: %s", rank, shard.name, why)
            self._problems[rank] = f"shard {rank} is being replaced: {why}"
            self._drop(rank)

    async def _create(self, rank: int) -> Shard:
        assert self._spec is not None
        node = await self._wait_for_node(rank)
        name = f"{shard_prefix(self._app)}{rank}-{secrets.token_hex(4)}"
        resources = self._resources()
        handle = (
            ray.remote(ShardActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                max_concurrency=8,
                num_cpus=resources.pop("CPU", 0),
                num_gpus=resources.pop("GPU", 0),
                resources=resources,
                scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
            )
            .remote(self._spec, rank, name)
        )
        shard = self._shards[rank] = Shard(rank=rank, name=name, node=node, handle=handle)
        return shard

    async def _load(self, shard: Shard) -> ShardAddress:
        assert self._spec is not None
        try:
            return await asyncio.wait_for(shard.handle.load.remote(), self._spec.start_timeout_s)
        except TimeoutError:
            raise ValueError(f"did not load its experts within {self._spec.start_timeout_s:.0f} s") from None

    async def _wait_for_node(self, rank: int) -> str:
        assert self._spec is not None
        while True:
            node = choose_node(
                self._nodes(),
                resources=self._resources(),
                strategy=self._spec.strategy,
                num_shards=self._spec.num_shards,
            )
            if node is not None:
                return node
            self._problems[rank] = (
                f"shard {rank} waits for a node: none has {self._resources() or 'room'} free "
                f"under experts.strategy={self._spec.strategy}"
            )
            await asyncio.sleep(POLL_S)

    def _resources(self) -> dict[str, float]:
        """What Ray reserves for a shard: as the config says, else a GPU if the cluster has any."""
        assert self._spec is not None
        return dict(self._spec.resources) or ({"GPU": 1.0} if ray.cluster_resources().get("GPU") else {})

    def _nodes(self) -> list[Node]:
        available = available_resources_per_node()  # no public call tells it per node
        held = [shard.node for shard in self._shards.values()]
        return [
            Node(
                id=node["NodeID"],
                num_shards=held.count(node["NodeID"]),
                available=available.get(node["NodeID"], {}),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]

    def _drop(self, rank: int) -> None:
        shard = self._shards.pop(rank, None)
        if shard is not None:
            _kill(shard)

    def _note_problem(self, rank: int, error: Exception) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        self._problems[rank] = f"shard {rank} does not start: {cause}"
        if isinstance(cause, ValueError):
            self._hopeless = str(cause)
        logger.error("%s", self._problems[rank])

    async def _publish_if_complete(self) -> None:
        """A new epoch, if every rank has a shard that listens and one of them is new."""
        assert self._spec is not None
        assert self._placement is not None
        addresses = [self._shards[r].address for r in range(self._spec.num_shards) if r in self._shards]
        shards = tuple(address for address in addresses if address is not None)
        if len(shards) < self._spec.num_shards or (self._members and shards == self._members.shards):
            return
        self._epoch += 1
        self._members = Membership(epoch=self._epoch, shards=shards, placement=self._placement)
        for shard in self._shards.values():
            shard.handle.note_epoch.remote(self._epoch)
        logger.info("epoch %d: %s", self._epoch, ", ".join(f"{s.rank}={s.host}:{s.port}" for s in shards))
        async with self._published:
            self._published.notify_all()

    # Life and death of the Fleet itself

    async def _recover(self) -> None:
        """Once: take over the shards that a Fleet before this one left."""
        self._recovered = self._recovered or asyncio.create_task(self._take_over())
        await self._recovered

    async def _take_over(self) -> None:
        states: list[tuple[Shard, ShardState]] = []
        for shard in await self._live_shards():
            try:
                states.append((shard, await asyncio.wait_for(shard.handle.describe.remote(), 5 * POLL_S)))
            except (RayError, TimeoutError):
                _kill(shard)
        if not states:
            return
        newest = max((state for _, state in states), key=lambda state: state.epoch)
        self._epoch = newest.epoch
        for shard, state in states:
            if state.spec != newest.spec or state.address is None or state.rank in self._shards:
                _kill(shard)
                continue
            shard.rank, shard.node, shard.address = state.rank, state.node, state.address
            self._shards[state.rank] = shard
        logger.info("took over shards %s of epoch %d", sorted(self._shards), self._epoch)
        self._start_keepers(newest.spec, _placement(newest.spec))

    async def _live_shards(self) -> list[Shard]:
        """Every shard actor of this application, whoever started it."""
        found: list[Any] = await asyncio.to_thread(list_named_actors, all_namespaces=True)
        names = [one["name"] for one in found if one["namespace"] == NAMESPACE]
        shards = []
        for name in names:
            if name.startswith(shard_prefix(self._app)):
                handle = await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
                shards.append(Shard(rank=-1, name=name, node="", handle=handle))
        return shards

    def _shard_ttl_s(self) -> float:
        """Shards outlive the Fleet by a lease, in which Ray restarts it."""
        assert self._spec is not None or not self._shards
        left = max(self._leases.values(), default=0.0) - time.monotonic()
        return max(left, 0.0) + (self._spec.lease_s if self._spec else 0.0)

    async def _watch_leases(self) -> None:
        while any(ends > time.monotonic() for ends in self._leases.values()):
            await asyncio.sleep(POLL_S)
        logger.info("no router holds a lease of %s any more", self._app)
        await self.shutdown()


def _placement(spec: FleetSpec) -> ExpertPlacement:
    with CheckpointIndex(Path(spec.checkpoint)) as checkpoint:
        return place_evenly(checkpoint.shape, num_ranks=spec.num_shards)


async def _until_gone(shard: Shard) -> str:
    """Why: its process died (Ray tells within milliseconds) or a router cannot reach it."""
    death = asyncio.ensure_future(_death(shard.handle))
    lost = asyncio.create_task(shard.lost.wait())
    try:
        await asyncio.wait({death, lost}, return_when=asyncio.FIRST_COMPLETED)
        return "a router lost its link" if lost.done() else death.result()
    finally:
        death.cancel()
        lost.cancel()


async def _death(handle: Any) -> str:
    try:
        await handle.until_death.remote()
    except RayActorError as error:
        return str(error).splitlines()[0]
    return "it returned"


def _kill(shard: Shard) -> None:
    ray.kill(shard.handle, no_restart=True)
