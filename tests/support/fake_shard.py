"""A shard without experts, for tests of the wire, and what it takes to reach it.

T tokens, D hidden, K top-k.
"""

import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
from torch import Tensor

from experts.fabric import Fabric, Membership, ShardAddress, StepHeader
from experts.fabric.tcp.router_end import TcpFabric
from experts.fabric.tcp.shard_end import ShardListener
from experts.placement import even_placement
from experts.weights import MoEShape

HIDDEN = 64
NUM_EXPERTS = 12
CPU = torch.device("cpu")
TOKEN = b"a secret between these tests"


class FakeShard:
    """A shard whose expert e multiplies x by e + layer; rank r has the experts with e % num_ranks == r.

    trouble: by layer, what to do before the forward of that layer.
    """

    shape = MoEShape(4, (0, 1, 2, 3), num_experts=NUM_EXPERTS, hidden=HIDDEN, intermediate=32)

    def __init__(
        self,
        rank: int,
        *,
        num_ranks: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device = CPU,
        trouble: Mapping[int, Callable[[], object]] | None = None,
    ) -> None:
        self.rank = rank
        self.dtype = dtype
        self.device = device
        self._num_ranks = num_ranks
        self._trouble = trouble or {}

    def forward(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        self._trouble.get(layer, bool)()
        local_TK = phys_TK % self._num_ranks == self.rank
        factor_T = (w_TK * (phys_TK + layer) * local_TK).sum(1, keepdim=True)
        out_TD.copy_(x_TD * factor_T)


class LayerInput(NamedTuple):
    x_TD: Tensor
    phys_TK: Tensor
    w_TK: Tensor


def layer_input(rows: int, *, dtype: torch.dtype = torch.float32, top_k: int = 4) -> LayerInput:
    seeded = torch.Generator().manual_seed(rows)
    x_TD = torch.randn(rows, HIDDEN, generator=seeded).to(dtype)
    phys_TK = torch.randint(NUM_EXPERTS, (rows, top_k), generator=seeded, dtype=torch.int32)
    return LayerInput(x_TD, phys_TK, torch.rand(rows, top_k, generator=seeded))


def fake_shards(num_ranks: int, dtype: torch.dtype = torch.float32) -> list[FakeShard]:
    return [FakeShard(rank, num_ranks=num_ranks, dtype=dtype) for rank in range(num_ranks)]


def in_process(shards: Sequence[FakeShard], layer: int, given: LayerInput) -> Tensor:
    """Return what a fabric's combine must return: the partial sums, added in float32 in rank order."""
    sum_TD = torch.zeros(given.x_TD.shape, device=given.x_TD.device)
    for shard in shards:
        partial_TD = torch.empty_like(given.x_TD, dtype=shard.dtype)
        shard.forward(layer, given.x_TD.to(shard.dtype), given.phys_TK, given.w_TK, out_TD=partial_TD)
        sum_TD += partial_TD
    return sum_TD


def through(fabric: Fabric, layer: int, given: LayerInput, *, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the combined output of a layer after dispatch and combine through a fabric."""
    out_TD = torch.empty(given.x_TD.shape, dtype=dtype)
    fabric.combine(fabric.dispatch(layer, *given), out_TD)
    return out_TD


Reach = Callable[[ShardAddress], ShardAddress]


def over_unix(address: ShardAddress) -> ShardAddress:
    return address


def over_tcp(address: ShardAddress) -> ShardAddress:
    """Return the address without its Unix socket, as a router on another host sees it."""
    return replace(address, unix="")


reach: Reach = over_tcp
"""The way in which every fabric of a test reaches its shards."""


def members_of(addresses: Sequence[ShardAddress], *, epoch: int) -> Membership:
    placement = even_placement((0,), num_layers=1, num_experts=NUM_EXPERTS, num_ranks=len(addresses))
    return Membership(epoch=epoch, shards=tuple(map(reach, addresses)), placement=placement)


def begin(fabric: Fabric, *, epoch: int = 1, step: int = 0, rows: int = 1) -> None:
    fabric.begin(StepHeader(epoch=epoch, step=step, rows=rows))


def tcp_fabric(
    *, wire_dtype: torch.dtype = torch.float32, slow_after_s: float = 2.5, dead_after_s: float = 5.0
) -> TcpFabric:
    return TcpFabric(
        hidden=HIDDEN, wire_dtype=wire_dtype, slow_after_s=slow_after_s, dead_after_s=dead_after_s
    )


@contextmanager
def connected(
    *addresses: ShardAddress,
    wire_dtype: torch.dtype = torch.float32,
    slow_after_s: float = 2.5,
    dead_after_s: float = 5.0,
) -> Iterator[TcpFabric]:
    """Yield a fabric that is connected to these shards and has begun step 0 of epoch 1."""
    fabric = tcp_fabric(wire_dtype=wire_dtype, slow_after_s=slow_after_s, dead_after_s=dead_after_s)
    with closing(fabric):
        fabric.connect(members_of(addresses, epoch=1), timeout_s=5)
        begin(fabric)
        yield fabric


def addresses_of(listeners: Sequence[ShardListener]) -> list[ShardAddress]:
    return [listener.address for listener in listeners]


def address_of(server: socket.socket, *, rank: int, name: str = "nobody") -> ShardAddress:
    """Return the address of a listening socket that plays a shard."""
    return ShardAddress(rank, "127.0.0.1", server.getsockname()[1], name=name, pid=0, token=TOKEN)


@contextmanager
def listening(shards: Sequence[FakeShard], *, incarnation: str = "first") -> Iterator[list[ShardListener]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                closing(
                    ShardListener(shard, host="127.0.0.1", name=f"{incarnation}-{shard.rank}", token=TOKEN)
                )
            )
            for shard in shards
        ]


def threads_of_links() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "-link-" in thread.name}


def serve_in_process(rank: int, num_ranks: int, parent: Connection) -> None:
    """Send the address of a fake shard through the pipe and serve until the pipe ends; runs in a process of
    tests.support.processes."""
    with listening([FakeShard(rank, num_ranks=num_ranks)], incarnation="process") as (listener,):
        parent.send(listener.address)
        parent.poll(None)
