"""Quotas: what the owner of one API key may use at a time, and what is used.

They are counted in each ingress by itself: with several, a key has as many times its quota. The clock is given.
"""

import math
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from deploy.api.http.errors import ApiError

Clock = Callable[[], float]
"""Seconds of a clock that never goes back."""


@dataclass(frozen=True)
class Quota:
    """The quota of a key.

    requests: at a time, every choice of every prompt counted. tokens_per_minute: of prompts and answers, on
    the average. Both None for no limit. priority: whether its requests may have a priority.
    """

    requests: int | None = None
    tokens_per_minute: int | None = None
    priority: bool = False


UNLIMITED = Quota()


class TokenBucket:
    """A bucket of tokens that fills steadily, up to what a minute brings.

    It may be overdrawn, because nobody knows the length of an answer before: then it is empty until the debt
    is paid.
    """

    def __init__(self, per_minute: int, *, now: float) -> None:
        self._per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def spend(self, tokens: int, *, now: float) -> None:
        """Take tokens out, also more than there are."""
        self._fill(now)
        self._level -= tokens

    def wait_s(self, *, now: float) -> float:
        """Return the seconds until there is a token, 0 if there is one."""
        self._fill(now)
        return max(0.0, 1 - self._level) * 60 / self._per_minute

    def _fill(self, now: float) -> None:
        self._level = min(self._per_minute, self._level + (now - self._at) * self._per_minute / 60)
        self._at = now


class Account:
    """The present use of one key by its owner. Lives in one event loop."""

    def __init__(self, quota: Quota, *, clock: Clock) -> None:
        self._clock = clock
        self._running = 0
        self._quota = UNLIMITED
        self._bucket: TokenBucket | None = None
        self.allow(quota)

    @property
    def running(self) -> int:
        """The requests that run."""
        return self._running

    @property
    def may_set_priority(self) -> bool:
        return self._quota.priority

    def allow(self, quota: Quota) -> None:
        """Give the account another quota. What it has used counts on, unless its tokens a minute change."""
        if quota.tokens_per_minute != self._quota.tokens_per_minute:
            per_minute = quota.tokens_per_minute
            self._bucket = None if per_minute is None else TokenBucket(per_minute, now=self._clock())
        self._quota = quota

    def begin(self, requests: int) -> None:
        """Count more requests that run. Raises ApiError 429 if they are too many, or tokens have run out."""
        most = self._quota.requests
        if most is not None and self._running + requests > most:
            why = f"This API key may have {most} requests at a time; {self._running} run and {requests} more came."
            raise _exceeded(why, retry_after_s=1.0)
        if self._bucket is not None and (wait_s := self._bucket.wait_s(now=self._clock())):
            why = f"This API key has used its {self._quota.tokens_per_minute} tokens a minute."
            raise _exceeded(why, retry_after_s=math.ceil(wait_s))
        self._running += requests

    def end(self, requests: int) -> None:
        """Count requests that run no more."""
        self._running -= requests
        assert self._running >= 0

    def spend(self, tokens: int) -> None:
        """Count tokens of prompts or answers."""
        if self._bucket is not None:
            self._bucket.spend(tokens, now=self._clock())


class Use:
    """The use that one HTTP request makes of an account, from its beginning to `end`."""

    def __init__(self, account: Account) -> None:
        """Begin. Raises ApiError 429."""
        account.begin(1)
        self._account = account
        self._requests = 1

    def grow_to(self, requests: int) -> None:
        """Count an HTTP request as so many, for the engine. Raises ApiError 429."""
        more = requests - self._requests
        if more > 0:
            self._account.begin(more)
            self._requests = requests

    def spend(self, tokens: int) -> None:
        self._account.spend(tokens)

    def check_priority(self, priority: int) -> None:
        """Raise ApiError 403 for a priority that the key may not have."""
        if priority and not self._account.may_set_priority:
            raise ApiError(403, "This API key may not set a priority.", param="priority")

    def end(self) -> None:
        self._account.end(self._requests)


current_use: ContextVar[Use | None] = ContextVar("current_use", default=None)
"""The use that the request of the current task makes of its key's account; None where there are no keys."""


def _exceeded(why: str, *, retry_after_s: float) -> ApiError:
    return ApiError(429, why, code="rate_limit_exceeded", retry_after_s=retry_after_s)
