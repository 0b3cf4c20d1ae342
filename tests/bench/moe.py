"""One MoE layer on a GPU, backend against backend, beside the floor.

    python -m tests.bench.moe [--output FILE]

The layers are random: codes and routing are drawn anew, and a CUDA graph runs several layers of different weights, so that none is
found in the L2. Microseconds are of a layer: the median of the replays, with the tenth and the ninetieth percentile.
Floor: the larger of the bytes of the active experts' packed weights and scales over the copy bandwidth, and the products'
FLOPs over the rate of an 8192-cubed bfloat16 product, both measured here first. Where FlashInfer's cuTile kernels can be compiled,
they are measured too, see tests.bench.cutile.

T tokens, D hidden, K top-k, E experts, I intermediate.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.backends import DEFAULTS
from experts.backends.registry import BACKENDS
from experts.weights import MoEShape
from tests.bench import cutile
from tests.bench.report import emit, percentile

GPU = torch.device("cuda")
TOP_K = 8
SHAPES = {
    "E128 H2048 I768": MoEShape(1, (0,), 128, 2048, 768),
    "E64 H4096 I1536": MoEShape(1, (0,), 64, 4096, 1536),
}
TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
LAYERS = 6
REPLAYS = 50
BYTES_PER_WEIGHT = 9 / 16


class Machine(NamedTuple):
    """The rates of a machine, in a second: bytes read and written, and bfloat16 FLOPs."""

    bandwidth: float
    flops: float


class Call(NamedTuple):
    x_TD: Tensor
    ids_TK: Tensor
    w_TK: Tensor


Layer = Callable[[Call], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    arguments = parser.parse_args()
    machine = measure_machine()
    results: list[dict[str, Any]] = []
    for name, shape in SHAPES.items():
        ways = {
            "triton": [triton_layer(shape) for _ in range(LAYERS)],
            "grouped_mm": [grouped_layer(shape) for _ in range(LAYERS)],
        }
        if cutile.available():
            ways["cutile"] = [cutile_layer(shape) for _ in range(LAYERS)]
        for num_tokens in TOKENS:
            calls = [random_call(shape, num_tokens) for _ in range(LAYERS)]
            floor_us = statistics.mean(floor_s(shape, call, machine) for call in calls) * 1e6
            result: dict[str, Any] = {"shape": name, "tokens": num_tokens, "floor_us": round(floor_us, 1)}
            for way, layers in ways.items():
                result[way] = spread_us(time_layers(layers, calls))
            results.append(result)
            print(result, flush=True)
        del ways
    config = {"top_k": TOP_K, "layers": LAYERS, "replays": REPLAYS, "machine": machine._asdict()}
    emit("moe", results, config=config, output=arguments.output)


def triton_layer(shape: MoEShape) -> Layer:
    backend: Any = BACKENDS["triton"](shape, shape.num_experts, torch.bfloat16, GPU, DEFAULTS)
    weights = backend._layers[0]
    for packed_eNJ, scale_eNGh in (weights.gate_up, weights.down):
        packed_eNJ.random_(0, 256)
        scale_eNGh.random_(0x28, 0x40)
    weights.scale_2_e3.fill_(0.02 * 256)

    def run(call: Call) -> Tensor:
        out_TD = torch.empty_like(call.x_TD)
        backend.forward(0, call.x_TD, call.ids_TK, call.w_TK, out_TD=out_TD)
        return out_TD

    return run


def grouped_layer(shape: MoEShape) -> Layer:
    """Compute the layer on weights that were dequantised to bfloat16 before: pairs sorted, two grouped
    products, summed by index_add_."""
    w13 = (
        torch.randn(shape.num_experts, 2 * shape.intermediate, shape.hidden, device=GPU, dtype=torch.bfloat16)
        * 0.02
    )
    w2 = (
        torch.randn(shape.num_experts, shape.hidden, shape.intermediate, device=GPU, dtype=torch.bfloat16)
        * 0.02
    )

    def run(call: Call) -> Tensor:
        ids_P = call.ids_TK.flatten()
        pair_R = ids_P.argsort()
        token_R = pair_R // call.ids_TK.shape[1]
        ones = torch.ones_like(ids_P)
        rows_E = torch.zeros(shape.num_experts, dtype=torch.int32, device=GPU).scatter_add_(
            0, ids_P.long(), ones
        )
        ends_E = rows_E.cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(call.x_TD[token_R], w13.transpose(1, 2), offs=ends_E).chunk(2, dim=-1)
        y_RD = F.grouped_mm(F.silu(gate) * up, w2.transpose(1, 2), offs=ends_E)
        y_RD *= call.w_TK.flatten()[pair_R, None].to(torch.bfloat16)
        return torch.zeros_like(call.x_TD).index_add_(0, token_R, y_RD)

    return run


def cutile_layer(shape: MoEShape) -> Layer:
    layer = cutile.CuTileLayer(shape, top_k=TOP_K, max_tokens=max(TOKENS), device=GPU)
    tuned_for: set[int] = set()

    def run(call: Call) -> Tensor:
        if len(call.x_TD) not in tuned_for:  # in the run before a graph is captured
            layer.tune(*call)
            tuned_for.add(len(call.x_TD))
        return layer(*call)

    return run


def random_call(shape: MoEShape, num_tokens: int) -> Call:
    x_TD = torch.randn(num_tokens, shape.hidden, device=GPU).to(torch.bfloat16)
    ids_TK = torch.rand(num_tokens, shape.num_experts, device=GPU).topk(TOP_K).indices.to(torch.int32)
    return Call(x_TD, ids_TK, torch.rand(num_tokens, TOP_K, device=GPU))


def time_layers(layers: list[Layer], calls: list[Call]) -> list[float]:
    """Return the seconds that a layer takes in each replay."""

    def all_layers() -> None:
        for layer, call in zip(layers, calls, strict=True):
            layer(call)

    return [seconds / len(layers) for seconds in time_graph(all_layers)]


def time_graph(step: Callable[[], object]) -> list[float]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return time_calls(graph.replay)


def time_calls(step: Callable[[], object]) -> list[float]:
    times = []
    for _ in range(REPLAYS + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return times[3:]


def floor_s(shape: MoEShape, call: Call, machine: Machine) -> float:
    weights = 3 * shape.hidden * shape.intermediate
    active = int(call.ids_TK.unique().numel())
    flops = 2 * weights * call.ids_TK.numel()
    return max(active * weights * BYTES_PER_WEIGHT / machine.bandwidth, flops / machine.flops)


def measure_machine() -> Machine:
    source = torch.empty(1 << 32, dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    copy_s = statistics.median(time_calls(lambda: target.copy_(source)))
    a, b = (torch.randn(8192, 8192, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    product_s = statistics.median(time_calls(lambda: a @ b))
    return Machine(2 * source.numel() / copy_s, 2 * 8192**3 / product_s)


def spread_us(times_s: list[float]) -> list[float]:
    return [round(percentile(times_s, percent) * 1e6, 1) for percent in (10, 50, 90)]


if __name__ == "__main__":
    main()
