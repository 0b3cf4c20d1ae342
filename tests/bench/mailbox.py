"""The wire of fabric `mailbox` alone: a router on one GPU, an echo in place of the experts on each of the others.

    python -m tests.bench.mailbox [--output FILE]

Both ends are CUDA graphs of 48 layers over a shared region, as a decode step is: post, wait, fetch, post, wait, add. All
GPUs of the host are used in one process, with 1, 2, ... shards. Microseconds are of a layer, from the start of the router's
graph to its end; the median of the replays, with the tenth and the ninetieth percentile. Floor: the bytes of x, ids, weights
and partial sums over the measured bandwidth of a pinned copy, four ways over the bus one after the other, without latency.
"""

import argparse
import time
from typing import Any

import torch

from experts.fabric.mailbox.device import DeviceRouterLane, DeviceShardLane
from experts.fabric.mailbox.region import LaneShape, Region
from experts.fabric.mailbox.words import StopWord
from tests.bench.report import emit, percentile

HIDDEN, TOP_K, LAYERS = 2048, 8, 48
ROWS = (1, 8, 64, 256)
REPLAYS = 60
GOALS_US = {1: (20, 27, 70), 3: (28, 42, 115)}
"""DESIGN's goals for 1, 8 and 64 rows, by the number of shards."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    arguments = parser.parse_args()
    bandwidth = copy_bandwidth()
    results: list[dict[str, Any]] = []
    for num_shards in range(1, torch.cuda.device_count()):
        for place, rows in enumerate(ROWS):
            samples = [us / LAYERS for us in echo_us(rows, num_shards)]
            goals = GOALS_US.get(num_shards, ())
            result = {
                "shards": num_shards,
                "rows": rows,
                "us": round(percentile(samples, 50), 1),
                "p10_us": round(percentile(samples, 10), 1),
                "p90_us": round(percentile(samples, 90), 1),
                "floor_us": round(floor_us(rows, num_shards, bandwidth), 1),
                "goal_us": goals[place] if place < len(goals) else None,
            }
            results.append(result)
            print(result, flush=True)
    config = {"hidden": HIDDEN, "top_k": TOP_K, "layers": LAYERS, "bus_gb_s": round(bandwidth / 1e9, 1)}
    emit("mailbox", results, config=config, output=arguments.output)


def copy_bandwidth() -> float:
    """Return the bytes per second of a copy from a GPU to pinned memory."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    target = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        began = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - began)
    return len(target) / min(times)


def floor_us(rows: int, num_shards: int, bandwidth: float) -> float:
    """Return the microseconds of a layer's bytes: to the host, to every shard, from every shard, and to the router.

    Shards read and write at the same time, each over a bus of its own; the router reads the partial sums of all.
    """
    x_bytes, routing_bytes = 2 * rows * HIDDEN, 8 * rows * TOP_K
    return 1e6 * (2 * (x_bytes + routing_bytes) + (1 + num_shards) * x_bytes) / bandwidth


def echo_us(rows: int, num_shards: int) -> list[float]:
    """Return the microseconds of each replay, having checked that the sum of the last is right."""
    shape = LaneShape(rows=rows, hidden=HIDDEN, top_k=TOP_K, dtype=torch.bfloat16)
    devices = [torch.device("cuda", index) for index in range(num_shards + 1)]
    outbox = Region.create(shape.outbox_bytes)
    inboxes = [Region.create(shape.inbox_bytes) for _ in range(num_shards)]
    for region in (outbox, *inboxes):
        region.register()
    stops = [StopWord(pinned=True) for _ in devices]
    streams = [torch.cuda.Stream(device) for device in devices]
    x_TD = torch.randn(rows, HIDDEN, device=devices[0], dtype=shape.dtype)
    ids_TK = torch.zeros(rows, TOP_K, dtype=torch.int32, device=devices[0])
    w_TK = torch.ones(rows, TOP_K, device=devices[0])
    out_TD = torch.empty_like(x_TD)
    router = DeviceRouterLane(shape, outbox, stops[0], device=devices[0])
    shards = [
        DeviceShardLane(shape, outbox, inbox, stop, device=device)
        for inbox, stop, device in zip(inboxes, stops[1:], devices[1:], strict=True)
    ]
    buffers = [
        (
            torch.empty(rows, HIDDEN, dtype=shape.dtype, device=device),
            torch.empty(rows, TOP_K, dtype=torch.int32, device=device),
            torch.empty(rows, TOP_K, device=device),
        )
        for device in devices[1:]
    ]

    def run(end: int) -> None:
        for position in range(LAYERS):
            if end == 0:
                router.post(position, x_TD, ids_TK, w_TK)
                router.take_sum(position, None, out_TD)
            else:
                shards[end - 1].take(position, *buffers[end - 1])
                shards[end - 1].post(position, buffers[end - 1][0])

    def begin(first: int) -> None:
        with torch.cuda.device(devices[0]), torch.cuda.stream(streams[0]):
            router.begin(first=first, rows=rows, inboxes=inboxes)
        for shard, device, stream in zip(shards, devices[1:], streams[1:], strict=True):
            with torch.cuda.device(device), torch.cuda.stream(stream):
                shard.begin(first=first, rows=rows)
        synchronize()

    def synchronize() -> None:
        for device in devices:
            torch.cuda.synchronize(device)

    for stop in stops:
        stop.raise_to(LAYERS)
    begin(1)
    graphs = []
    for end, device in enumerate(devices):
        with torch.cuda.device(device), torch.cuda.stream(streams[end]):
            run(end)
        synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph, stream=streams[end]):
            run(end)
        graphs.append(graph)
    samples = []
    for step in range(1, REPLAYS + 1):
        begin(1 + step * LAYERS)
        for end in range(num_shards, 0, -1):
            with torch.cuda.device(devices[end]), torch.cuda.stream(streams[end]):
                graphs[end].replay()
        began = time.perf_counter()
        with torch.cuda.device(devices[0]), torch.cuda.stream(streams[0]):
            graphs[0].replay()
        torch.cuda.synchronize(devices[0])
        samples.append(1e6 * (time.perf_counter() - began))
        synchronize()
    assert torch.equal(out_TD, (x_TD.float() * num_shards).to(shape.dtype)), "the echoes' sum"
    for region in (outbox, *inboxes):
        region.close()
    return samples[10:]


if __name__ == "__main__":
    main()
