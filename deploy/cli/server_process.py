"""A server in a process of its own (`sparkmoe serve`), for the demo and for tests."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STOP_S = 60


class NotReady(Exception):
    """The server ended before it was ready, or was killed because the time was up.

    Its messages are on stderr.
    """


@contextlib.contextmanager
def server_process(
    config: Path,
    *,
    settings: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    start_timeout_s: float,
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Start a server and yield (URL, process) when it is ready, on a free port unless a setting names one.

    At the end of this context it is interrupted as by Ctrl-C, and killed if it does not stop within STOP_S:
    `returncode` is 0 if it stopped. Raises NotReady.
    """
    settings = [f"http_options.port={free_port()}", *settings]
    options = [part for setting in settings for part in ("--set", setting)]
    process = subprocess.Popen(
        [sys.executable, "-m", "deploy", "serve", str(config), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **(environment or {})},
    )
    try:
        yield _wait_for_url(process, start_timeout_s), process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for_url(process: subprocess.Popen[str], timeout_s: float) -> str:
    assert process.stdout is not None
    watchdog = threading.Timer(timeout_s, process.kill)  # because reading a line has no timeout
    watchdog.start()
    try:
        ready = next((line for line in process.stdout if line.startswith("ready ")), None)
    finally:
        watchdog.cancel()
    if ready is None:
        raise NotReady(f"the server ended with {process.wait()} before it was ready")
    return ready.split()[1]
