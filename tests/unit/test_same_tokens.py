"""The engine's greedy tokens are those of transformers' own `generate`, whatever happens around them."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from router.config import KVCacheConfig, RouterConfig
from router.request import Request
from router.tokenizer import Tokenizer
from tests.in_process import Joined, greedy, in_process
from tests.oracle import Continuation, Oracle, assert_same_tokens

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs" / "demo-model"
HELDOUT = ROOT / "tests" / "data" / "heldout.txt"
NUM_TOKENS = 200
LENGTHS = (3, 5, 8, 15, 16, 17, 33, 64, 150, 257, 480, 700)
CHATS = ("Write a function that reverses a string.", "What does this do?\n\nfor i in range(10): print(i)")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Pieces of the held-out text from all over it, and two chats."""
    tokenizer = Tokenizer(DEMO)
    tokens = tokenizer.encode(HELDOUT.read_text())
    starts = range(0, len(tokens), len(tokens) // len(LENGTHS))
    pieces = [tokens[start : start + length] for start, length in zip(starts, LENGTHS, strict=False)]
    return pieces + [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in CHATS]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[Continuation]:
    return Oracle(DEMO).generate(prompts, NUM_TOKENS)


def requests_of(prompts: Sequence[Sequence[int]]) -> list[Request]:
    return [greedy(str(n), prompt, num_tokens=NUM_TOKENS) for n, prompt in enumerate(prompts)]


def assert_all_same(answers: dict[str, Joined], expected: Sequence[Continuation]) -> None:
    for name, answer in answers.items():
        if answer.finish != "cancelled":
            assert_same_tokens(answer.tokens, expected[int(name)], what=f"prompt {name}")


@pytest.mark.parametrize("num_shards", [1, 2, 3, 4])
def test_any_number_of_shards(
    num_shards: int, prompts: list[list[int]], expected: list[Continuation]
) -> None:
    with in_process(DEMO, num_shards=num_shards) as server:
        assert_all_same(server.run(requests_of(prompts)), expected)
