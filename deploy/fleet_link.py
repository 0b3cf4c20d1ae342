"""FleetLink: a router's side of the Fleet. Holds the lease, hears of new memberships, tells of lost shards."""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from deploy.spec import NAMESPACE, FleetOverview, FleetSpec, fleet_name

if TYPE_CHECKING:
    from experts.fabric import Membership, PeerLost

logger = logging.getLogger(__name__)

POLL_S = 30.0
"""Of the Fleet for a new membership, and so the longest that a dead Fleet goes unnoticed by it."""

RETRY_S = 1.0
OVERVIEW_S = 1.5

LAST_WILL_S = 15.0
"""The lease that a router leaves when it is stopped in order: a redeployed one takes the shards over in time."""


class FleetLink:
    """Lives in the replica's event loop. on_members: called there with every new membership."""

    def __init__(
        self, app: str, router: str, *, lease_s: float, on_members: "Callable[[Membership], None]"
    ) -> None:
        self._app = app
        self._router = router
        self._lease_s = lease_s
        self._on_members = on_members
        self._spec: FleetSpec | None = None
        self._handle: Any = None
        self._tasks: list[asyncio.Task[None]] = []

    async def want(self, spec: FleetSpec) -> None:
        """The fleet shall be so, from now on."""
        changed, self._spec = self._spec is not None, spec
        if changed:
            await self._fleet().reconcile.remote(spec)
        else:
            self._tasks = [
                asyncio.create_task(self._hold_lease()),
                asyncio.create_task(self._follow_epochs()),
            ]

    def report_lost(self, loss: "PeerLost") -> None:
        self._fleet().report_lost.remote(self._router, loss.epoch, loss.ranks)

    async def overview(self) -> FleetOverview | None:
        """None while the Fleet is being restarted."""
        try:
            return await asyncio.wait_for(self._fleet().overview.remote(), OVERVIEW_S)
        except (RayError, TimeoutError):
            return None

    async def leave(self) -> None:
        """Stop renewing; the shards stay for a router that comes at once."""
        for task in self._tasks:
            task.cancel()
        await self._fleet().renew.remote(self._router, ttl_s=LAST_WILL_S)

    async def _hold_lease(self) -> None:
        """Renew for as long as we live; tell a Fleet that does not know us what we want."""
        while True:
            try:
                if not await asyncio.wait_for(
                    self._fleet().renew.remote(self._router, ttl_s=self._lease_s), POLL_S
                ):
                    await self._fleet().reconcile.remote(self._spec)
                await asyncio.sleep(self._lease_s / 4)
            except Exception as error:  # noqa: BLE001 whatever befalls the Fleet, the lease must be tried again
                await self._start_over("did not take our lease", error)

    async def _follow_epochs(self) -> None:
        epoch = 0
        while True:
            try:
                call = self._fleet().next_membership.remote(after=epoch, timeout_s=POLL_S)
                members = await asyncio.wait_for(call, 2 * POLL_S)
            except Exception as error:  # noqa: BLE001 as in _hold_lease
                await self._start_over("did not say who its shards are", error)
                continue
            if members is not None:
                epoch = members.epoch
                self._on_members(members)

    async def _start_over(self, what: str, error: Exception) -> None:
        logger.error("the Fleet %s; trying again: %s: %s", what, type(error).__name__, error)
        self._handle = None
        await asyncio.sleep(RETRY_S)

    def _fleet(self) -> Any:
        """The application's Fleet, started if there is none. The handle outlives restarts of the Fleet."""
        if self._handle is None:
            from deploy.fleet import Fleet  # imports torch, which building the application need not wait for

            self._handle = (
                ray.remote(Fleet)
                .options(
                    name=fleet_name(self._app),
                    namespace=NAMESPACE,
                    lifetime="detached",
                    max_restarts=-1,
                    max_task_retries=-1,
                    max_concurrency=1000,
                    get_if_exists=True,
                    num_cpus=0,
                )
                .remote(self._app)
            )
        return self._handle
