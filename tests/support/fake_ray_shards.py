"""Ray as the Fleet sees it, in one event loop: actors that load, die and do not answer when a test says so."""

import asyncio
import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray.exceptions import RayActorError

from deploy.fleet.fleet import Fleet
from deploy.fleet.nodes import Node, Seat
from deploy.fleet.ray_shards import RayShards, Shard
from deploy.fleet.spec import FleetSpec, ShardState, ShardStats
from experts.config import ExpertsConfig
from experts.fabric import ShardAddress
from experts.placement import ExpertPlacement, even_placement
from experts.progress import Progress
from tests.support.places import DEMO_MODEL


def fleet_spec(*, num_shards: int = 2, checkpoint: Path = DEMO_MODEL, gpus: float = 0) -> FleetSpec:
    return FleetSpec(
        app="app",
        checkpoint=str(checkpoint),
        experts=ExpertsConfig(shards=num_shards, threads=1),
        dtype="auto",
        resources=(("GPU", gpus),) if gpus else (),
        lease_s=60.0,
        start_timeout_s=60.0,
        log_format="text",
    )


class Proxy:
    """A stand-in for Ray's handle of an actor, called as `proxy.method.remote(...)`; calls that a dead actor
    did not answer raise RayActorError."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self.died = asyncio.Event()

    def __getattr__(self, method: str) -> "_Method":
        return _Method(self, method)


class _Method:
    def __init__(self, proxy: Proxy, name: str) -> None:
        self._proxy, self._name = proxy, name

    def remote(self, *args: Any, **kwargs: Any) -> "asyncio.Task[Any]":
        task = asyncio.create_task(self._answer(args, kwargs))
        task.add_done_callback(lambda done: done.cancelled() or done.exception())  # some are not awaited
        return task

    async def _answer(self, args: Any, kwargs: Any) -> Any:
        died = asyncio.create_task(self._proxy.died.wait())
        await asyncio.sleep(0)
        if died.done():
            raise RayActorError
        answer = asyncio.create_task(getattr(self._proxy.actor, self._name)(*args, **kwargs))
        await asyncio.wait({died, answer}, return_when=asyncio.FIRST_COMPLETED)
        died.cancel()
        if answer.done():
            return answer.result()
        answer.cancel()
        raise RayActorError


class FakeShardActor:
    """A stand-in for ShardActor that loads nothing."""

    def __init__(self, world: "FakeRayShards", spec: FleetSpec, rank: int, name: str, node: str) -> None:
        self._world, self._spec, self._rank, self._name, self._node = world, spec, rank, name, node
        self._address: ShardAddress | None = None
        self._placement: ExpertPlacement | None = None
        self.epoch = 0
        self.ttl_s: float | None = None

    async def load(self) -> ShardAddress:
        await self._world.may_load.wait()
        self._world.at_load(self._name)
        self._placement = even_placement(
            tuple(range(6)), num_layers=6, num_experts=32, num_ranks=self._spec.experts.shards
        )
        port = next(self._world.ports)
        self._address = ShardAddress(self._rank, self._node, port, self._name, pid=port, token=b"")
        return self._address

    async def describe(self) -> ShardState:
        await self._world.may_start.wait()
        return ShardState(
            self._rank, self._spec, self._address, self._placement, epoch=self.epoch, node=self._node
        )

    async def stats(self) -> ShardStats:
        loading = None if self._address else Progress(1, 2, "experts")
        return ShardStats(self._rank, pid=0, node=self._node, num_pairs=0, resident_mib=0.0, loading=loading)

    async def note_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    async def renew(self, ttl_s: float) -> None:
        self.ttl_s = ttl_s

    async def until_death(self) -> None:
        await asyncio.Event().wait()


class FakeRayShards(RayShards):
    """RayShards without Ray. handles: by name, of the shards that live. started: the names of all that were ever started.

    may_start, may_load: cleared, Ray starts no process and no process gets its experts. at_load: may raise.
    """

    def __init__(self, *, gpus: Mapping[str, float] | None = None) -> None:
        """Create a cluster. gpus: by node; they stay free in Ray's numbers whoever takes them."""
        self.handles: dict[str, Any] = {}
        self.started: list[str] = []
        self.ports = itertools.count(1000)
        self.may_start, self.may_load = asyncio.Event(), asyncio.Event()
        self.may_start.set()
        self.may_load.set()
        self.at_load: Callable[[str], None] = lambda name: None
        self.find_errors: list[Exception] = []
        self.exited = asyncio.Event()
        self._nodes = [
            Node(id_, total={"GPU": free}, available={"GPU": free})
            for id_, free in (gpus or {"node": 0.0}).items()
        ]

    async def nodes(self) -> list[Node]:
        await asyncio.sleep(0)
        return self._nodes

    def start(self, spec: FleetSpec, rank: int, seat: Seat, resources: Mapping[str, float]) -> Shard:
        name = f"app-shard-{rank}-{len(self.started)}"
        self.started.append(name)
        self.handles[name] = Proxy(FakeShardActor(self, spec, rank, name, seat.node))
        return Shard(rank, name, seat, self.handles[name])

    async def find(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        if self.find_errors:
            raise self.find_errors.pop()
        return dict(self.handles)

    def kill(self, handle: Any) -> None:
        handle.died.set()
        self.handles = {name: other for name, other in self.handles.items() if other is not handle}

    def exit(self) -> None:
        self.exited.set()

    def kill_all(self) -> None:
        """Kill every shard, as if every node lost its power."""
        for handle in list(self.handles.values()):
            self.kill(handle)


def kill_fleet(fleet: Fleet) -> None:
    """Stop all that a Fleet does; its shards know nothing of that."""
    fleet._watchdog.cancel()
    for keeper in fleet._keepers.values():
        keeper._task.cancel()
