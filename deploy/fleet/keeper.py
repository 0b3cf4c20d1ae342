"""Keeper: sees to it that one EP rank always has a shard that lives or is being started."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from ray.exceptions import RayError, RayTaskError

from deploy.fleet.nodes import Seat, choose_seat, needs
from deploy.fleet.ray_shards import RayShards, Shard
from deploy.fleet.spec import FleetSpec
from deploy.within import within
from experts.fabric import ShardAddress

logger = logging.getLogger(__name__)

POLL_S = 1.0

PAUSES_S = (0.0, 0.0, 1.0, 5.0, 30.0)
"""Seconds before a rank is started again, by how often it failed in a row."""

STEADY_S = 60.0
"""Seconds after loading within which a shard's death counts as a failure.

The step that killed it may kill its successor, too.
"""

SLOW_START_S = 5.0
"""Seconds after which the log says that Ray has not started a process; it usually takes one or two."""

START_LIMIT_S = 60.0
"""Seconds after which another node is chosen for a process that Ray has not started.

The resources that were free may have been taken.
"""


class Keeper:
    """The task, in the Fleet's event loop, that keeps a shard of one rank running.

    shard: the shard that it has now or is starting, None if there is none. problem: a sentence why the rank
    has no shard that serves, "" if it has one. hopeless: the cause, if only a user can mend it, else "".
    """

    def __init__(
        self,
        spec: FleetSpec,
        rank: int,
        *,
        shards: RayShards,
        seats: Callable[[], Sequence[Seat]],
        on_loaded: Callable[[], Awaitable[None]],
        shard: Shard | None,
    ) -> None:
        """Start to keep the rank.

        seats: returns the seats of all shards of the fleet. shard: one that an earlier Fleet left, None to
        start one.
        """
        self.shard = shard
        self.hopeless = ""
        self._trouble = ""
        self._waits_for = ""
        self._spec = spec
        self._rank = rank
        self._shards = shards
        self._seats = seats
        self._on_loaded = on_loaded
        self._task = asyncio.create_task(self._keep(), name=f"keeper-{rank}")

    @property
    def problem(self) -> str:
        """Return why the rank has no shard that serves, "" if it has one."""
        if self._waits_for:
            return f"shard {self._rank} waits for {self._waits_for}"
        return self._trouble and f"shard {self._rank} {self._trouble}"

    async def stop(self) -> None:
        """Stop for good, and kill the shard."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        self._drop()

    async def _keep(self) -> None:
        num_failures = 0
        while True:
            try:
                shard = self.shard or await self._create()
                shard.address = shard.address or await self._load(shard)
            except Exception as error:  # noqa: BLE001 a keeper outlives any fault of a checkpoint or a node
                self._note(error)
                num_failures += 1
            else:
                self._trouble = self.hopeless = ""
                loaded_at = asyncio.get_running_loop().time()
                await self._on_loaded()
                self._trouble = f"is being replaced: {await _until_gone(shard)}"
                logger.warning("%s (%s)", self.problem, shard.name)
                num_failures = failures(num_failures, lived_s=asyncio.get_running_loop().time() - loaded_at)
            self._drop()
            await asyncio.sleep(PAUSES_S[min(num_failures, len(PAUSES_S) - 1)])

    async def _create(self) -> Shard:
        """Start a shard on a node with room, as soon as there is one; return it when its process runs."""
        while True:
            nodes = await self._shards.nodes()
            resources = needs(nodes, dict(self._spec.resources))
            seat = choose_seat(
                nodes,
                seats=self._seats(),
                resources=resources,
                strategy=self._spec.experts.strategy,
                num_shards=self._spec.experts.shards,
            )
            if seat is not None:  # taken without an await, so that no other keeper takes it, too
                self.shard = self._shards.start(self._spec, self._rank, seat, resources)
                await self._until_started(self.shard)
                return self.shard
            self._waits_for = f"a node: none has {resources or 'room'} free under experts.strategy={self._spec.experts.strategy}"
            await asyncio.sleep(POLL_S)

    async def _until_started(self, shard: Shard) -> None:
        """Wait until Ray has started a shard's process. Raises TimeoutError after START_LIMIT_S."""
        node = shard.seat.node
        self._waits_for = ""
        started = asyncio.ensure_future(shard.handle.describe.remote())  # any call waits for the process
        try:
            if not (await asyncio.wait({started}, timeout=SLOW_START_S))[0]:
                self._waits_for = f"Ray to start its process on node {node}"
                logger.warning("%s", self.problem)
            await within(START_LIMIT_S, started)
        except TimeoutError:
            raise TimeoutError(f"Ray has not started its process on node {node}") from None
        finally:
            started.cancel()
            self._waits_for = ""
        shard.runs = True
        shard.seat = Seat(node)  # from here on, Ray's own numbers count it

    async def _load(self, shard: Shard) -> ShardAddress:
        """Have a shard load its experts; return where it listens.

        Raises ValueError if that takes too long.
        """
        try:
            return await within(self._spec.start_timeout_s, shard.handle.load.remote())
        except TimeoutError:
            raise ValueError(f"did not load its experts within {self._spec.start_timeout_s:.0f} s") from None

    def _note(self, error: Exception) -> None:
        cause = error.cause if isinstance(error, RayTaskError) else error
        self._trouble = f"does not start: {cause}"
        self.hopeless = str(cause) if isinstance(cause, ValueError) else ""
        logger.error("%s", self.problem)

    def _drop(self) -> None:
        shard, self.shard = self.shard, None
        if shard is not None:
            self._shards.kill(shard.handle)


def failures(before: int, *, lived_s: float) -> int:
    """Return the number of failures in a row, after a shard has died that had loaded."""
    return before + 1 if lived_s < STEADY_S else 0


async def _until_gone(shard: Shard) -> str:
    """Wait until a shard's process has died or a router lost its link to it; return which.

    Ray tells of a death within milliseconds.
    """
    death = asyncio.create_task(_death(shard.handle))
    lost = asyncio.create_task(shard.lost.wait())
    try:
        await asyncio.wait({death, lost}, return_when=asyncio.FIRST_COMPLETED)
        return "a router lost its link" if lost.done() else death.result()
    finally:
        death.cancel()
        lost.cancel()


async def _death(handle: Any) -> str:
    """Wait until an actor has died; return Ray's reason."""
    try:
        await handle.until_death.remote()
    except RayError as error:
        return str(error).splitlines()[0]
    return "it returned"
