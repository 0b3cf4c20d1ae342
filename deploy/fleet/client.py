"""FleetClient: a router's side of the Fleet. Holds the lease, hears of new memberships, tells of lost shards."""

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
"""Of the Fleet for a new membership, and so the longest that a dead Fleet goes unnoticed by it."""

RENEW_S = 2.0
"""Between two renewals, and so the longest that a restarted Fleet does not know what we want."""

REFUSED_S = 10.0
"""Before a refused spec is offered again: its checkpoint may be mounted late."""

RETRY_S = 1.0
OVERVIEW_S = 1.5

LAST_WILL_S = 15.0
"""The lease that a router leaves when it is stopped in order: a redeployed one takes the shards over in time."""


class FleetClient:
    """Lives in the replica's event loop. on_members: called there with every new membership."""

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
        self._patience_s = lease_s / 2  # with a call of _hold_lease, or the lease would lapse meanwhile
        self._on_members = on_members
        self._spec: FleetSpec | None = None
        self._accepted: FleetSpec | None = None
        self._changed = asyncio.Event()
        self._handle: Any = None
        self._in_doubt = False  # whether the handle's Fleet lives
        self._tasks: list[asyncio.Task[None]] = []

    async def want(self, spec: FleetSpec) -> None:
        """The fleet shall be so, from now on. If the Fleet refuses it, what runs goes on and `overview` says why."""
        self._spec = spec
        self._changed.set()
        self._tasks = self._tasks or [
            asyncio.create_task(self._hold_lease()),
            asyncio.create_task(self._follow_epochs()),
        ]

    def report_lost(self, loss: "StepFailed") -> None:
        """Starts no Fleet. A dead one need not hear of it: the next begins with a new epoch, in which we lose them again."""
        if self._handle is not None:
            self._handle.report_lost.remote(self._router, loss.epoch, loss.ranks)

    async def overview(self) -> FleetOverview | None:
        """None while the Fleet is being restarted."""
        if self._handle is None:
            return None
        try:
            return await within(OVERVIEW_S, self._handle.overview.remote())
        except (RayError, TimeoutError):
            return None

    async def leave(self) -> None:
        """Stop renewing; the shards stay for a router that comes within LAST_WILL_S. No call hereafter does a thing."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        handle, self._handle = self._handle, None
        if handle is not None:
            with contextlib.suppress(Exception):  # if all of Ray is gone, so is what we would keep
                await within(RETRY_S, handle.renew.remote(self._router, ttl_s=LAST_WILL_S))

    async def _hold_lease(self) -> None:
        """Renew for as long as we live, and tell the Fleet what we want until it has accepted that."""
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
        """Why the Fleet refuses to be as we want, "" if it does not."""
        spec, self._accepted = self._spec, None
        refused = await within(self._patience_s, self._fleet().reconcile.remote(spec))
        if refused:
            logger.warning("the Fleet refuses what we want: %s", refused)
        else:
            self._accepted = spec
        return refused

    async def _follow_epochs(self) -> None:
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
        """The application's Fleet, started if there is none. The handle outlives restarts of the Fleet."""
        if self._handle is None or self._in_doubt:
            self._handle = start_fleet(self._app, lease_s=self._lease_s, log_format=self._log_format)
            self._in_doubt = False
        return self._handle


def start_fleet(app: str, *, lease_s: float, log_format: LogFormat) -> Any:
    """Ray's proxy of the one Fleet of an application, which may be running already, with what it was started with."""
    from deploy.fleet.fleet import (
        Fleet,  # reads checkpoints, for which building the application need not wait
    )

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
