"""The whole server as a user meets it: it starts, answers, streams through the death of a shard, and stops."""

import os
import signal
from pathlib import Path

import pytest
from openai import Stream
from openai.types import Completion

from router.text.tokenizer import Tokenizer
from tests.support.oracle import NEAR_TIE, Oracle
from tests.support.places import DEMO_MODEL
from tests.support.server import Server, eventually, serving

PROMPT = "def fibonacci(n):\n"
NUM_TOKENS = 200
IN_FLOAT32 = ("router.dtype=float32", "fabric.wire_dtype=float32")
"""Settings with which the server's greedy tokens are transformers', which computes in float32."""


@pytest.fixture(scope="module")
def expected() -> str:
    """Return what transformers' own model answers, which nowhere all but tosses a coin between two tokens."""
    tokenizer = Tokenizer(DEMO_MODEL)
    [answer] = Oracle(DEMO_MODEL).generate([tokenizer.encode(PROMPT)], NUM_TOKENS)
    assert min(answer.margins) > NEAR_TIE
    return tokenizer.decode(answer.tokens)


def ask(server: Server) -> Completion:
    return server.client().completions.create(
        model="demo", prompt=PROMPT, max_tokens=NUM_TOKENS, temperature=0, extra_body={"ignore_eos": True}
    )


def ask_for_a_stream(server: Server) -> Stream[Completion]:
    return server.client().completions.create(
        model="demo",
        prompt=PROMPT,
        max_tokens=NUM_TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )


def test_a_server_starts_answers_streams_through_a_killed_shard_and_stops(expected: str) -> None:
    with serving(*IN_FLOAT32) as server:
        answer = ask(server)
        assert answer.choices[0].text == expected
        assert answer.usage is not None
        assert answer.usage.completion_tokens == NUM_TOKENS

        before, shards = server.detail(), server.shard_pids()
        stream = ask_for_a_stream(server)
        pieces = [next(stream).choices[0].text]
        os.kill(shards[1], signal.SIGKILL)
        pieces += [chunk.choices[0].text for chunk in stream]
        assert "".join(pieces) == expected
        assert len(pieces) > NUM_TOKENS / 2, "text must come as it is made"

        after, replaced = server.detail(), server.shard_pids()
        assert after["epoch"] > before["epoch"]
        assert after["router_pid"] == before["router_pid"]
        assert replaced[0] == shards[0]
        assert replaced[1] != shards[1]
    gone = {before["router_pid"], before["ingress_pid"], before["fleet_pid"], *shards.values(), replaced[1]}
    eventually(lambda: not any(map(is_alive, gone)), what="every process has ended", timeout_s=10)


def is_alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()
