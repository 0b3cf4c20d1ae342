"""A `sparkmoe serve` in a process of its own, for tests that speak to it over HTTP."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from openai import AsyncOpenAI, OpenAI

from deploy.launch import LaunchError, readiness

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo.yaml"
START_S = 120
STOP_S = 60

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
        """What /ready says of the router and its shards."""
        return readiness(self.url)[2]

    def shard_pids(self) -> dict[int, int]:
        return {shard["rank"]: shard["pid"] for shard in self.detail().get("shards", [])}

    def wait_until_ready(self, *, timeout_s: float = START_S) -> None:
        eventually(lambda: is_ready(self.url), what=f"{self.url} is ready", timeout_s=timeout_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def eventually(condition: Callable[[], T], *, what: str, timeout_s: float) -> T:
    """The first true value of the condition; AssertionError naming `what` if the time is up."""
    ends = time.monotonic() + timeout_s
    while time.monotonic() < ends:
        if value := condition():
            return value
        time.sleep(0.05)
    raise AssertionError(f"not within {timeout_s} s: {what}")


@contextlib.contextmanager
def serving(
    *settings: str, config: Path = DEMO, environment: dict[str, str] | None = None
) -> Iterator[Server]:
    """`sparkmoe serve` with --set settings on a free port; at the end it is interrupted, and must exit by itself."""
    port = free_port()
    options = [part for setting in (*settings, f"http_options.port={port}") for part in ("--set", setting)]
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy", "serve", str(config), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    watchdog = _kill_after(process, START_S)
    try:
        assert process.stdout is not None
        ready = next((line for line in process.stdout if line.startswith("ready ")), None)
        watchdog.terminate()
        watchdog.wait()
        assert ready is not None, f"the server ended with {process.wait()} before it was ready"
        yield Server(url=ready.split()[1], process=process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(STOP_S) == 0, "it must stop in order"
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def _kill_after(process: subprocess.Popen[str], seconds: int) -> subprocess.Popen[bytes]:
    """A process that kills another one when the time is up, so that a read of its output cannot wait for ever."""
    return subprocess.Popen(["sh", "-c", f"sleep {seconds}; kill -9 {process.pid}"])


def is_ready(url: str) -> bool:
    try:
        return readiness(url)[0]
    except LaunchError:
        return False
