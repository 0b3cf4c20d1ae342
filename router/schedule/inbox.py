"""Mailbox: what other threads ask of the engine, taken over by its own thread between two steps."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

from experts.fabric import Membership
from router.schedule.running import RunningRequest


@dataclass(frozen=True)
class Mail:
    """Taken in one go: requests to start, ids to forget, the newest membership to enter, whether all requests' time is up."""

    submitted: tuple[RunningRequest, ...] = ()
    cancelled: tuple[str, ...] = ()
    members: Membership | None = None
    expire_all: bool = False


class Mailbox:
    """All methods may be called from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._submitted: list[RunningRequest] = []
        self._cancelled: list[str] = []
        self._members: Membership | None = None
        self._expire_all = False
        self._closed = False

    @property
    def num_submitted(self) -> int:
        return len(self._submitted)

    @property
    def closed(self) -> bool:
        return self._closed

    def submit(self, request: RunningRequest) -> None:
        with self._changed:
            self._submitted.append(request)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        with self._changed:
            self._cancelled.append(request_id)
            self._changed.notify()

    def adopt(self, members: Membership) -> None:
        with self._changed:
            self._members = members
            self._changed.notify()

    def expire_all(self) -> None:
        with self._changed:
            self._expire_all = True
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()

    def take(self, *, or_until: Callable[[], bool], timeout_s: float) -> Mail:
        """Wait for mail, for `or_until` to be true, or for the timeout; then everything that has come."""
        with self._changed:
            self._changed.wait_for(lambda: self._any() or or_until(), timeout_s)
            mail = Mail(tuple(self._submitted), tuple(self._cancelled), self._members, self._expire_all)
            self._submitted, self._cancelled, self._members, self._expire_all = [], [], None, False
            return mail

    def _any(self) -> bool:
        return bool(self._closed or self._submitted or self._cancelled or self._members or self._expire_all)
