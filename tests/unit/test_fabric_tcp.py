"""Fabric `tcp` over real sockets on the loopback: both ends, whole and broken. T tokens, D hidden, K top-k."""

import torch
import pytest
from torch import Tensor
from collections.abc import Iterator
from contextlib import contextmanager
from experts.fabric import Membership, PeerLost, StepHeader
from experts.fabric.link import ShardListener
from experts.fabric.tcp import TcpFabric
from experts.placement import even_placement
from experts.weights import MoEShape

HIDDEN = 64
TOP_K = 4
TOKEN = b"a secret of this test"


class FakeShard:
    """Rank r owns the ids with id % num_ranks == r; expert e multiplies by its weight and by e + 1."""

    def __init__(self, rank: int, num_ranks: int, *, dtype: torch.dtype = torch.float32) -> None:
        self.rank = rank
        self.num_ranks = num_ranks
        self.dtype = dtype
        self.device = torch.device("cpu")
        self.shape = MoEShape(num_layers=4, moe_layers=(0, 1, 2, 3), num_experts=8, hidden=HIDDEN, intermediate=32)

    def forward(self, layer: int, x_TD: Tensor, phys_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        mine_TK = w_TK * (phys_TK + 1 + layer) * (phys_TK % self.num_ranks == self.rank)
        torch.mul(x_TD, mine_TK.sum(1, keepdim=True), out=out_TD)


def test_smoke():
    shards = [FakeShard(r, 3) for r in range(3)]
    ls = [ShardListener(s, host="127.0.0.1", name=f"s{s.rank}", token=TOKEN) for s in shards]
    f = TcpFabric(hidden=HIDDEN, wire_dtype=torch.float32, slow_after_s=1, dead_after_s=2)
    m = Membership(epoch=1, shards=tuple(l.address for l in ls), placement=even_placement((0,), num_layers=1, num_experts=6, num_ranks=3))
    f.connect(m, timeout_s=2)
    for T in (1, 4096, 3, 0, 100):
        x = torch.randn(T, HIDDEN); ids = torch.randint(0, 8, (T, TOP_K), dtype=torch.int32); w = torch.rand(T, TOP_K)
        f.begin(StepHeader(epoch=1, step=T, rows=T))
        out = torch.empty(T, HIDDEN)
        f.combine(f.dispatch(2, x, ids, w), out)
        ref = torch.zeros(T, HIDDEN); part = torch.empty(T, HIDDEN)
        for s in shards:
            s.forward(2, x, ids, w, out_TD=part); ref += part
        assert torch.equal(ref, out)
    f.close()
    for l in ls: l.close()
