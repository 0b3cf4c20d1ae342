"""Virtual time passes at once where nobody does anything, and waits for threads."""

import asyncio
import time
from typing import Any

import pytest

from tests.support.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualTimeLoop}


async def test_timers_come_in_their_order_and_at_once() -> None:
    began, woken = time.monotonic(), []

    async def wake_after(seconds: float) -> None:
        await asyncio.sleep(seconds)
        woken.append((seconds, asyncio.get_running_loop().time()))

    start = asyncio.get_running_loop().time()
    await asyncio.gather(*map(wake_after, (3600.0, 60.0, 61.0)))
    assert woken == [(seconds, pytest.approx(start + seconds)) for seconds in (60.0, 61.0, 3600.0)]
    assert time.monotonic() - began < 60


async def test_a_thread_is_waited_for_in_real_time() -> None:
    async with asyncio.timeout(30):
        await asyncio.to_thread(time.sleep, 0.05)
        await asyncio.to_thread(time.sleep, 0.05)
    assert 0.05 < asyncio.get_running_loop().time() < 30
