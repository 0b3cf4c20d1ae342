"""FleetClient: a router's client of the Fleet.

It holds the lease, follows the membership and reports lost shards.
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from deploy.fleet.spec import NAMESPACE, FleetOverview, FleetSpec, fleet_name
from deploy.logs import LogFormat
from deploy.within import within

if TYPE_CHECKING:
    from experts.fabric import Membership, StepFailed

logger = logging.getLogger(__name__)

POLL_S = 30.0
"""Seconds of one long poll for a new membership.

The poll notices a dead Fleet after twice as long at the latest.
"""

RENEW_S = 2.0
"""Seconds between two renewals, and so the longest that a restarted Fleet does not know what we want."""

REFUSED_S = 10.0
"""Seconds before a refused spec is offered again: its checkpoint may be mounted late."""

RETRY_S = 1.0
OVERVIEW_S = 1.5

LAST_WILL_S = 15.0
"""Seconds of the lease that a router leaves when it stops in order; a redeployed one so finds the shards."""


class FleetClient:
    """A router's client of the Fleet, which lives in the replica's event loop.

    on_members: called in that loop with every new membership.
    """

    def __init__(
        self,
        app: str,
        router: str,
        *,
        lease_s: float,
        log_format: LogFormat,
        on_members: "Callable[[Membership], None]",
    ) -> None:
        self._app = app
        self._router = router
        self._lease_s = lease_s
        self._log_format: LogFormat = log_format
        self._patience_s = lease_s / 2  # for a call of _hold_lease, or the lease would lapse meanwhile
        self._on_members = on_members
        self._spec: FleetSpec | None = None
        self._accepted: FleetSpec | None = None
        self._changed = asyncio.Event()
        self._handle: Any = None
        self._in_doubt = False  # whether the Fleet of the handle may be dead
        self._tasks: list[asyncio.Task[None]] = []

    async def want(self, spec: FleetSpec) -> None:
        """Ask, from now on, for a fleet of this spec.

        If the Fleet refuses it, what runs goes on and `overview` says why.
        """
        self._spec = spec
        self._changed.set()
        self._tasks = self._tasks or [
            asyncio.create_task(self._hold_lease()),
            asyncio.create_task(self._follow_epochs()),
        ]

    def report_lost(self, loss: "StepFailed") -> None:
        """Tell the Fleet which shards were lost, if there is a Fleet; none is started for it.

        A dead Fleet need not hear of it: the next begins with a new epoch, in which we lose the same shards
        again.
        """
        if self._handle is not None:
            self._handle.report_lost.remote(self._router, loss.epoch, loss.ranks)

    async def overview(self) -> FleetOverview | None:
        """Return what the Fleet says of its shards, None while it does not answer (Ray may be restarting it)."""
        if self._handle is None:
            return None
        try:
            return await within(OVERVIEW_S, self._handle.overview.remote())
        except (RayError, TimeoutError):
            return None

    async def leave(self) -> None:
        """Stop renewing; the shards stay for a router that comes within LAST_WILL_S.

        Calls after this one do nothing.
        """
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(Exception):  # if all of Ray is gone, so is what we would keep
                await within(RETRY_S, handle.renew.remote(self._router, ttl_s=LAST_WILL_S))

    async def _hold_lease(self) -> None:
        """Renew the lease until cancelled, and tell the Fleet what we want until it has accepted that."""
        while True:
            self._changed.clear()
            try:
                known = await within(
                    self._patience_s, self._fleet().renew.remote(self._router, ttl_s=self._lease_s)
                )
                refused = "" if known and self._accepted == self._spec else await self._reconcile()
            except Exception as error:  # noqa: BLE001 whatever befalls the Fleet, the lease must be tried again
                self._accepted = None
                await self._start_over("did not take our lease", error)
                continue
            pause_s = min(REFUSED_S if refused else RENEW_S, self._lease_s / 4)
            with contextlib.suppress(TimeoutError):
                await within(pause_s, self._changed.wait())

    async def _reconcile(self) -> str:
        """Tell the Fleet what we want. Returns why it refuses that, "" if it does not."""
        spec, self._accepted = self._spec, None
        refused = await within(self._patience_s, self._fleet().reconcile.remote(spec))
        if refused:
            logger.warning("the Fleet refuses what we want: %s", refused)
        else:
            self._accepted = spec
        return refused

    async def _follow_epochs(self) -> None:
        """Poll for new memberships until cancelled."""
        epoch, names = 0, ()
        while True:
            try:
                call = self._fleet().next_membership.remote(after=epoch, names=names, timeout_s=POLL_S)
                members = await within(2 * POLL_S, call)
            except Exception as error:  # noqa: BLE001 as in _hold_lease
                await self._start_over("did not say who its shards are", error)
                continue
            if members is not None:
                epoch, names = members.epoch, tuple(shard.name for shard in members.shards)
                self._on_members(members)

    async def _start_over(self, what: str, error: Exception) -> None:
        logger.error("the Fleet %s; trying again: %s: %s", what, type(error).__name__, error)
        self._in_doubt = True
        await asyncio.sleep(RETRY_S)

    def _fleet(self) -> Any:
        """Return the handle of the application's Fleet, which is started if there is none.

        The handle stays good when Ray restarts the Fleet.
        """
        if self._handle is None or self._in_doubt:
            self._handle = start_fleet(self._app, lease_s=self._lease_s, log_format=self._log_format)
            self._in_doubt = False
        return self._handle


def start_fleet(app: str, *, lease_s: float, log_format: LogFormat) -> Any:
    """Return Ray's handle of an application's one Fleet.

    It is started with these arguments, unless it runs already.
    """
    # Imported here: it imports what reads checkpoints, for which building the application need not wait.
    from deploy.fleet.fleet import Fleet

    return (
        ray.remote(Fleet)
        .options(
            name=fleet_name(app),
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=-1,
            max_task_retries=-1,
            max_concurrency=1000,
            get_if_exists=True,
            num_cpus=0,
        )
        .remote(app, lease_s=lease_s, log_format=log_format)
    )
