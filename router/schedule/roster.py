"""Roster: every request that the engine holds, from its arrival to its last output."""

import math
from collections.abc import Iterable

from router.request import RequestOutput
from router.schedule.retries import Retries
from router.schedule.running import RunningRequest
from router.schedule.scheduler import Scheduler
from router.schedule.step_plan import StepPlan


class Roster:
    """Requests by id, and what else must forget one that has ended. Lives in the engine's thread."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.retries = Retries()
        self._scheduler = scheduler
        self._live: dict[str, RunningRequest] = {}
        self._earliest = math.inf  # of the deadlines; its request may have ended already

    def __len__(self) -> int:
        return len(self._live)

    def add(self, live: RunningRequest) -> None:
        """It waits for its first step."""
        self._live[live.request.id] = live
        self._scheduler.add(live)
        self._earliest = min(self._earliest, live.deadline)

    def next_plan(self) -> StepPlan:
        """Of a step to be tried again, else a new one. Not if there is no request."""
        return self.retries.take() or self._scheduler.plan()

    def forget(self, request_id: str) -> None:
        """Its row and blocks are free at once. Unknown ids are ignored."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self._scheduler.remove(live)
            self.retries.forget(live)

    def fail(self, why: str, ones: Iterable[RunningRequest] | None = None) -> list[RequestOutput]:
        """Forget these requests, or all, with an error."""
        failed = [live.request.id for live in (self._live.values() if ones is None else ones)]
        for request_id in failed:
            self.forget(request_id)
        return [RequestOutput(id=request_id, finish="error", error=why) for request_id in failed]

    def expire(self, now: float) -> list[RequestOutput]:
        """Forget requests whose time is up; each keeps the text that it has."""
        if now < self._earliest:
            return []
        late = [live for live in self._live.values() if live.deadline <= now]
        for live in late:
            self.forget(live.request.id)
        self._earliest = min((live.deadline for live in self._live.values()), default=math.inf)
        return [live.answer.expire() for live in late]
