"""Retries: the plans of steps that shards failed in, which are run again before anything new is planned."""

import logging

from router.schedule.running import RunningRequest
from router.schedule.step_plan import StepPlan

logger = logging.getLogger(__name__)

MAX_TOGETHER = 2
"""Failures after which the requests of a plan are run one by one, because one of them may be what kills the shards."""

MAX_FAILURES = 4
"""Failures after which a request that runs alone is given up, or it would keep all others waiting for ever."""


class Retries:
    """Lives in the engine's thread. num_failures: since the last step that was not run again."""

    def __init__(self) -> None:
        self._plans: list[StepPlan] = []
        self.num_failures = 0

    @property
    def doubts_shards(self) -> bool:
        """A step has just failed for the second time: the shards had better be new ones before it is tried again."""
        return self.num_failures == MAX_TOGETHER

    def take(self) -> StepPlan | None:
        """The plan to run again now; None if there is none, and something new may be planned."""
        if not self._plans:
            self.num_failures = 0
            return None
        return self._plans.pop(0)

    def put(self, plan: StepPlan) -> RunningRequest | None:
        """A plan that failed. Returns the request to give up, if it is to blame."""
        self.num_failures += 1
        if len(plan.parts) == 1 and self.num_failures >= MAX_FAILURES:
            self.num_failures = 0
            return plan.parts[0].running
        again = plan.one_by_one() if self.num_failures >= MAX_TOGETHER else [plan]
        if len(again) > 1:
            logger.warning("shards failed in a step %d times: its requests run alone now", self.num_failures)
        self._plans = again + self._plans
        return None

    def forget(self, running: RunningRequest) -> None:
        """Leave a request out."""
        kept = (plan.without(running) for plan in self._plans)
        self._plans = [plan for plan in kept if plan]
