"""dispatch + combine over fabric `tcp`: python -m tests.bench.dispatch [--output FILE]

Shard processes whose forward does nothing, so the wire is what is measured: the copy into the frame, both ways through
the sockets, the checks, the sum. `bare` is its floor: the same bytes through bare sockets between as many processes,
nothing copied, checked or summed. The two take turns, round by round, and both spin while they wait.
"""

import argparse
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Literal, get_args

import torch
from torch import Tensor

from experts.fabric import Membership, ShardAddress, StepHeader
from experts.fabric.tcp import shard_end, shard_link
from experts.fabric.tcp.frames import HEADER_BYTES, FrameShape
from experts.fabric.tcp.router_end import TcpFabric
from experts.fabric.tcp.shard_end import ShardListener
from experts.fabric.tcp.sockets import listen_here, prepare, receive_some
from experts.placement import even_placement
from experts.weights import MoEShape
from tests.bench import report
from tests.support.processes import processes

Way = Literal["unix", "tcp"]
"""The ways in which shards on the router's host are reached, and all others."""

HIDDEN = 2048
TOP_K = 8
NUM_EXPERTS = 128
CASES = [
    (way, rows, dtype)
    for way in get_args(Way)
    for dtype in (torch.bfloat16, torch.float32)
    for rows in (1, 16, 256)
]
GOALS_US = {(1, torch.bfloat16): 50.0, (256, torch.bfloat16): 900.0}


