"""RayShards: everything that the Fleet asks of Ray, behind one class so that the Fleet's tests need no Ray."""

import asyncio
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util import list_named_actors
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.fleet.nodes import Node, Seat
from deploy.fleet.shard_actor import ShardActor
from deploy.fleet.spec import NAMESPACE, FleetSpec, shard_prefix
from deploy.ray_private import available_resources_by_node
from experts.fabric import ShardAddress


@dataclass(eq=False)
class Shard:
    """A shard that lives, as far as the Fleet knows.

    runs: whether Ray has started its process. lost: set when a router could not reach it.
    """

    rank: int
    name: str
    seat: Seat
    handle: Any  # Ray's handle of a ShardActor; its methods are not typed
    address: ShardAddress | None = None
    runs: bool = False
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class RayShards:
    """The shards of one application, and the nodes they may be on. Nothing here blocks the event loop."""

    def __init__(self, app: str) -> None:
        self._prefix = shard_prefix(app)

    async def nodes(self) -> list[Node]:
        """Return the live nodes and what they have free."""
        return await asyncio.to_thread(_read_nodes)

    def start(self, spec: FleetSpec, rank: int, seat: Seat, resources: Mapping[str, float]) -> Shard:
        """Start a shard as a detached actor on the seat's node.

        It need not run when this returns: its calls wait until Ray has started its process.
        """
        name = f"{self._prefix}{rank}-{secrets.token_hex(4)}"
        handle = (
            ray.remote(ShardActor)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=0,
                max_concurrency=8,
                num_cpus=resources.get("CPU", 0),
                num_gpus=resources.get("GPU", 0),
                resources={key: need for key, need in resources.items() if key not in ("CPU", "GPU")},
                scheduling_strategy=NodeAffinitySchedulingStrategy(seat.node, soft=False),
            )
            .remote(spec, rank, name)
        )
        return Shard(rank, name, seat, handle)

    async def find(self) -> dict[str, Any]:
        """Return the handle of every shard of the application, by name, whichever Fleet started it."""
        return await asyncio.to_thread(_find, self._prefix)

    def kill(self, handle: Any) -> None:
        """Kill a shard's process at once."""
        ray.kill(handle, no_restart=True)

    def exit(self) -> None:
        """End the calling actor, the Fleet, at once; Ray's exit_actor would wait for the routers' long polls."""
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


def _read_nodes() -> list[Node]:
    available = available_resources_by_node()
    return [
        Node(node["NodeID"], total=node["Resources"], available=available.get(node["NodeID"], {}))
        for node in ray.nodes()
        if node["Alive"]
    ]


def _find(prefix: str) -> dict[str, Any]:
    actors: list[Any] = list_named_actors(all_namespaces=True)
    names = [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
    found = {}
    for name in names:
        if name.startswith(prefix):
            try:
                found[name] = ray.get_actor(name, NAMESPACE)
            except ValueError:  # the shard died since it was listed
                continue
    return found
