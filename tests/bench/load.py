"""200 streams on a server that runs 64 of them and lets 64 wait, beside 64 streams alone.

    python -m tests.bench.load [--output FILE]

One server, the demo model as configs/demo.yaml says, behind Serve's HAProxy, and three phases: 64 streams for a minute, 200 for two, 64 for
one. A stream is a client that asks, reads the answer and asks again; when it is refused (429) it waits as long as the
answer says. Prompts are pieces of this project's code, 30 to 300 tokens, no two alike; answers have 32 to 128 tokens.

Goodput: tokens of the answers that ended in a phase, its first seconds left out. At the end of each phase the last
answers are waited for, and then no block may be taken; sockets and memory of every process are compared.
"""

import argparse
import asyncio
import random
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from deploy.cli.readiness import LaunchError, readiness
from tests.bench.client import Streamed, stream
from tests.bench.report import emit, percentile
from tests.support.places import ROOT
from tests.support.server import Server, serving

MAX_REQUESTS, MAX_QUEUE = 64, 64
PHASES = (("64 alone", 64, 60), ("200", 200, 120), ("64 alone, again", 64, 60))
SKIPPED_S = 10
"""Seconds at the beginning of each phase that do not count, until its streams are out of step."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    options = parser.parse_args()
    settings = (f"router.max_requests={MAX_REQUESTS}", f"router.max_queue={MAX_QUEUE}")
    rows = []
    with serving(*settings, environment={"RAY_SERVE_ENABLE_HA_PROXY": "1"}) as server:
        for name, num_streams, seconds in PHASES:
            phase = asyncio.run(_run(server.url, num_streams, seconds))
            rows.append({"phase": name, "streams": num_streams, **phase.summary(), **_left_behind(server)})
            print(rows[-1], flush=True)
    alone = statistics.mean(row["tokens_per_s"] for row in rows if row["streams"] == 64)
    flood = next(row for row in rows if row["streams"] != 64)
    flood["ratio"] = round(flood["tokens_per_s"] / alone, 3)
    print(f"200 streams / 64 alone: {flood['ratio']}")
    emit(
        "load",
        rows,
        config={"max_requests": MAX_REQUESTS, "max_queue": MAX_QUEUE, "haproxy": True},
        output=options.output,
    )


@dataclass
class Phase:
    """One phase of the load.

    begins, ends: of the time that counts. done: answers, with when they ended. running: as /ready said, each
    second.
    """

    begins: float
    ends: float
    done: list[tuple[float, Streamed]] = field(default_factory=list)
    statuses: Counter[str] = field(default_factory=Counter)
    running: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        counted = [one for ended, one in self.done if self.begins <= ended <= self.ends]
        tokens = sum(one.usage["completion_tokens"] for one in counted)
        first = [one.first_s * 1e3 for one in counted]
        gaps = [gap * 1e3 for one in counted for gap in one.gaps_s]
        return {
            "tokens_per_s": round(tokens / (self.ends - self.begins), 1),
            "answers": len(counted),
            "statuses": dict(self.statuses),
            "ttft_ms": {f"p{p}": round(percentile(first, p)) for p in (50, 99)},
            "itl_ms": {f"p{p}": round(percentile(gaps, p), 1) for p in (50, 99)},
            "running": {"min": min(self.running), "median": statistics.median(self.running)},
        }


async def _run(url: str, num_streams: int, seconds: float) -> Phase:
    now = time.perf_counter()
    phase = Phase(begins=now + SKIPPED_S, ends=now + seconds)
    limits = httpx.Limits(max_connections=num_streams)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client, asyncio.TaskGroup() as tasks:
        tasks.create_task(_watch(url, phase))
        for number in range(num_streams):
            tasks.create_task(_ask_again_and_again(client, url, phase, _bodies(number)))
    return phase


async def _ask_again_and_again(
    client: httpx.AsyncClient, url: str, phase: Phase, bodies: Iterator[dict[str, Any]]
) -> None:
    for body in bodies:
        if time.perf_counter() >= phase.ends:
            return
        try:
            streamed = await stream(client, url, body)
        except httpx.HTTPError as error:
            phase.statuses[type(error).__name__] += 1
            continue
        phase.statuses[str(streamed.status)] += 1
        if streamed.status == 200:
            phase.done.append((time.perf_counter(), streamed))
        await asyncio.sleep(streamed.retry_after_s)


def _bodies(number: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(number)
    code = "".join(path.read_text() for path in sorted((ROOT / "router").rglob("*.py")))
    while True:
        begin = rng.randrange(len(code) - 1000)
        yield {
            "model": "demo",
            "prompt": code[begin : begin + rng.randint(100, 1000)],
            "max_tokens": rng.randint(32, 128),
            "ignore_eos": True,
            "temperature": 1.0,
            "stream_options": {"include_usage": True},
        }


async def _watch(url: str, phase: Phase) -> None:
    await asyncio.sleep(phase.begins - time.perf_counter())
    while time.perf_counter() < phase.ends:
        await asyncio.sleep(1)
        try:
            phase.running.append((await asyncio.to_thread(readiness, url))[2]["num_running"])
        except LaunchError as error:
            phase.statuses[f"/ready: {error}"] += 1


def _left_behind(server: Server) -> dict[str, Any]:
    """Return how many blocks no request holds and yet are not free, and the sockets and memory of every
    process."""
    time.sleep(1)
    detail = server.detail()
    pids = {"router": detail["router_pid"], "ingress": detail["ingress_pid"]}
    pids |= {f"shard {rank}": pid for rank, pid in server.shard_pids().items()}
    return {
        "blocks_taken": detail["num_blocks"] - detail["num_free_blocks"],
        "preempted": detail["num_preempted"],
        "sockets": {name: _num_sockets(pid) for name, pid in pids.items()},
        "rss_mib": {name: _rss_mib(pid) for name, pid in pids.items()},
    }


def _num_sockets(pid: int) -> int:
    links = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        try:
            links.append(str(descriptor.readlink()))
        except FileNotFoundError:  # closed meanwhile
            continue
    return sum(link.startswith("socket:") for link in links)


def _rss_mib(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) // 1024


if __name__ == "__main__":
    main()
