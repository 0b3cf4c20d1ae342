"""A deadline, and a cancellation that comes together with the answer."""

import asyncio

import pytest

from deploy.within import within

pytestmark = pytest.mark.anyio


async def test_an_answer_in_time() -> None:
    answer = asyncio.get_running_loop().create_future()
    answer.set_result("yes")
    assert await within(1, answer) == "yes"


async def test_what_comes_too_late_is_cancelled() -> None:
    answer = asyncio.get_running_loop().create_future()
    with pytest.raises(TimeoutError):
        await within(0.01, answer)
    assert answer.cancelled()


@pytest.mark.parametrize("failed", [False, True])
async def test_a_cancellation_is_not_lost(failed: bool) -> None:
    answer = asyncio.get_running_loop().create_future()
    waiting = asyncio.create_task(within(1, answer))
    await asyncio.sleep(0)
    if failed:
        answer.set_exception(OSError())
    else:
        answer.set_result("yes")
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
