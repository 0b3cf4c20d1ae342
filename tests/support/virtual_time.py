"""An event loop whose time passes at once while nobody does anything, so that a test may wait for a minute,
or see that nothing happens in one."""

import asyncio
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next timer when no task is ready.

    While a thread of an executor works, or a socket is watched, time passes as on the wall. Code sees the virtual time in
    loop.time(), asyncio.sleep and asyncio.timeout; time.monotonic() knows nothing of it.
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._num_in_threads = 0
        super().__init__(_JumpingSelector(self._pass))

    def time(self) -> float:
        return self._now

    def run_in_executor(
        self, executor: Executor | None, func: Callable[..., Any], *args: Any
    ) -> "asyncio.Future[Any]":
        future = super().run_in_executor(executor, func, *args)
        self._num_in_threads += 1
        future.add_done_callback(self._thread_is_done)
        return future

    def _thread_is_done(self, _: object) -> None:
        self._num_in_threads -= 1

    def _pass(
        self, wait: Callable[[float], list[Any]], seconds: float, *, watches_sockets: bool
    ) -> list[Any]:
        """Let so many seconds pass, fewer if `wait` for events ends sooner, and return the events."""
        if self._num_in_threads or watches_sockets:
            began = time.monotonic()
            events = wait(seconds)
            self._now += min(seconds, time.monotonic() - began)
            return events
        self._now += seconds
        return []


class _JumpingSelector(selectors.DefaultSelector):
    """A selector that leaves it to `on_idle` how the time passes when there is no event."""

    def __init__(self, on_idle: Callable[..., list[Any]]) -> None:
        super().__init__()
        self._on_idle = on_idle

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(timeout if timeout is None or timeout <= 0 else 0)
        if events or timeout is None or timeout <= 0:
            return events
        loops_own = 1  # the pipe that wakes it
        return self._on_idle(super().select, timeout, watches_sockets=len(self.get_map()) > loops_own)
