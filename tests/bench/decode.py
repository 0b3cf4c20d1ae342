"""Steps of a real shape on one GPU: time, floor and where the time goes.

    python -m tests.bench.decode [--shape NAME] [--output FILE]

Random weights (tests.bench.random_model): trunk in bfloat16, experts in NVFP4 on backend triton, fabric `local`, the real engine with its
sampler (temperature 0.6, top_p 0.95, top_k 20); as many layers as the GPU has memory for.

Decoding: every request has a context of 1,024 tokens and a few more. step_ms: the model alone, the median of replays of one CUDA
graph. engine_ms: a turn of the engine by the clock: planning, the graph, sampling, answers. Floor: the bytes of the trunk, of
the experts that the batch chose and of keys and values, over the copy bandwidth measured here. Parts: microseconds of a layer
from the profiler; `gaps` is what the graph takes beyond its kernels; sampling and host are of a step, host being what a turn takes beyond the graph
and the sampling's kernels.

Prompts: a turn of the engine whose one request has a prompt of so many tokens, all in one chunk. Floor: its FLOPs over the rate of an
8192-cubed bfloat16 product.

Beside it, where it fits: transformers' own model of the same shape, random bfloat16 weights, its grouped-product experts and a static
cache, started call by call as its generation does.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM, StaticCache

from router.config import RouterConfig
from router.request import Request, SamplingParams
from tests.bench.moe import BYTES_PER_WEIGHT, GPU, Machine, measure_machine
from tests.bench.random_model import SHAPES, RandomEngine, layers_that_fit
from tests.bench.report import emit
from tests.bench.step_parts import parts_us

CONTEXT = 1024
BATCHES = (1, 8, 64)
PROMPTS = (2048, 8192)
TURNS = 40
REPLAYS = 50
PROMPT_REPEATS = 3
KV_TOKENS = max(BATCHES) * (CONTEXT + 4 * TURNS)
FREE_BYTES = 8 << 30
OF_A_STEP = ("inputs", "sampling", "host")
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-30b-a3b")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    config: Any = SHAPES[arguments.shape]
    all_layers = config.num_hidden_layers
    machine = measure_machine()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    config.num_hidden_layers = layers_that_fit(config, free, num_tokens=KV_TOKENS, free=FREE_BYTES)
    began = time.perf_counter()
    bench = Bench(config)
    print(f"{config.num_hidden_layers} layers ready after {time.perf_counter() - began:.0f} s", flush=True)
    results: list[dict[str, Any]] = []
    for count in PROMPTS:
        results.append(bench.prompt(count, machine))
        print(results[-1], flush=True)
    for rows in BATCHES:
        results.append(bench.decoding(rows, machine))
        print(results[-1], flush=True)
    del bench
    torch.cuda.empty_cache()
    if transformers_fits(config):
        for result, step_ms in zip(results, transformers_ms(config), strict=True):
            result["transformers_ms"] = round(step_ms, 2)
            result["times_quicker"] = round(step_ms / result["step_ms"], 2)
            print(result["transformers_ms"], result["times_quicker"], flush=True)
    emit(
        "decode",
        results,
        config={
            "model": arguments.shape,
            "layers": config.num_hidden_layers,
            "of_layers": all_layers,
            "context": CONTEXT,
            "sampling": SAMPLING,
            "machine": machine._asdict(),
        },
        output=arguments.output,
    )


class Bench:
    """An engine, driven turn by turn in this thread."""

    def __init__(self, config: Any) -> None:
        self._config = config
        router = RouterConfig(max_requests=max(BATCHES), max_batch_tokens=max(PROMPTS))
        self._engine = RandomEngine(config, router=router, num_tokens=KV_TOKENS, device=GPU)
        assert self._engine._graphs
        self._engine._graphs._sizes = BATCHES  # no other is measured
        self._num_requests = 0
        self._submit(CONTEXT)  # enters the epoch, captures the graphs
        self._turns(2)
        self._forget()

    def decoding(self, rows: int, machine: Machine) -> dict[str, Any]:
        for _ in range(rows):
            self._submit(CONTEXT)
        while any(one.num_left > 1 for one in self._engine._scheduler.running) or self._waits():
            self._turns(1)
        engine_ms = statistics.median(self._turns(TURNS)[3:])
        before = self._engine.shard.counts().num_activated
        self._turns(1)
        layers = self._config.num_hidden_layers
        active = (self._engine.shard.counts().num_activated - before) / layers
        parts = parts_us(lambda: self._turns(1))
        graphs = self._engine._graphs
        assert graphs
        replays_ms = timed_ms(graphs._graphs[rows][0].replay)
        self._engine._graphs = None
        call_by_call_ms = statistics.median(self._turns(6))
        self._engine._graphs = graphs
        self._forget()
        step_ms = statistics.median(replays_ms)
        floor_ms = self._decode_floor_s(rows, machine.bandwidth, active=active) * 1e3
        return {
            "batch": rows,
            "step_ms": round(step_ms, 3),
            "spread_ms": [round(replays_ms[0], 3), round(replays_ms[-1], 3)],
            "floor_ms": round(floor_ms, 3),
            "of_floor": round(step_ms / floor_ms, 2),
            "engine_ms": round(engine_ms, 3),
            "active_experts": round(active, 1),
            "call_by_call_ms": round(call_by_call_ms, 2),
            **breakdown(parts, step_ms=step_ms, engine_ms=engine_ms, layers=layers),
        }

    def prompt(self, count: int, machine: Machine) -> dict[str, Any]:
        times_ms = []
        for _ in range(1 + PROMPT_REPEATS):  # the first compiles kernels
            self._submit(count)
            times_ms += self._turns(1)
            self._forget()
        step_ms = statistics.median(times_ms[1:])
        floor_ms = self._prompt_flops(count) / machine.flops * 1e3
        return {
            "prompt": count,
            "step_ms": round(step_ms, 2),
            "spread_ms": [round(min(times_ms[1:]), 2), round(max(times_ms[1:]), 2)],
            "floor_ms": round(floor_ms, 2),
            "of_floor": round(step_ms / floor_ms, 2),
            "tokens_per_s": round(count / step_ms * 1e3),
        }

    def _submit(self, num_tokens: int) -> None:
        self._num_requests += 1
        prompt = torch.randint(0, self._config.vocab_size, (num_tokens,)).tolist()
        params = SamplingParams(**SAMPLING, seed=self._num_requests)
        self._engine.submit(self._engine.prepare(Request(str(self._num_requests), tuple(prompt), params)))

    def _waits(self) -> bool:
        return self._engine.status().num_waiting > 0

    def _turns(self, count: int) -> list[float]:
        """Return the milliseconds of each turn, which ends with tokens on the host."""
        times = []
        for _ in range(count):
            began = time.perf_counter()
            self._engine.turn(wait_s=0)
            times.append((time.perf_counter() - began) * 1e3)
        return times

    def _forget(self) -> None:
        for number in range(1, self._num_requests + 1):
            self._engine.cancel(str(number))
        self._turns(1)

    def _decode_floor_s(self, rows: int, bandwidth: float, *, active: float) -> float:
        """Return the floor of a decode step in seconds.

        active: experts that a layer's tokens chose, on average.
        """
        config = self._config
        expert = 3 * config.hidden_size * config.moe_intermediate_size * BYTES_PER_WEIGHT
        cached = rows * CONTEXT * config.num_key_value_heads * config.head_dim * 2 * 2
        return (self._trunk_weights() * 2 + config.num_hidden_layers * (active * expert + cached)) / bandwidth

    def _prompt_flops(self, count: int) -> float:
        config = self._config
        experts = config.num_experts_per_tok * 3 * config.hidden_size * config.moe_intermediate_size
        seen = count * (count + 1) / 2 * config.num_attention_heads * config.head_dim * 2
        head = config.vocab_size * config.hidden_size
        layers = config.num_hidden_layers
        return 2 * (count * (self._trunk_weights() - head + layers * experts) + head + layers * seen)

    def _trunk_weights(self) -> int:
        """Return all weights that a token is multiplied with, outside of the experts."""
        model = self._engine._trunk._model
        return sum(p.numel() for name, p in model.named_parameters() if "embed_tokens" not in name)


def breakdown(parts: dict[str, float], *, step_ms: float, engine_ms: float, layers: int) -> dict[str, Any]:
    """Return us_per_layer, whose sum is the graph's time, and us_per_step, which is what the engine takes
    beyond."""
    in_layers = {part: us for part, us in parts.items() if part not in (*OF_A_STEP, "kernels")}
    in_layers["gaps"] = step_ms * 1e3 - sum(in_layers.values())
    sampling = parts.get("sampling", 0.0)
    host = (engine_ms - step_ms) * 1e3 - sampling
    return {
        "us_per_layer": {part: round(us / layers, 1) for part, us in in_layers.items()},
        "us_per_step": {"sampling": round(sampling, 1), "host": round(host, 1)},
        "kernels_per_layer": round(parts["kernels"] / layers, 1),
    }


def timed_ms(step: Callable[[], object]) -> list[float]:
    """Return the GPU's times in ascending order."""
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times[3:])


