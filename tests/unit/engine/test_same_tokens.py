"""The engine's greedy tokens are those of transformers' own `generate`, whatever happens around them."""

from collections.abc import Sequence
from functools import partial

import pytest

from experts.fabric.faulty import Fault, Lost, Unreachable
from router.config import KVCacheConfig, RouterConfig
from router.request import Request
from router.text.tokenizer import Tokenizer
from tests.support.in_process import Joined, faulty, greedy, in_process
from tests.support.oracle import Continuation, Oracle, assert_same_tokens
from tests.support.places import DEMO_MODEL, HELDOUT

NUM_TOKENS = 200
LENGTHS = (3, 5, 8, 15, 16, 17, 33, 64, 150, 257, 480, 700)
CHATS = ("Write a function that reverses a string.", "What does this do?\n\nfor i in range(10): print(i)")


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Return pieces of the held-out text from all over it, and two chats."""
    tokenizer = Tokenizer(DEMO_MODEL)
    tokens = tokenizer.encode(HELDOUT.read_text())
    starts = range(0, len(tokens), len(tokens) // len(LENGTHS))
    pieces = [tokens[start : start + length] for start, length in zip(starts, LENGTHS, strict=False)]
    return pieces + [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in CHATS]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[Continuation]:
    return Oracle(DEMO_MODEL).generate(prompts, NUM_TOKENS)


def requests_of(prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[Request]:
    return [greedy(str(n), prompt, num_tokens=num_tokens) for n, prompt in enumerate(prompts)]


def assert_all_same(
    answers: dict[str, Joined],
    expected: Sequence[Continuation],
    *,
    num_tokens: int,
    cancelled: Sequence[str] = (),
) -> None:
    assert [name for name, answer in answers.items() if answer.finish == "cancelled"] == list(cancelled)
    for name, answer in answers.items():
        assert name in cancelled or len(answer.tokens) == num_tokens, f"prompt {name}"
        assert_same_tokens(answer.tokens, expected[int(name)], what=f"prompt {name}")


def pool(num_blocks: int, *, block_size: int) -> KVCacheConfig:
    """Return a cache of so many blocks for the demo model in float32: 6 layers, keys and values, 2 heads of
    64."""
    return KVCacheConfig(block_size=block_size, memory_gib=(num_blocks + 0.5) * block_size * 6144 / 2**30)


@pytest.mark.parametrize(
    ("num_shards", "num_tokens"),
    [(1, 40), (2, 40), (3, NUM_TOKENS), (4, 40)]
    + [pytest.param(n, NUM_TOKENS, marks=pytest.mark.slow) for n in (1, 2, 4)],
)
def test_any_number_of_shards(
    num_shards: int, num_tokens: int, prompts: list[list[int]], expected: list[Continuation]
) -> None:
    with in_process(DEMO_MODEL, num_shards=num_shards) as server:
        answers = server.run(requests_of(prompts, num_tokens=num_tokens))
    assert_all_same(answers, expected, num_tokens=num_tokens)


@pytest.mark.parametrize(("max_batch_tokens", "block_size"), [(19, 16), (64, 5), (100, 1)])
def test_prompts_in_parts(
    max_batch_tokens: int, block_size: int, prompts: list[list[int]], expected: list[Continuation]
) -> None:
    config = RouterConfig(
        max_requests=16, max_batch_tokens=max_batch_tokens, kv_cache=KVCacheConfig(block_size=block_size)
    )
    with in_process(DEMO_MODEL, num_shards=2, config=config) as server:
        answers = server.run(requests_of(prompts, num_tokens=8))
    assert_all_same(answers, expected, num_tokens=8)


@pytest.mark.parametrize("max_batch_tokens", [50, 2048])
def test_preemption(max_batch_tokens: int, prompts: list[list[int]], expected: list[Continuation]) -> None:
    short, expected = prompts[:9], expected[:9]
    config = RouterConfig(max_requests=16, max_batch_tokens=max_batch_tokens, kv_cache=pool(24, block_size=8))
    with in_process(DEMO_MODEL, num_shards=2, config=config) as server:
        answers = server.run(requests_of(short, num_tokens=24))
        assert server.engine.preempted
    assert_all_same(answers, expected, num_tokens=24)


@pytest.mark.parametrize("max_batch_tokens", [33, 2048])
def test_prefixes_that_were_computed_before(
    max_batch_tokens: int, prompts: list[list[int]], expected: list[Continuation]
) -> None:
    """Every prompt again, once its first answer is there, beside others that have begun before."""
    config = RouterConfig(max_requests=16, max_batch_tokens=max_batch_tokens)
    with in_process(DEMO_MODEL, num_shards=2, config=config) as server:
        server.run(requests_of(prompts, num_tokens=2))
        num_computed_before = server.engine.status().num_cached
        answers = server.run(requests_of(prompts, num_tokens=20))
        found = server.engine.status().num_cached - num_computed_before
    assert found == sum((len(prompt) - 1) // 16 * 16 for prompt in prompts)
    assert_all_same(answers, expected, num_tokens=20)


def test_arrivals_and_cancellations(prompts: list[list[int]], expected: list[Continuation]) -> None:
    """Late requests join, running and waiting ones leave, and four rows are too few for all."""
    config = RouterConfig(max_requests=4, max_batch_tokens=128, kv_cache=pool(60, block_size=16))
    requests = requests_of(prompts, num_tokens=20)
    with in_process(DEMO_MODEL, num_shards=3, config=config) as server:
        for step, request in enumerate(requests[3:], start=2):
            server.engine.at_step[step] = partial(server.submit, request)
        server.engine.at_step[4] = partial(server.cancel, "1")
        server.engine.at_step[15] = partial(server.cancel, "13")
        answers = server.run(requests[:3])
    assert_all_same(answers, expected, num_tokens=20, cancelled=("1", "13"))


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([Lost(rank=1, step=0, layer=0)], id="first layer of the first step"),
        pytest.param([Lost(rank=0, step=5, layer=3)], id="amid a step"),
        pytest.param([Lost(rank=2, step=9, layer=5)], id="last layer"),
        pytest.param([Lost(rank=r, step=4, layer=2 * r) for r in range(3)], id="again in the next try"),
        pytest.param([Lost(rank=2, step=7, layer=1), Unreachable(rank=2, epoch=2)], id="late to come back"),
    ],
)
def test_a_lost_shard(faults: list[Fault], prompts: list[list[int]], expected: list[Continuation]) -> None:
    """Chunked prompts and preemption too, so that all sorts of steps are run again."""
    config = RouterConfig(max_requests=40, max_batch_tokens=40, kv_cache=pool(21, block_size=8))
    with in_process(DEMO_MODEL, num_shards=3, config=config, fabric=partial(faulty, faults=faults)) as server:
        answers = server.run(requests_of(prompts[:9], num_tokens=12))
        assert len(server.losses) == len(faults)
        assert server.engine.preempted
        assert server.engine.status().epoch == 1 + len(faults)
    assert_all_same(answers, expected, num_tokens=12)


def test_what_is_asked_while_a_shard_is_away(prompts: list[list[int]], expected: list[Continuation]) -> None:
    """A request that leaves a step in flight, one that leaves the queue, one that arrives."""
    requests = requests_of(prompts, num_tokens=12)
    config = RouterConfig(max_requests=6)

    def meanwhile() -> None:
        server.cancel("2")
        server.cancel("7")
        server.submit(requests[8])

    fabric = partial(faulty, faults=[Lost(rank=1, step=5, layer=2)])
    with in_process(DEMO_MODEL, num_shards=2, config=config, fabric=fabric) as server:
        server.at_loss = meanwhile
        answers = server.run(requests[:8])
    assert_all_same(answers, expected, num_tokens=12, cancelled=("2", "7"))
