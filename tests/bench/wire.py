"""A measure of what the wire costs: tokens per second of one process that holds all experts beside a router and two shard processes.

    python -m tests.bench.wire [--output FILE]

16 greedy streams of 128 tokens of the demo model in float32, through the engine, without Ray and HTTP. Both sides may
keep two cores busy: the one process computes with 1 and with 2 torch threads, and its better rate counts; the router
and each shard compute with 1, and the router waits while the shards compute. Rounds of both sides alternate, and the
result is the median of the rounds' ratios: a machine that slows down for a minute slows both sides of a round.
"""

import argparse
import contextlib
import statistics
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import torch

from experts.fabric import Fabric, Membership
from experts.fabric.local import LocalFabric, local_membership
from experts.fabric.tcp.router_end import TcpFabric
from experts.fabric.tcp.shard_end import ShardListener
from router.config import RouterConfig
from router.engine import Engine
from router.model.trunk import Trunk
from router.request import Request, RequestOutput, SamplingParams
from router.text.tokenizer import Tokenizer, eos_token_ids
from tests.bench.report import emit
from tests.support.in_process import placement_of, shards_of
from tests.support.places import DEMO_MODEL
from tests.support.processes import processes

NUM_SHARDS = 2
NUM_STREAMS = 16
NUM_TOKENS = 128
NUM_ROUNDS = 11
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--output")
    options = parser.parse_args()
    rates: dict[str, list[float]] = {
        "one process, 1 thread": [],
        "one process, 2 threads": [],
        "router + 2 shards": [],
    }
    with _local() as local, _remote() as remote:
        for round_ in range(NUM_ROUNDS + 1):
            for name, engine, threads in (
                ("one process, 1 thread", local, 1),
                ("one process, 2 threads", local, 2),
                ("router + 2 shards", remote, 1),
            ):
                rate = engine.rate(threads)
                if round_:  # the first warms up
                    rates[name].append(rate)
    one_process = zip(*(rates[name] for name in rates if name.startswith("one")), strict=True)
    ratios = [wire / max(one) for wire, one in zip(rates["router + 2 shards"], one_process, strict=True)]
    ratio = statistics.median(ratios)
    print("| side | tokens/s: median (lowest to highest) |\n|---|---|")
    for name, values in rates.items():
        print(f"| {name} | {statistics.median(values):.0f} ({min(values):.0f} to {max(values):.0f}) |")
    print(f"\nwith the wire / without: {ratio:.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    results = [
        {"side": name, "tokens_per_s": [round(value) for value in values]} for name, values in rates.items()
    ]
    results.append({"ratio": round(ratio, 3), "ratio_rounds": sorted(round(value, 3) for value in ratios)})
    emit("wire", results, config={"streams": NUM_STREAMS, "tokens": NUM_TOKENS}, output=options.output)


class _Engine:
    """An engine that can be timed again and again."""

    def __init__(self, fabric: Fabric, members: Membership) -> None:
        self._tokenizer = Tokenizer(DEMO_MODEL)
        self._left = threading.Semaphore(0)
        self._round = 0
        self._threads = 1
        self._engine = Engine(
            Trunk.load(DEMO_MODEL, dtype=torch.float32, device=CPU),
            fabric,
            self._tokenizer,
            config=RouterConfig(),
            kv_bytes=2**28,
            eos=eos_token_ids(DEMO_MODEL),
            on_outputs=self._count,
            on_lost=lambda loss: None,
        )
        self._engine.adopt(members)
        self._engine.start()

    def rate(self, threads: int) -> float:
        self._threads = threads
        self._round += 1
        params = SamplingParams(max_tokens=NUM_TOKENS, temperature=0, ignore_eos=True)
        began = time.perf_counter()
        for i in range(NUM_STREAMS):
            prompt = self._tokenizer.encode(f"def read_file_{i}(path):\n")
            request = Request(f"{self._round}-{i}", tuple(prompt), params)
            self._engine.submit(self._engine.prepare(request))
        for _ in range(NUM_STREAMS):
            assert self._left.acquire(timeout=300)
        return NUM_STREAMS * NUM_TOKENS / (time.perf_counter() - began)

    def close(self) -> None:
        self._engine.stop()

    def _count(self, outputs: list[RequestOutput]) -> None:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)  # of the engine's thread, which is the one that calls us
        for output in outputs:
            if output.finish:
                self._left.release()


@contextlib.contextmanager
def _local() -> Iterator[_Engine]:
    shards = shards_of(DEMO_MODEL, 1, "cpu", torch.float32, CPU)
    engine = _Engine(LocalFabric(shards), local_membership(placement_of(DEMO_MODEL, 1)))
    try:
        yield engine
    finally:
        engine.close()


@contextlib.contextmanager
def _remote() -> Iterator[_Engine]:
    with processes(_serve, [(rank,) for rank in range(NUM_SHARDS)]) as addresses:
        members = Membership(epoch=1, shards=tuple(addresses), placement=placement_of(DEMO_MODEL, NUM_SHARDS))
        fabric = TcpFabric(hidden=256, wire_dtype=torch.float32, slow_after_s=5, dead_after_s=30)
        engine = _Engine(fabric, members)
        try:
            yield engine
        finally:
            engine.close()


def _serve(rank: int, parent: Connection) -> None:
    torch.set_num_threads(1)
    shard = shards_of(DEMO_MODEL, NUM_SHARDS, "cpu", torch.float32, CPU)[rank]
    listener = ShardListener(shard, host="127.0.0.1", name=f"{rank}", token=b"bench")
    parent.send(listener.address)
    parent.poll(None)  # it ends


if __name__ == "__main__":
    main()