def wall_ms(step: Callable[[], object], *, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def transformers_fits(config: Any) -> bool:
    experts = 3 * config.num_experts * config.hidden_size * config.moe_intermediate_size * 2
    return config.num_hidden_layers * experts < 0.8 * torch.cuda.mem_get_info()[0]


@torch.inference_mode()
def transformers_ms(config: Any) -> list[float]:
    """Return transformers' milliseconds for each of PROMPTS, then for a decode step of each of BATCHES; NaN
    where it fails."""
    with GPU:
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation="sdpa", experts_implementation="grouped_mm"
        )
    model.eval()

    def prompt_ms(count: int) -> float:
        ids = torch.randint(0, config.vocab_size, (1, count), device=GPU)
        return wall_ms(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), repeats=4)

    def decode_ms(rows: int) -> float:
        cache = StaticCache(config=config, max_cache_len=CONTEXT + 32)
        ids = torch.randint(0, config.vocab_size, (rows, CONTEXT - 1), device=GPU)
        model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        position = torch.full((rows, 1), CONTEXT - 1, device=GPU)
        return wall_ms(
            lambda: model(input_ids=ids[:, :1], position_ids=position, past_key_values=cache), repeats=8
        )

    found = []
    for measure, size in [(prompt_ms, count) for count in PROMPTS] + [(decode_ms, rows) for rows in BATCHES]:
        try:
            found.append(measure(size))
        except Exception as error:  # noqa: BLE001  theirs, which must not cost us our own results
            print("transformers:", error)
            found.append(math.nan)
    return found


if __name__ == "__main__":
    main()
