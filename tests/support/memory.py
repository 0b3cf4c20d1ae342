"""A measure of how much memory tensors take at most while something runs on a CPU."""

from collections.abc import Callable
from typing import Any, TypeVar

from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


def peak_of_tensors(action: Callable[[], Result]) -> tuple[Result, int]:
    """Return (result, peak of bytes that torch's CPU allocator held beyond those it held before)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
    now = peak = 0
    legacy: Any = profiler.profiler
    events: list[Any] = legacy.kineto_results.events()
    for event in events:
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return result, peak
