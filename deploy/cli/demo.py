"""The demo (`make demo`): start configs/demo.yaml, ask it two questions, and stop it again."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deploy.cli.readiness import readiness
from deploy.cli.server_process import NotReady, server_process

START_TIMEOUT_S = 300


def main() -> None:
    print("starting a router and two expert shards ...", flush=True)
    began = time.monotonic()
    try:
        with server_process(Path("configs/demo.yaml"), start_timeout_s=START_TIMEOUT_S) as (url, _):
            print(f"ready after {time.monotonic() - began:.1f} s")
            answered = _ask(url)
            _print_shards(url)
    except NotReady as error:
        sys.exit(f"{error}; its messages are above")
    if not answered:
        sys.exit("an answer had no text")


def _ask(url: str) -> bool:
    """Ask two questions; return whether both answers had text."""
    from openai import OpenAI  # takes a second, which the start of the server need not wait for

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)
    asked: dict[str, Any] = {
        "model": "demo",
        "max_tokens": 120,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    question = "Write a Python function: Return the sum of two numbers."
    print(f"\n--- chat: {question}")
    messages: Any = [{"role": "user", "content": question}]
    chat = _print_stream(
        lambda: client.chat.completions.create(messages=messages, **asked),
        lambda choice: choice.delta.content,
    )
    prompt = "def read_file(path):\n"
    print(f"\n--- completion: {prompt.strip()}")
    completion = _print_stream(
        lambda: client.completions.create(prompt=prompt, **asked), lambda choice: choice.text
    )
    return bool(chat and completion)


def _print_stream(ask: Callable[[], Any], text_of: Callable[[Any], str | None]) -> int:
    """Print the text as it comes, then the time to its first piece and the rate after it; return its length.

    ask: sends the request. The clock starts before it is called, because the answer's headers come with its
    first event.
    """
    began, first, num_characters, num_tokens = time.perf_counter(), 0.0, 0, 0
    for chunk in ask():
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
    _, _, detail = readiness(url)
    print(f"\n--- router: pid {detail['router_pid']}, {detail['num_steps']} steps")
    for shard in detail["shards"]:
        print(
            f"    shard {shard['rank']}: pid {shard['pid']}, {shard['num_pairs']} (token, expert) pairs computed"
        )


if __name__ == "__main__":
    main()
