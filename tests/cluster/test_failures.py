"""Processes are killed and stopped while tokens flow."""

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Sequence

import openai
import pytest

from tests.support.server import Server, eventually

pytestmark = pytest.mark.cluster

NUM_STREAMS = 16
NUM_TOKENS = 60

DEAD_AFTER_S = 3.0
"""The shared server's fabric.dead_after_s."""

LOAD_S = 30.0
"""A new shard takes a few seconds from its start to its first answer; on a machine that others use, this at
most."""


class Arrivals:
    """The times at which text came: in any stream, and for the first time in each."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.begun = asyncio.Semaphore(0)

    def note(self, *, first: bool) -> None:
        self.times.append(time.monotonic())
        if first:
            self.begun.release()

    def longest_pause_s(self) -> float:
        return max(later - earlier for earlier, later in itertools.pairwise(self.times))


async def _stream(server: Server, index: int, arrivals: Arrivals) -> str:
    text = ""
    async with server.async_client() as client:
        stream = await client.completions.create(
            model="demo",
            prompt=f"def function_{index}(x):\n",
            max_tokens=NUM_TOKENS,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for chunk in stream:
            if chunk.choices[0].text:
                arrivals.note(first=not text)
            text += chunk.choices[0].text
    return text


async def _streams(
    server: Server, *, kill: Sequence[int] = (), number: signal.Signals = signal.SIGKILL
) -> tuple[list[str | BaseException], float]:
    """Return the texts of all streams, and the longest time in which none had any.

    kill: processes that are sent the signal once every stream has had text and none has ended.
    """
    arrivals = Arrivals()
    tasks = [asyncio.create_task(_stream(server, index, arrivals)) for index in range(NUM_STREAMS)]
    for _ in tasks:
        await arrivals.begun.acquire()
    assert not any(task.done() for task in tasks)
    for pid in kill:
        os.kill(pid, number)
    texts = await asyncio.gather(*tasks, return_exceptions=True)
    return texts, arrivals.longest_pause_s()


def test_streams_survive_a_killed_shard(server: Server) -> None:
    undisturbed, _ = asyncio.run(_streams(server))
    before = server.shard_pids()
    texts, pause_s = asyncio.run(_streams(server, kill=[before[1]]))
    assert texts == undisturbed
    assert pause_s < LOAD_S
    after = server.shard_pids()
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_a_shard_that_hangs_is_replaced_after_the_deadline(server: Server) -> None:
    undisturbed, _ = asyncio.run(_streams(server))
    before = server.shard_pids()
    texts, pause_s = asyncio.run(_streams(server, kill=[before[0]], number=signal.SIGSTOP))
    assert texts == undisturbed
    assert 0.9 * DEAD_AFTER_S < pause_s < DEAD_AFTER_S + LOAD_S
    assert server.shard_pids()[0] != before[0]
    eventually(lambda: not _is_alive(before[0]), what="the stopped process is gone", timeout_s=30)


def test_a_killed_router_fails_its_requests_and_its_successor_takes_the_shards_over(server: Server) -> None:
    before, router_pid = server.shard_pids(), server.detail()["router_pid"]
    texts, _ = asyncio.run(_streams(server, kill=[router_pid]))
    assert all(isinstance(error, openai.APIError) and "router died" in str(error) for error in texts), texts
    server.wait_until_ready()
    assert server.detail()["router_pid"] != router_pid
    assert server.shard_pids() == before
    assert all(isinstance(text, str) and text for text in asyncio.run(_streams(server))[0])


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


def test_streams_survive_their_fleet_and_all_shards_killed_together(server: Server) -> None:
    undisturbed, _ = asyncio.run(_streams(server))
    before = server.detail()
    shards = server.shard_pids().values()
    texts, pause_s = asyncio.run(_streams(server, kill=[before["fleet_pid"], *shards]))
    assert texts == undisturbed
    assert pause_s < LOAD_S
    assert server.detail()["epoch"] > before["epoch"]
    assert not set(shards) & set(server.shard_pids().values())


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
