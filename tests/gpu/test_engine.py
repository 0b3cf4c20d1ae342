"""The whole engine on a GPU: trunk, cache and shards there, the wire through pinned memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import pytest
import torch

from experts.fabric import Membership
from experts.fabric.link import ShardListener
from experts.fabric.local import LocalFabric
from experts.fabric.tcp import TcpFabric
from experts.shard import ExpertShard
from router.request import Request, SamplingParams
from router.tokenizer import Tokenizer
from tests.bench.perplexity import DEMO, HELDOUT, closeness, logits_of_engine, windows_of
from tests.in_process import greedy, in_process
from tests.oracle import Oracle, assert_same_tokens

pytestmark = pytest.mark.gpu

NUM_TOKENS = 100
LENGTHS = (3, 16, 17, 64, 150, 480)
GPU = torch.device("cuda")


class HostedTcp(TcpFabric):
    """A tcp fabric whose shards listen in this process."""

    def __init__(self, shards: Sequence[ExpertShard]) -> None:
        shape, dtype = shards[0].shape, shards[0].dtype
        super().__init__(hidden=shape.hidden, wire_dtype=dtype, slow_after_s=10, dead_after_s=60)
        self._listeners = [
            ShardListener(shard, host="127.0.0.1", name=f"gpu-{shard.rank}", token=b"test")
            for shard in shards
        ]

    def connect(self, members: Membership, *, timeout_s: float) -> None:
        shards = tuple(listener.address for listener in self._listeners)
        super().connect(Membership(members.epoch, shards, members.placement), timeout_s=timeout_s)

    def close(self) -> None:
        super().close()
        for listener in self._listeners:
            listener.close()


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """float32 products in float32, not TF32."""
    with ExitStack() as stack:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, before)
        yield


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("fabric", [LocalFabric, HostedTcp])
def test_tokens_are_those_of_transformers(fabric: type[LocalFabric | HostedTcp], backend: str) -> None:
    tokens = Tokenizer(DEMO).encode(HELDOUT.read_text())
    prompts = [tokens[1000 * n : 1000 * n + length] for n, length in enumerate(LENGTHS)]
    requests = [greedy(str(n), prompt, num_tokens=NUM_TOKENS) for n, prompt in enumerate(prompts)]
    expected = Oracle(DEMO).generate(prompts, NUM_TOKENS)
    with in_process(DEMO, num_shards=2, device=GPU, backend=backend, fabric=fabric) as server:
        answers = server.run(requests)
    for n, continuation in enumerate(expected):
        assert len(answers[str(n)].tokens) == NUM_TOKENS
        assert_same_tokens(answers[str(n)].tokens, continuation, what=f"prompt {n}")


def test_bfloat16_is_as_close_as_on_a_cpu() -> None:
    windows = windows_of(DEMO, HELDOUT)[::30]
    oracle = Oracle(DEMO)
    pairs = zip(logits_of_engine(DEMO, windows, torch.bfloat16, GPU), windows, strict=True)
    same, divergence = zip(
        *(closeness(ours.cpu(), oracle.logits(window)) for ours, window in pairs), strict=True
    )
    assert torch.cat(same).mean() > 0.98
    assert torch.cat(divergence).mean() < 2e-3


def test_sampling_with_a_seed_does_not_depend_on_company() -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
    requests = [Request(name, (5, 6, 7), params) for name in ("a", "b")]
    with in_process(DEMO, num_shards=2, dtype=torch.bfloat16, device=GPU) as server:
        alone = server.run(requests[:1])["a"].tokens
        assert server.run(requests[1:])["b"].tokens == alone
