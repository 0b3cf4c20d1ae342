"""A deadline for an awaitable."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float, answer: Awaitable[T]) -> T:
    """Return what the awaitable returns. Raises TimeoutError when the time is up.

    Used instead of asyncio.wait_for, which in Python 3.11 loses a cancellation that comes together with the
    answer: a loop around it would never end.
    """
    async with asyncio.timeout(seconds):
        return await answer
