"""Deadlines of what is awaited."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


async def within(seconds: float, answer: Awaitable[T]) -> T:
    """The answer; TimeoutError when the time is up.

    Python 3.11's asyncio.wait_for loses a cancellation that comes together with the answer: a loop around it never ends.
    """
    async with asyncio.timeout(seconds):
        return await answer
