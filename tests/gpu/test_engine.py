"""The whole engine on a GPU: trunk, cache and shards there, the wire through pinned memory."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts.fabric import Membership
from experts.fabric.local import LocalFabric
from experts.fabric.tcp.router_end import TcpFabric
from experts.fabric.tcp.shard_end import ShardListener
from experts.shard import ExpertShard
from router.config import KVCacheConfig, RouterConfig
from router.model.attention import AttentionPlan
from router.model.decode_graphs import DecodeGraphs
from router.model_config import FAMILIES
from router.request import Request, SamplingParams
from router.text.tokenizer import Tokenizer
from tests.bench.perplexity import FP8, closeness, logits_of_engine, windows_of
from tests.support.families import write_nvfp4
from tests.support.in_process import greedy, in_process
from tests.support.oracle import Oracle, assert_same_tokens
from tests.support.places import DEMO_MODEL, HELDOUT

pytestmark = pytest.mark.gpu

NUM_TOKENS = 100
FUSED = {"qwen3_moe": {"self_attn", "mlp.gate"}, "mixtral": {"self_attn", "mlp.gate"}}
"""The modules of a layer besides the layer itself, which is fused in every family."""

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
    """Compute float32 products in float32, not TF32."""
    with ExitStack() as stack:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        stack.callback(torch.set_float32_matmul_precision, before)
        yield


@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("fabric", [LocalFabric, HostedTcp])
def test_tokens_are_those_of_transformers(fabric: type[LocalFabric | HostedTcp], backend: str) -> None:
    tokens = Tokenizer(DEMO_MODEL).encode(HELDOUT.read_text())
    prompts = [tokens[1000 * n : 1000 * n + length] for n, length in enumerate(LENGTHS)]
    requests = [greedy(str(n), prompt, num_tokens=NUM_TOKENS) for n, prompt in enumerate(prompts)]
    expected = Oracle(DEMO_MODEL).generate(prompts, NUM_TOKENS)
    with in_process(DEMO_MODEL, num_shards=2, device=GPU, backend=backend, fabric=fabric) as server:
        answers = server.run(requests)
    for n, continuation in enumerate(expected):
        assert len(answers[str(n)].tokens) == NUM_TOKENS
        assert_same_tokens(answers[str(n)].tokens, continuation, what=f"prompt {n}")


def test_bfloat16_is_as_close_as_on_a_cpu() -> None:
    windows = windows_of(DEMO_MODEL, HELDOUT)[::30]
    oracle = Oracle(DEMO_MODEL)
    pairs = zip(logits_of_engine(DEMO_MODEL, windows, torch.bfloat16, GPU), windows, strict=True)
    same, divergence = zip(
        *(closeness(ours.cpu(), oracle.logits(window)) for ours, window in pairs), strict=True
    )
    assert torch.cat(same).mean() > 0.98
    assert torch.cat(divergence).mean() < 2e-3


def test_fp8_keys_and_values_are_close() -> None:
    """In bfloat16 too, so a little less than on a CPU in float32."""
    windows = windows_of(DEMO_MODEL, HELDOUT)[::30]
    oracle = Oracle(DEMO_MODEL)
    pairs = zip(
        logits_of_engine(DEMO_MODEL, windows, torch.bfloat16, GPU, kv_cache=FP8), windows, strict=True
    )
    same, divergence = zip(
        *(closeness(ours.cpu(), oracle.logits(window)) for ours, window in pairs), strict=True
    )
    assert torch.cat(same).mean() > 0.96
    assert torch.cat(divergence).mean() < 8e-3


def test_fp8_decodes_in_a_graph_and_holds_twice_as_much() -> None:
    requests = [greedy(str(n), [n, 5, 6 + n], num_tokens=10 + 4 * n) for n in range(11)]
    blocks, tokens = {}, []
    for kv_cache in (KVCacheConfig(), FP8, FP8):
        config = RouterConfig(kv_cache=kv_cache)
        with in_process(DEMO_MODEL, num_shards=2, dtype=torch.bfloat16, device=GPU, config=config) as server:
            answers = server.run(requests)
            assert server.engine._graphs
            assert server.engine._graphs._graphs
            blocks[kv_cache.dtype] = server.engine.status().num_blocks
        tokens.append([answers[request.id].tokens for request in requests])
    assert tokens[1] == tokens[2]
    assert blocks["fp8_e4m3"] == pytest.approx(blocks["auto"] * 2 * 64 / (64 + 4), rel=0.01)


def test_sampling_with_a_seed_does_not_depend_on_company() -> None:
    params = SamplingParams(max_tokens=30, temperature=1.0, top_p=0.95, seed=7, ignore_eos=True)
    requests = [Request(name, (5, 6, 7), params) for name in ("a", "b")]
    with in_process(DEMO_MODEL, num_shards=2, dtype=torch.bfloat16, device=GPU) as server:
        alone = server.run(requests[:1])["a"].tokens
        assert server.run(requests[1:])["b"].tokens == alone


def test_a_graph_computes_what_its_calls_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, but where a batch is filled up: a library multiplies more rows by other kernels."""
    requests = [greedy(str(n), [n, 5, 6 + n], num_tokens=10 + 4 * n) for n in range(11)]
    differences: dict[int, float] = {}
    with in_process(DEMO_MODEL, num_shards=2, dtype=torch.bfloat16, device=GPU) as server:
        engine = server.engine
        graphs = engine._graphs
        assert graphs
        replay = graphs.forward

        def both(tokens: list[int], positions: list[int], plan: AttentionPlan) -> Tensor:
            found_BV = replay(tokens, positions, plan)
            calls_BV = engine._trunk.forward(
                *torch.tensor([tokens, positions], device=GPU),
                keep_N=None,
                attention=engine._attention,
                plan=plan,
                experts=engine._dispatcher,
            )
            difference = float((found_BV - calls_BV).float().norm() / calls_BV.float().norm())
            differences[len(tokens)] = max(difference, differences.get(len(tokens), 0.0))
            return found_BV

        monkeypatch.setattr(graphs, "forward", both)
        server.run(requests)
    assert differences.keys() == set(range(1, 12))
    assert {rows: found for rows, found in differences.items() if rows <= 8 and found} == {}
    assert max(differences.values()) < 0.02


def test_without_graphs_the_engine_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(DecodeGraphs, "_run", refuse)
    with in_process(DEMO_MODEL, num_shards=1, dtype=torch.bfloat16, device=GPU) as server:
        assert len(server.run([greedy("one", [1, 2, 3], num_tokens=5)])["one"].tokens) == 5
    assert sum("steps run without CUDA graphs" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_computed_by_our_kernels(family: str, tmp_path: Path) -> None:
    """In float32, where tokens must be transformers'."""
    path = write_nvfp4(family, tmp_path / family)
    prompts = [list(range(7, 7 + length)) for length in (1, 2, 17, 45)]
    expected = Oracle(path).generate(prompts, 40)
    requests = [greedy(str(n), prompt, num_tokens=40) for n, prompt in enumerate(prompts)]
    with in_process(path, num_shards=2, device=GPU) as server:
        layer = server.engine._trunk._model.model.layers[-1]
        fused = {name for name, module in layer.named_modules() if "forward" in vars(module)}
        answers = server.run(requests)
    assert fused >= {""} | FUSED.get(family, set()), fused
    for n, continuation in enumerate(expected):
        assert_same_tokens(answers[str(n)].tokens, continuation, what=f"prompt {n}")