class IdleShard:
    """An ExpertShard without experts, whose partial sums are what its buffer holds: zeros."""

    device = torch.device("cpu")
    shape = MoEShape(num_layers=1, moe_layers=(0,), num_experts=NUM_EXPERTS, hidden=HIDDEN, intermediate=768)

    def __init__(self, rank: int, dtype: torch.dtype) -> None:
        self.rank = rank
        self.dtype = dtype

    def forward(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        return


def shard_process(rank: int, dtype: torch.dtype, parent: Connection) -> None:
    torch.set_num_threads(1)
    listener = ShardListener(IdleShard(rank, dtype), host="127.0.0.1", name=f"bench-{rank}", token=b"bench")
    parent.send(listener.address)
    parent.poll(None)  # it ends


def bare_process(way: Way, num_in: int, num_out: int, parent: Connection) -> None:
    """Answer num_in bytes with num_out bytes."""
    with bare_server(way) as server:
        parent.send(server.getsockname())
        sock, _ = server.accept()
    request, reply = memoryview(bytearray(num_in)), memoryview(bytearray(num_out))
    prepare(sock)
    with sock, suppress(ConnectionError):
        while True:
            fill(sock, request, spin_s=shard_end.SPIN_S)
            sock.sendall(reply)


def bare_server(way: Way) -> socket.socket:
    if way == "tcp":
        return socket.create_server(("127.0.0.1", 0))
    return listen_here(f"sparkmoe-bench-{os.getpid()}")


def fill(sock: socket.socket, view: memoryview, *, spin_s: float) -> None:
    """Receive a whole buffer, waiting as the fabric does. Raises ConnectionError at the end of the stream."""
    received = 0
    while received < len(view):
        received += receive_some(sock, view[received:], spin_s)


@contextmanager
def fabric_layer(way: Way, rows: int, dtype: torch.dtype, num_shards: int) -> Iterator[Callable[[], None]]:
    """Return a function that dispatches and combines once, against shard processes that live as long as this
    context."""
    with processes(shard_process, [(rank, dtype) for rank in range(num_shards)]) as addresses:
        shards: list[ShardAddress] = addresses
        if way == "tcp":
            shards = [replace(shard, unix="") for shard in shards]  # as from another host
        placement = even_placement((0,), num_layers=1, num_experts=NUM_EXPERTS, num_ranks=num_shards)
        fabric = TcpFabric(hidden=HIDDEN, wire_dtype=dtype, slow_after_s=2, dead_after_s=10)
        fabric.connect(Membership(epoch=1, shards=tuple(shards), placement=placement), timeout_s=5)
        fabric.begin(StepHeader(epoch=1, step=0, rows=rows))
        x_TD = torch.randn(rows, HIDDEN, dtype=dtype)
        phys_TK = torch.randint(NUM_EXPERTS, (rows, TOP_K), dtype=torch.int32)
        w_TK = torch.rand(rows, TOP_K)
        out_TD = torch.empty_like(x_TD)
        yield lambda: fabric.combine(fabric.dispatch(0, x_TD, phys_TK, w_TK), out_TD)
        fabric.close()


@contextmanager
def bare_layer(way: Way, rows: int, dtype: torch.dtype, num_shards: int) -> Iterator[Callable[[], None]]:
    """Return a function that moves a layer's bytes through bare sockets."""
    num_out, num_in = frame_bytes(rows, dtype)
    request, replies = bytes(num_out), [memoryview(bytearray(num_in)) for _ in range(num_shards)]
    with processes(bare_process, [(way, num_out, num_in)] * num_shards) as addresses:
        sockets = [socket.socket(socket.AF_INET if way == "tcp" else socket.AF_UNIX) for _ in addresses]

        def layer() -> None:
            for sock in sockets:
                sock.sendall(request)
            for sock, reply in zip(sockets, replies, strict=True):
                fill(sock, reply, spin_s=shard_link.SPIN_S)

        for sock, address in zip(sockets, addresses, strict=True):
            sock.connect(address)
            prepare(sock)
        yield layer
        for sock in sockets:
            sock.close()


def frame_bytes(rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Return how many bytes a layer sends to one shard and gets back."""
    shape = FrameShape(rows, HIDDEN, TOP_K, dtype)
    return HEADER_BYTES + shape.layer_bytes, HEADER_BYTES + shape.partial_bytes


def timed(layer: Callable[[], None], *, warmup: int, iterations: int) -> list[float]:
    """Return the seconds of each call."""
    for _ in range(warmup):
        layer()
    samples = []
    for _ in range(iterations):
        began = time.perf_counter()
        layer()
        samples.append(time.perf_counter() - began)
    return samples


def measure(way: Way, rows: int, dtype: torch.dtype, *, num_shards: int, num_rounds: int) -> dict:
    iterations = 2000 if rows < 256 else 300
    wire, bare = [], []
    with (
        fabric_layer(way, rows, dtype, num_shards) as over_wire,
        bare_layer(way, rows, dtype, num_shards) as over_sockets,
    ):
        for _ in range(num_rounds):
            wire.append(timed(over_wire, warmup=50, iterations=iterations))
            bare.append(timed(over_sockets, warmup=50, iterations=iterations))
    return {
        "way": way,
        "rows": rows,
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": num_shards * sum(frame_bytes(rows, dtype)),
        "goal_p50_us": GOALS_US.get((rows, dtype)),
        **report.spread(wire, unit="us", scale=1e6),
        "bare": report.spread(bare, unit="us", scale=1e6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--output", metavar="FILE", help="also write the JSON line to tests/bench/results/FILE"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{'way':>5} {'shape':>12} {'dtype':>9} {'bytes':>9} {'p50 µs':>8} {'quietest':>8} {'p99 µs':>8} {'bare p50':>8} {'goal':>6}"
    )
    results = []
    for way, rows, dtype in CASES:
        result = measure(way, rows, dtype, num_shards=arguments.shards, num_rounds=arguments.rounds)
        results.append(result)
        print(
            f"{way:>5} {f'[{rows},{HIDDEN}]':>12} {result['dtype']:>9} {result['bytes']:>9} {result['p50_us']:>8} "
            f"{result['p50_rounds_us'][0]:>8} {result['p99_us']:>8} {result['bare']['p50_us']:>8} "
            f"{result['goal_p50_us'] or '':>6}"
        )
    config = {
        "shards": arguments.shards,
        "rounds": arguments.rounds,
        "hidden": HIDDEN,
        "top_k": TOP_K,
        "threads": 1,
    }
    report.emit("dispatch", results, config=config, output=arguments.output)


if __name__ == "__main__":
    main()
