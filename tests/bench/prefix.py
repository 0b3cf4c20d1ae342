"""A measure of 50 prompts that begin with the same 1,000 tokens, beside 50 that begin with 1,000 of their own.

    python -m tests.bench.prefix [--output FILE]

The demo model as configs/demo.yaml says, over HTTP: one prompt after the other, and all at once. Of each set of
prompts, the tokens that were computed, which are those that `usage` does not call cached, and the time to the first
token. Every round has new tokens, so nothing is found that an earlier one left.
"""

import argparse
import asyncio
import random
import statistics
from collections.abc import Iterable
from typing import Any

import httpx

from tests.bench.client import Streamed, stream
from tests.bench.report import emit, spread
from tests.support.server import serving

NUM_REQUESTS = 50
PREFIX, REST, ANSWER = 1000, 8, 8
"""Tokens."""
NUM_ROUNDS = 3
VOCAB = range(300, 4000)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    options = parser.parse_args()
    rng = random.Random(0)
    kinds = [(order, prefix) for order in ("one by one", "at once") for prefix in ("shared", "own")]
    rounds: dict[tuple[str, str], list[list[Streamed]]] = {kind: [] for kind in kinds}
    with serving() as server:
        for number in range(NUM_ROUNDS + 1):
            for order, prefix in kinds:
                answers = asyncio.run(_ask(server.url, _prompts(rng, prefix), order))
                if number:  # the first warms up
                    rounds[order, prefix].append(answers)
    rows = [_row(*kind, rounds[kind]) for kind in kinds]
    for row in rows:
        print(row)
    config = {"requests": NUM_REQUESTS, "prefix": PREFIX, "rest": REST, "answer": ANSWER}
    emit("prefix", rows, config=config, output=options.output)


def _prompts(rng: random.Random, prefix: str) -> list[list[int]]:
    shared = rng.choices(VOCAB, k=PREFIX)
    prefixes = [shared if prefix == "shared" else rng.choices(VOCAB, k=PREFIX) for _ in range(NUM_REQUESTS)]
    return [[*one, *rng.choices(VOCAB, k=REST)] for one in prefixes]


async def _ask(url: str, prompts: Iterable[list[int]], order: str) -> list[Streamed]:
    bodies = [
        {
            "model": "demo",
            "prompt": prompt,
            "max_tokens": ANSWER,
            "ignore_eos": True,
            "temperature": 0,
            "stream_options": {"include_usage": True},
        }
        for prompt in prompts
    ]
    async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        if order == "at once":
            return await asyncio.gather(*(stream(client, url, body) for body in bodies))
        return [await stream(client, url, body) for body in bodies]


def _row(order: str, prefix: str, rounds: list[list[Streamed]]) -> dict[str, Any]:
    computed = [sum(_computed(one.usage) for one in answers) for answers in rounds]
    return {
        "order": order,
        "prefix": prefix,
        "prompt_tokens": NUM_REQUESTS * (PREFIX + REST),
        "computed_tokens": round(statistics.median(computed)),
        "ttft": spread([[one.first_s for one in answers] for answers in rounds], unit="ms", scale=1e3),
    }


def _computed(usage: dict[str, Any]) -> int:
    return usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"]


if __name__ == "__main__":
    main()
