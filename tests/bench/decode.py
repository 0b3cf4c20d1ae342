"""Decode steps of a real shape on one GPU, in a CUDA graph: time, floor and where the time goes.

    python -m tests.bench.decode [--output FILE]

Qwen3-30B-A3B with random weights: trunk in bfloat16, experts in NVFP4 on backend triton, all in this process. Every request
has a context of 1,024 tokens. Step: the median of replays of one graph, tokens and keys as they are; whoever samples and
plans takes time beside it, see tests.bench.host. Floor: the bytes of the trunk, of the experts that the batch chose and of keys and
values, over the copy bandwidth measured here. Breakdown: the GPU's time by kind of kernel, from the profiler, of the same step
started call by call.

Beside it: transformers' own model of the same shape, random bfloat16 weights, its grouped-product experts and a static cache,
decoding by the same context, started call by call as its generation does.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, StaticCache

from experts.fabric.local import LocalFabric, local_membership
from experts.placement import even_placement
from experts.progress import silent
from experts.shard import ExpertShard
from experts.weights import MoEShape
from router.attention import Chunk, PagedAttention, plan_attention
from router.decode_graphs import DecodeGraphs
from router.dispatch import Dispatcher
from router.kv_cache import BlockTables, KVCache
from router.trunk import Trunk
from tests.bench.moe import BYTES_PER_WEIGHT, GPU, measure_machine
from tests.bench.report import emit

CONTEXT = 1024
BLOCK_SIZE = 16
BATCHES = (1, 8, 64)
REPLAYS = 50
CONFIG: Any = cast(Any, Qwen3MoeConfig)(
    vocab_size=151936,
    hidden_size=2048,
    moe_intermediate_size=768,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    max_position_embeddings=40960,
    tie_word_embeddings=False,
)
KINDS = {
    "experts": ("gate_up", "down", "arrange", "combine", "_to_local"),
    "attention": ("_attend", "_add_parts", "_write_cache", "_rotate_halves"),
    "norms": ("norm",),
    "products": ("gemm", "gemv", "nvjet", "cutlass", "cublas", "splitK"),
}


class Deployment:
    """An engine's parts on one GPU."""

    def __init__(self, *, max_rows: int) -> None:
        layers = tuple(range(CONFIG.num_hidden_layers))
        shape = MoEShape(
            len(layers), layers, CONFIG.num_experts, CONFIG.hidden_size, CONFIG.moe_intermediate_size
        )
        self.shape = shape
        self.trunk = Trunk.random(CONFIG, dtype=torch.bfloat16, device=GPU)
        shard = ExpertShard(
            shape,
            rank=0,
            slots_per_rank=shape.num_experts,
            backend="triton",
            dtype=torch.bfloat16,
            device=GPU,
        )
        backend: Any = shard._backend
        for layer in backend._layers.values():
            for packed_eNJ, scale_eNGh in (layer.gate_up, layer.down):
                packed_eNJ.random_(0, 256)
                scale_eNGh.random_(0x28, 0x40)
            layer.scale_2_e3.fill_(0.01 * 256)
        self.dispatcher = Dispatcher(LocalFabric([shard]), device=GPU)
        placement = even_placement(layers, num_layers=len(layers), num_experts=shape.num_experts, num_ranks=1)
        self.dispatcher.adopt(local_membership(placement), timeout_s=1)
        self.tables = BlockTables(
            num_blocks=max_rows * (CONTEXT // BLOCK_SIZE + 1),
            block_size=BLOCK_SIZE,
            max_requests=max_rows,
            max_tokens=CONTEXT + BLOCK_SIZE,
        )
        num_slots = self.tables.num_blocks * BLOCK_SIZE
        cache = KVCache(self.trunk.shape, num_slots=num_slots, dtype=torch.bfloat16, device=GPU)
        cache.k.normal_()
        cache.v.normal_()
        for _ in range(max_rows):
            row = self.tables.take_row()
            assert row is not None
            assert self.tables.reserve(row, CONTEXT)
        self.attention = PagedAttention(cache, block_size=BLOCK_SIZE)
        self.graphs = DecodeGraphs(
            self.trunk,
            self.attention,
            self.dispatcher,
            sizes=BATCHES,
            max_blocks=self.tables.table_RN.shape[1],
        )
        self.graphs.capture(report=silent)

    def step_of(self, rows: int) -> tuple[Callable[[], object], Callable[[], object]]:
        """A graph's replay, and the same step call by call."""
        chunks = [Chunk(row, CONTEXT - 1, 1) for row in range(rows)]
        plan = plan_attention(chunks, self.tables, dtype=torch.bfloat16, device=GPU)
        tokens = torch.randint(0, CONFIG.vocab_size, (rows,)).tolist()
        positions = [CONTEXT - 1] * rows
        self.graphs.forward(tokens, positions, plan)
        token_B, position_B = torch.tensor([tokens, positions], device=GPU)

        def call_by_call() -> object:
            return self.trunk.forward(
                token_B, position_B, keep_N=None, attention=self.attention, plan=plan, experts=self.dispatcher
            )

        return self.graphs._graphs[rows][0].replay, call_by_call

    def floor_s(self, rows: int, bandwidth: float, *, active: float) -> float:
        """active: experts that a layer's tokens chose, on average."""
        model = self.trunk._model
        trunk = sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name) * 2
        experts = (
            active
            * 3
            * self.shape.hidden
            * self.shape.intermediate
            * BYTES_PER_WEIGHT
            * self.shape.num_layers
        )
        kv = rows * CONTEXT * CONFIG.num_key_value_heads * CONFIG.head_dim * 2 * 2 * self.shape.num_layers
        return (trunk + experts + kv) / bandwidth


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    arguments = parser.parse_args()
    machine = measure_machine()
    began = time.perf_counter()
    ours = Deployment(max_rows=max(BATCHES))
    print(f"ready after {time.perf_counter() - began:.0f} s", flush=True)
    results: list[dict[str, Any]] = []
    for rows in BATCHES:
        replay, call_by_call = ours.step_of(rows)
        times_ms = timed_ms(replay)
        active = activated_by(ours, call_by_call)
        floor_ms = ours.floor_s(rows, machine.bandwidth, active=active) * 1e3
        step_ms = statistics.median(times_ms)
        result = {
            "batch": rows,
            "step_ms": round(step_ms, 3),
            "spread_ms": [round(times_ms[0], 3), round(times_ms[-1], 3)],
            "floor_ms": round(floor_ms, 3),
            "of_floor": round(step_ms / floor_ms, 2),
            "active_experts": round(active, 1),
            "call_by_call_ms": round(wall_ms(call_by_call), 2),
            "us_per_layer": breakdown_us(call_by_call),
        }
        results.append(result)
        print(result, flush=True)
    del ours
    torch.cuda.empty_cache()
    for result, step_ms in zip(results, transformers_ms(), strict=True):
        result["transformers_ms"] = round(step_ms, 2)
        result["times_quicker"] = round(step_ms / result["step_ms"], 2)
        print(result["batch"], result["transformers_ms"], result["times_quicker"], flush=True)
    config = {"model": "Qwen3-30B-A3B", "context": CONTEXT, "machine": machine._asdict()}
    emit("decode", results, config=config, output=arguments.output)


