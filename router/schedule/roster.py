"""Roster: every request that the engine holds, from its arrival to its last output, and the plans of failed steps."""

import logging
import math
from collections.abc import Iterable

from router.request import RequestOutput
from router.schedule.running import RunningRequest
from router.schedule.scheduler import Scheduler
from router.schedule.step_plan import StepPlan

logger = logging.getLogger(__name__)

MAX_TOGETHER = 2
"""Failures in a row after which a plan's requests are run one by one: one of them may be what kills the shards."""

MAX_FAILURES = 4
"""Failures in a row after which a request that runs alone is given up, or it would keep all others waiting for ever."""


class Roster:
    """The live requests by id, and what else must forget one that has ended. Lives in the engine's thread.

    num_failures: steps that failed in a row, since the last step that was not a repetition.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self.num_failures = 0
        self._scheduler = scheduler
        self._live: dict[str, RunningRequest] = {}
        self._earliest_deadline = math.inf  # its request may have ended already
        self._failed_plans: list[StepPlan] = []

    def __len__(self) -> int:
        return len(self._live)

    @property
    def doubts_shards(self) -> bool:
        """True when a step has just failed for the second time: it had better be tried on new shards."""
        return self.num_failures == MAX_TOGETHER

    def add(self, live: RunningRequest) -> None:
        """Queue a request."""
        self._live[live.request.id] = live
        self._scheduler.add(live)
        self._earliest_deadline = min(self._earliest_deadline, live.deadline)

    def next_plan(self) -> StepPlan:
        """Return the plan of a failed step to run again, else a new one. There must be a request."""
        if self._failed_plans:
            return self._failed_plans.pop(0)
        self.num_failures = 0
        return self._scheduler.plan()

    def retry(self, plan: StepPlan) -> list[RequestOutput]:
        """Keep the plan of a step that shards failed in, to be run again before anything new is planned.

        Returns the output that gives a request up, if it has failed alone too often.
        """
        self.num_failures += 1
        if len(plan.parts) == 1 and self.num_failures >= MAX_FAILURES:
            self.num_failures = 0
            return self.fail("the expert shards failed in each of its steps", [plan.parts[0].running])
        again = plan.one_by_one() if self.num_failures >= MAX_TOGETHER else [plan]
        if len(again) > 1:
            logger.warning("shards failed in a step %d times: its requests run alone now", self.num_failures)
        self._failed_plans = again + self._failed_plans
        return []

    def forget(self, request_id: str) -> None:
        """Drop a request: its row and blocks are free at once. Unknown ids are ignored."""
        live = self._live.pop(request_id, None)
        if live is not None:
            self._scheduler.remove(live)
            kept = (plan.without(live) for plan in self._failed_plans)
            self._failed_plans = [plan for plan in kept if plan]

    def fail(
        self, why: str, ones: Iterable[RunningRequest] | None = None, *, at_fault: bool = False
    ) -> list[RequestOutput]:
        """Forget these requests, or all, and return the outputs that tell them of an error, see RequestOutput."""
        failed = [live.request.id for live in (self._live.values() if ones is None else ones)]
        for request_id in failed:
            self.forget(request_id)
        return [
            RequestOutput(id=request_id, finish="error", error=why, at_fault=at_fault)
            for request_id in failed
        ]

    def expire(self, now: float) -> list[RequestOutput]:
        """Forget requests whose deadline has passed, and return their last outputs: each keeps the text that it has."""
        if now < self._earliest_deadline:
            return []
        late = [live for live in self._live.values() if live.deadline <= now]
        for live in late:
            self.forget(live.request.id)
        self._earliest_deadline = min((live.deadline for live in self._live.values()), default=math.inf)
        return [live.answer.expire() for live in late]
