"""Processes are killed and stopped while tokens flow."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable

import openai
import pytest

from tests.cluster.server import Server, eventually

pytestmark = pytest.mark.cluster

NUM_STREAMS = 16
NUM_TOKENS = 60


async def _stream(server: Server, index: int, *, on_first: Callable[[], None] = lambda: None) -> str:
    stream = await server.async_client().completions.create(
        model="demo",
        prompt=f"def function_{index}(x):\n",
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = ""
    async for chunk in stream:
        if chunk.choices[0].text and not text:
            on_first()
        text += chunk.choices[0].text
    return text


async def _streams(
    server: Server, *, meanwhile: Callable[[], Awaitable[None]] | None = None
) -> list[str | BaseException]:
    """The texts of all streams; `meanwhile` is awaited once each of them has had text and none has ended."""
    waiting = asyncio.Semaphore(0)
    tasks = [asyncio.create_task(_stream(server, i, on_first=waiting.release)) for i in range(NUM_STREAMS)]
    for _ in tasks:
        await waiting.acquire()
    if meanwhile is not None:
        assert not any(task.done() for task in tasks)
        await meanwhile()
    return await asyncio.gather(*tasks, return_exceptions=True)


def _send(pid: int, number: signal.Signals) -> Callable[[], Awaitable[None]]:
    async def send() -> None:
        os.kill(pid, number)

    return send


def test_streams_survive_a_killed_shard(server: Server) -> None:
    undisturbed = asyncio.run(_streams(server))
    before = server.shard_pids()
    texts = asyncio.run(_streams(server, meanwhile=_send(before[1], signal.SIGKILL)))
    assert texts == undisturbed
    after = server.shard_pids()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_shard_that_hangs_is_replaced_after_the_deadline(server: Server) -> None:
    undisturbed = asyncio.run(_streams(server))
    before = server.shard_pids()
    texts = asyncio.run(_streams(server, meanwhile=_send(before[0], signal.SIGSTOP)))
    assert texts == undisturbed
    assert server.shard_pids()[0] != before[0]
    eventually(lambda: not _is_alive(before[0]), what="the stopped process is gone", timeout_s=30)


def test_a_killed_router_fails_its_requests_and_its_successor_takes_the_shards_over(server: Server) -> None:
    before, router_pid = server.shard_pids(), server.detail()["router_pid"]
    texts = asyncio.run(_streams(server, meanwhile=_send(router_pid, signal.SIGKILL)))
    assert all(isinstance(error, openai.APIError) and "router died" in str(error) for error in texts), texts
    server.wait_until_ready()
    assert server.detail()["router_pid"] != router_pid
    assert server.shard_pids() == before
    assert all(isinstance(text, str) and text for text in asyncio.run(_streams(server)))


def test_a_killed_fleet_comes_back_and_still_replaces_shards(server: Server) -> None:
    before, fleet_pid = server.shard_pids(), server.detail()["fleet_pid"]
    os.kill(fleet_pid, signal.SIGKILL)
    eventually(
        lambda: server.detail().get("fleet_pid") not in (None, fleet_pid),
        what="Ray restarts the Fleet",
        timeout_s=60,
    )
    assert server.shard_pids() == before, "the shards outlive their Fleet"
    os.kill(before[0], signal.SIGKILL)
    eventually(
        lambda: server.shard_pids().get(0) not in (None, before[0]), what="shard 0 is replaced", timeout_s=60
    )
    server.wait_until_ready()
    assert server.shard_pids()[1] == before[1]


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
