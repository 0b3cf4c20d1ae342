"""Inbox: what other threads ask of the engine, taken over by its own thread between two steps."""

import threading
from dataclasses import dataclass

from experts.fabric import Membership
from router.schedule.running import RunningRequest


@dataclass(frozen=True)
class Mail:
    """Everything that was asked since the last look: requests to start and ids to forget, the newest membership.

    expire_all: the time of every request is up.
    """

    submitted: tuple[RunningRequest, ...] = ()
    cancelled: tuple[str, ...] = ()
    members: Membership | None = None
    expire_all: bool = False


class Inbox:
    """A mailbox of the engine's thread. Any thread may call any method."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._submitted: list[RunningRequest] = []
        self._cancelled: list[str] = []
        self._members: Membership | None = None
        self._expire_all = False
        self.closed = False

    @property
    def num_submitted(self) -> int:
        """The number of requests that the engine has not taken yet."""
        return len(self._submitted)

    def submit(self, request: RunningRequest) -> None:
        """Ask for a request to be started."""
        with self._changed:
            self._submitted.append(request)
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """Ask for a request to be forgotten."""
        with self._changed:
            self._cancelled.append(request_id)
            self._changed.notify()

    def adopt(self, members: Membership) -> None:
        """Ask for an epoch to be entered. Only the newest counts."""
        with self._changed:
            self._members = members
            self._changed.notify()

    def expire_all(self) -> None:
        """Ask for every request to end as if its time were up."""
        with self._changed:
            self._expire_all = True
            self._changed.notify()

    def close(self) -> None:
        """Ask the engine's thread to end."""
        with self._changed:
            self.closed = True
            self._changed.notify()

    def take(self, *, timeout_s: float) -> Mail:
        """Wait for mail, at most for the timeout, and return everything that has come."""
        with self._changed:
            if timeout_s > 0:
                self._changed.wait_for(self._any, timeout_s)
            mail = Mail(tuple(self._submitted), tuple(self._cancelled), self._members, self._expire_all)
            self._submitted, self._cancelled, self._members, self._expire_all = [], [], None, False
            return mail

    def _any(self) -> bool:
        return bool(self.closed or self._submitted or self._cancelled or self._members or self._expire_all)