def activated_by(ours: Deployment, step: Callable[[], object]) -> float:
    shard = ours.dispatcher._fabric._shards[0]  # type: ignore[attr-defined]
    before = shard.counts().num_activated
    step()
    return (shard.counts().num_activated - before) / ours.shape.num_layers


def timed_ms(step: Callable[[], object]) -> list[float]:
    """Ascending, the GPU's time."""
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[3:])


def wall_ms(step: Callable[[], object]) -> float:
    times = []
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def breakdown_us(step: Callable[[], object]) -> dict[str, float]:
    """Microseconds of a layer by kind of kernel, and how many kernels there are."""
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    spent: Counter[str] = Counter()
    count = 0
    for event in profiled.events() or []:
        if event.device_type.name != "CUDA":
            continue
        kind = next(
            (kind for kind, names in KINDS.items() if any(name in event.name for name in names)), "other"
        )
        spent[kind] += event.device_time
        count += 1
    layers = CONFIG.num_hidden_layers
    return {kind: round(us / layers, 1) for kind, us in spent.most_common()} | {
        "kernels": round(count / layers, 1)
    }


@torch.inference_mode()
def transformers_ms() -> list[float]:
    """A decode step of each batch."""
    with GPU:
        model: Any = AutoModelForCausalLM.from_config(
            CONFIG, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    model.eval()
    found = []
    for rows in BATCHES:
        cache = StaticCache(config=CONFIG, max_cache_len=CONTEXT + 32)
        ids = torch.randint(0, CONFIG.vocab_size, (rows, CONTEXT - 1), device=GPU)
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        token = ids[:, :1]
        position = torch.full((rows, 1), CONTEXT - 1, device=GPU)

        def step(
            token: torch.Tensor = token, position: torch.Tensor = position, cache: StaticCache = cache
        ) -> object:
            return model(input_ids=token, position_ids=position, past_key_values=cache)

        try:
            found.append(wall_ms(step))
        except Exception as error:  # noqa: BLE001
            print("transformers:", error)
            found.append(float("nan"))
    return found


if __name__ == "__main__":
    main()
