"""`make demo`: start configs/demo.yaml, ask it two questions with the openai client, stop it again."""

import contextlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from openai import OpenAI

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 60


def main() -> None:
    with _server() as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
        question = "Write a Python function: Return the sum of two numbers."
        print(f"\n--- chat: {question}")
        chat = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": question}],
            max_tokens=120,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        num_characters = _print_stream(chat, lambda choice: choice.delta.content)
        print("\n--- completion: def read_file(path):")
        completion = client.completions.create(
            model="demo",
            prompt="def read_file(path):\n",
            max_tokens=120,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
        num_characters *= _print_stream(completion, lambda choice: choice.text)
        _print_shards(url)
    if not num_characters:
        sys.exit("an answer had no text")


def _print_stream(chunks: Iterable[Any], text_of: Any) -> int:
    """Print text as it comes, then the time to the first of it and the rate after; how many characters came."""
    began, first, num_characters, num_tokens = time.perf_counter(), 0.0, 0, 0
    for chunk in chunks:
        if chunk.usage:
            num_tokens = chunk.usage.completion_tokens
        for choice in chunk.choices:
            if text := text_of(choice):
                first = first or time.perf_counter()
                num_characters += len(text)
                print(text, end="", flush=True)
    ended = time.perf_counter()
    rate = (num_tokens - 1) / (ended - first) if first and num_tokens > 1 else 0.0
    print(f"\n[{num_tokens} tokens, first after {1000 * (first - began):.0f} ms, then {rate:.0f} tokens/s]")
    return num_characters


def _print_shards(url: str) -> None:
    from deploy.launch import readiness  # torch, for which the server's start need not wait

    _, _, detail = readiness(url)
    print(f"\n--- router: pid {detail['router_pid']}, {detail['num_steps']} steps")
    for shard in detail["shards"]:
        print(
            f"    shard {shard['rank']}: pid {shard['pid']}, {shard['num_pairs']} (token, expert) pairs computed"
        )


@contextlib.contextmanager
def _server() -> Iterator[str]:
    """`sparkmoe serve` in a process of its own, on a free port; stopped as Ctrl-C would."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "deploy",
        "serve",
        "configs/demo.yaml",
        "--set",
        f"http_options.port={port}",
    ]
    print("starting a router and two expert shards ...", flush=True)
    began = time.monotonic()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    watchdog = signal.signal(signal.SIGALRM, lambda *_: server.kill())
    signal.alarm(START_TIMEOUT_S)
    try:
        assert server.stdout is not None
        ready = next((line for line in server.stdout if line.startswith("ready ")), None)
        signal.alarm(0)
        if ready is None:
            sys.exit("the server did not start; its messages are above")
        print(f"ready after {time.monotonic() - began:.1f} s")
        yield ready.split()[1]
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, watchdog)
        server.send_signal(signal.SIGINT)
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()


if __name__ == "__main__":
    main()
