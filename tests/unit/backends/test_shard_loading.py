"""A shard from a checkpoint: what was chosen for its kernel, and that it is warm.

T tokens, D hidden, K top-k.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from experts.backends import ExpertBackend, KernelSettings, Scales
from experts.backends.b12x.emulated import B12xEmulatedBackend
from experts.backends.registry import BACKENDS
from experts.checkpoint.index import CheckpointIndex
from experts.checkpoint.reader import ExpertCheckpoint
from experts.placement import place_evenly
from experts.progress import Progress
from experts.shard import ExpertShard, load_shard
from experts.weights import ExpertWeights, MoEShape
from router.model_config import FAMILIES
from tests.support.families import write_nvfp4
from tests.support.places import DEMO_MODEL
from tests.unit.backends.test_b12x_layout import random_expert

CPU = torch.device("cpu")


class NeedsWarmth(ExpertBackend):
    """A backend that wants to be warmed. did: what it was asked for, in order."""

    did: ClassVar[list[str]] = []

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        self.did.append("write")

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None: ...

    def warm(self, *, top_k: int) -> Iterator[Progress]:
        yield Progress(0, 1, "kernels", "a kernel")
        self.did.append(f"warm for top-{top_k}")
        yield Progress(1, 1, "kernels")


def test_a_shard_that_was_loaded_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "none", lambda *_: NeedsWarmth())
    with ExpertCheckpoint(DEMO_MODEL) as checkpoint:
        placement = place_evenly(checkpoint.shape, num_ranks=4)
        load_shard(checkpoint, placement, rank=3, backend="none", dtype=torch.float32, device=CPU)
    assert NeedsWarmth.did == ["write"] * (6 * 8) + ["warm for top-4"]


@pytest.mark.parametrize("scales", ["exact", "baked"])
def test_what_a_user_chose_reaches_the_kernel(scales: Scales) -> None:
    shape = MoEShape(num_layers=1, moe_layers=(0,), num_experts=1, hidden=128, intermediate=64)
    expert = random_expert(shape, 1)
    settings = KernelSettings(scales=scales)
    shard = ExpertShard(
        shape,
        rank=0,
        slots_per_rank=1,
        backend="b12x-emulated",
        dtype=torch.float32,
        device=CPU,
        settings=settings,
    )
    backend = B12xEmulatedBackend(shape, 1, torch.float32, CPU, scales=scales)
    x_TD, w_TK = torch.randn(9, 128), torch.ones(9, 1)
    ours_TD, theirs_TD = torch.empty_like(x_TD), torch.empty_like(x_TD)
    shard.write_slot(0, 0, expert)
    backend.write_slot(0, 0, expert)
    ids_TK = torch.zeros(9, 1, dtype=torch.int32)
    shard.forward(0, x_TD, ids_TK, w_TK, out_TD=ours_TD)
    backend.forward(0, x_TD, ids_TK, w_TK, out_TD=theirs_TD)
    assert torch.equal(ours_TD, theirs_TD)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_says_how_many_experts_a_token_has(tmp_path: Path, family: str) -> None:
    with CheckpointIndex(write_nvfp4(family, tmp_path)) as checkpoint:
        assert checkpoint.top_k == 3
