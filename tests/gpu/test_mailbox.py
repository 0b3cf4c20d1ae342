"""Lanes on a GPU: the kernels do what host.py does, call by call and in CUDA graphs, beside each other and a CPU."""

import threading
from collections.abc import Callable
from typing import Self

import pytest
import torch
from torch import Tensor

from experts.fabric.mailbox.host import HostRouterLane, HostShardLane
from experts.fabric.mailbox.region import LaneShape, Region
from experts.fabric.mailbox.words import StopWord
from experts.placement import EMPTY

pytestmark = pytest.mark.gpu

CPU = torch.device("cpu")
LAYERS = 4


class Lane:
    """A router and its shards, each on a device; on a GPU each has a stream of its own, on a CPU a thread."""

    def __init__(self, shape: LaneShape, router: str, shards: list[str]) -> None:
        self.shape = shape
        self.regions = [Region.create(shape.outbox_bytes)] + [
            Region.create(shape.inbox_bytes) for _ in shards
        ]
        for region in self.regions:
            region.register()
        self.stops = [StopWord(pinned=True) for _ in self.regions]
        self.devices = [torch.device(name) for name in (router, *shards)]
        self.streams = [torch.cuda.Stream() for _ in self.devices]
        outbox, *inboxes = self.regions
        if self.devices[0] == CPU:
            self.router = HostRouterLane(shape, outbox, self.stops[0])
        else:
            from experts.fabric.mailbox.device import DeviceRouterLane

            self.router = DeviceRouterLane(shape, outbox, self.stops[0], device=self.devices[0])
        self.shards = [
            self._shard(device, inbox, stop)
            for device, inbox, stop in zip(self.devices[1:], inboxes, self.stops[1:], strict=True)
        ]

    def _shard(self, device: torch.device, inbox: Region, stop: StopWord):  # noqa: ANN202 one of two classes
        if device == CPU:
            return HostShardLane(self.shape, self.regions[0], inbox, stop)
        from experts.fabric.mailbox.device import DeviceShardLane

        return DeviceShardLane(self.shape, self.regions[0], inbox, stop, device=device)

    def warm(self, rows: int) -> None:
        """Run a stopped step on every GPU: neither a kernel is loaded nor memory allocated while another kernel waits."""
        for stop in self.stops:
            stop.raise_to(LAYERS)
        self.begin(first=1, rows=rows)
        if self.devices[0] != CPU:
            x_LTD, ids_LTK, w_LTK, own_LTD = inputs(self.shape, rows, 0, self.devices[0])
            with torch.cuda.stream(self.streams[0]):
                run_router(self, x_LTD, ids_LTK, w_LTK, own_LTD, torch.empty_like(x_LTD))
            torch.cuda.synchronize()
        for place, device in enumerate(self.devices[1:], start=1):
            if device != CPU:
                with torch.cuda.stream(self.streams[place]):
                    self.serve(place, self.buffers(place, rows), place - 1)
                torch.cuda.synchronize()

    def begin(self, *, first: int, rows: int) -> None:
        """Start a step at every end."""
        self._on(0, lambda: self.router.begin(first=first, rows=rows, inboxes=self.regions[1:]))
        for place, shard in enumerate(self.shards, start=1):
            self._on(place, lambda shard=shard: shard.begin(first=first, rows=rows))
        torch.cuda.synchronize()

    def serve(self, place: int, buffers: tuple[Tensor, Tensor, Tensor], own: int) -> None:
        """Run one shard's end of a step: x times the weights of the ids that are its own, modulo the shards."""
        x_TD, ids_TK, w_TK = buffers
        for position in range(LAYERS):
            shard = self.shards[place - 1]
            shard.take(position, x_TD, ids_TK, w_TK)
            shard.post(position, partial(x_TD, ids_TK, w_TK, own, len(self.shards)))

    def buffers(self, place: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the tensors that a shard takes its rows into, poisoned."""
        shape, device = self.shape, self.devices[place]
        return (
            torch.full((rows, shape.hidden), torch.nan, dtype=shape.dtype, device=device),
            torch.full((rows, shape.top_k), 7777, dtype=torch.int32, device=device),
            torch.full((rows, shape.top_k), torch.nan, device=device),
        )

    def _on(self, place: int, call: Callable[[], None]) -> None:
        with torch.cuda.stream(self.streams[place]):
            call()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let whatever still waits run out, then take the regions from the GPU."""
        for stop in self.stops:
            stop.raise_to(2**62)
        torch.cuda.synchronize()
        for region in self.regions:
            region.close()


def partial(x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, own: int, num_shards: int) -> Tensor:
    own_TK = (ids_TK >= 0) & (ids_TK % num_shards == own)
    return x_TD * torch.where(own_TK, w_TK, 0).sum(-1, keepdim=True).to(x_TD.dtype)


def truth_of(x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, own_TD: Tensor, num_shards: int) -> Tensor:
    total_TD = own_TD.float()
    for own in range(num_shards):
        total_TD = total_TD + partial(x_TD, ids_TK, w_TK, own, num_shards).float()
    return total_TD.to(x_TD.dtype)


def inputs(shape: LaneShape, rows: int, seed: int, device: torch.device) -> tuple[Tensor, ...]:
    """Rows, ids, weights and own partial sums of every layer."""
    generator = torch.Generator().manual_seed(seed)
    size = (LAYERS, rows, shape.hidden)
    return tuple(
        tensor.to(device)
        for tensor in (
            torch.randn(size, generator=generator).to(shape.dtype),
            torch.randint(-1, 9, (LAYERS, rows, shape.top_k), generator=generator, dtype=torch.int32),
            torch.randint(0, 32, (LAYERS, rows, shape.top_k), generator=generator) / 16,  # sums are exact
            torch.randn(size, generator=generator).to(shape.dtype),
        )
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("router", "shards"),
    [
        ("cuda", ["cpu"]),
        ("cpu", ["cuda"]),
        ("cuda", ["cuda"]),
        ("cuda", ["cuda", "cpu", "cuda"]),
    ],
)
def test_every_layer_is_the_sum_in_rank_order(router: str, shards: list[str], dtype: torch.dtype) -> None:
    shape = LaneShape(rows=300, hidden=2048, top_k=8, dtype=dtype)
    with Lane(shape, router, shards) as lane:
        for step, (rows, posted) in enumerate([(1, 1), (5, 8), (64, 64), (300, 300), (2, 2)], start=1):
            if step < 5:
                lane.warm(posted)
            lane.begin(first=1 + step * LAYERS, rows=rows)
            x_LTD, ids_LTK, w_LTK, own_LTD = inputs(shape, posted, step, lane.devices[0])
            out_LTD = torch.full_like(x_LTD, torch.nan)
            threads = []
            for place, device in enumerate(lane.devices[1:], start=1):
                work = (place, lane.buffers(place, posted), place - 1)
                if device == CPU:
                    threads.append(threading.Thread(target=lane.serve, args=work))
                    threads[-1].start()
            torch.cuda.synchronize()
            with torch.cuda.stream(lane.streams[0]):
                if lane.devices[0] != CPU:
                    run_router(lane, x_LTD, ids_LTK, w_LTK, own_LTD, out_LTD)
            for place, device in enumerate(lane.devices[1:], start=1):
                if device != CPU:
                    with torch.cuda.stream(lane.streams[place]):
                        lane.serve(place, lane.buffers(place, posted), place - 1)
            if lane.devices[0] == CPU:
                run_router(lane, x_LTD, ids_LTK, w_LTK, own_LTD, out_LTD)
            for thread in threads:
                thread.join(20)
                assert not thread.is_alive()
            torch.cuda.synchronize()
            ids_LTK[:, rows:] = EMPTY
            for position in range(LAYERS):
                layer = (x_LTD[position], ids_LTK[position], w_LTK[position], own_LTD[position])
                truth_TD = truth_of(*layer, len(shards))
                assert torch.equal(out_LTD[position, :rows], truth_TD[:rows])
            assert out_LTD.isfinite().all(), "rows that are not real are written, too"


def run_router(
    lane: Lane, x_LTD: Tensor, ids_LTK: Tensor, w_LTK: Tensor, own_LTD: Tensor, out_LTD: Tensor
) -> None:
    for position in range(LAYERS):
        lane.router.post(position, x_LTD[position], ids_LTK[position], w_LTK[position])
        lane.router.take_sum(position, own_LTD[position], out_LTD[position])


def test_both_ends_run_as_graphs_that_are_captured_with_the_stop_raised() -> None:
    shape = LaneShape(rows=8, hidden=2048, top_k=8, dtype=torch.bfloat16)
    with Lane(shape, "cuda", ["cuda"]) as lane:
        x_LTD, ids_LTK, w_LTK, own_LTD = inputs(shape, 8, 0, lane.devices[0])
        out_LTD = torch.full_like(x_LTD, torch.nan)
        buffers = lane.buffers(1, 8)
        for stop in lane.stops:
            stop.raise_to(LAYERS)
        lane.begin(first=1, rows=8)
        graphs = []
        for stream, work in (
            (lane.streams[0], lambda: run_router(lane, x_LTD, ids_LTK, w_LTK, own_LTD, out_LTD)),
            (lane.streams[1], lambda: lane.serve(1, buffers, 0)),
        ):
            with torch.cuda.stream(stream):
                work()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=stream):
                work()
            graphs.append(graph)
        assert int(lane.regions[0].bytes[:8].view(torch.int64)) == 0, "a stopped step raises no flag"
        for step, rows in enumerate((8, 3, 8, 1), start=1):
            for tensor, fresh in zip(
                (x_LTD, ids_LTK, w_LTK, own_LTD), inputs(shape, 8, step, lane.devices[0]), strict=True
            ):
                tensor.copy_(fresh)
            out_LTD.fill_(torch.nan)
            lane.begin(first=1 + step * LAYERS, rows=rows)
            for graph, stream in zip(graphs, lane.streams, strict=True):
                with torch.cuda.stream(stream):
                    graph.replay()
            torch.cuda.synchronize()
            for position in range(LAYERS):
                layer = (x_LTD[position], ids_LTK[position], w_LTK[position], own_LTD[position])
                truth_TD = truth_of(*layer, 1)
                assert torch.equal(out_LTD[position, :rows], truth_TD[:rows])


def test_a_stop_ends_a_graph_that_nobody_answers() -> None:
    shape = LaneShape(rows=8, hidden=2048, top_k=8, dtype=torch.bfloat16)
    with Lane(shape, "cuda", ["cuda"]) as lane:
        lane.warm(8)
        lane.begin(first=1 + LAYERS, rows=8)
        x_LTD, ids_LTK, w_LTK, own_LTD = inputs(shape, 8, 0, lane.devices[0])
        done = torch.cuda.Event()
        with torch.cuda.stream(lane.streams[0]):
            run_router(lane, x_LTD, ids_LTK, w_LTK, own_LTD, torch.empty_like(x_LTD))
            done.record()
        assert not done.query()
        lane.stops[0].raise_to(2 * LAYERS)
        done.synchronize()
        assert int(lane.regions[0].bytes[:8].view(torch.int64)) == 1 + LAYERS, (
            "the first layer was posted, no other"
        )
