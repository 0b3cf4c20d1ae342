"""A `sparkmoe serve` in a process of its own, for tests that speak to it over HTTP."""

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from openai import AsyncOpenAI, OpenAI

from deploy.api.readiness import FRESH_S
from deploy.cli.readiness import LaunchError, readiness
from deploy.cli.server_process import server_process
from tests.support.places import DEMO_CONFIG

START_S = 120

T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    url: str
    process: subprocess.Popen[str]

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def async_client(self) -> AsyncOpenAI:
        return AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def detail(self) -> dict[str, Any]:
        """Return what /ready says of the router and its shards, no older than this call."""
        time.sleep(FRESH_S)
        return readiness(self.url)[2]

    def shard_pids(self) -> dict[int, int]:
        return {shard["rank"]: shard["pid"] for shard in self.detail().get("shards", [])}

    def wait_until_ready(self, *, timeout_s: float = START_S) -> None:
        time.sleep(FRESH_S)
        eventually(lambda: is_ready(self.url), what=f"{self.url} is ready", timeout_s=timeout_s)


def eventually(condition: Callable[[], T], *, what: str, timeout_s: float) -> T:
    """Return the first true value of the condition; raises AssertionError naming `what` if the time is up."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what}")


@contextlib.contextmanager
def serving(
    *settings: str, config: Path = DEMO_CONFIG, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """Yield a running `sparkmoe serve` with --set settings on a free port; at the end it is interrupted, and
    must exit by itself."""
    with server_process(config, settings=settings, environment=environment, start_timeout_s=START_S) as (
        url,
        process,
    ):
        yield Server(url=url, process=process)
    assert process.returncode == 0, "it must stop in order"


def is_ready(url: str) -> bool:
    try:
        return readiness(url)[0]
    except LaunchError:
        return False
