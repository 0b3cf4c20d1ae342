"""Experts come onto a GPU as they are on disk, and are put in order there, without waiting for it."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch import Tensor

from experts.backends import Scales
from experts.backends.b12x.weights import B12xWeights
from experts.backends.triton.backend import Layer
from experts.checkpoint import expert_stream
from experts.checkpoint.expert_stream import ExpertStream
from experts.checkpoint.reader import ExpertCheckpoint
from experts.weights import ExpertWeights, MoEShape
from tests.support.checkpoints import write_modelopt
from tests.unit.checkpoints.test_checkpoint import LAYOUTS
from tests.unit.checkpoints.test_expert_stream import with_configs

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda")
SHAPE = MoEShape(num_layers=1, moe_layers=(0,), num_experts=24, hidden=256, intermediate=192)


def tensors_of(weights: ExpertWeights) -> list[Tensor]:
    matrices = [
        getattr(w, field.name) for w in (weights.gate, weights.up, weights.down) for field in fields(w)
    ]
    return [*matrices, *(s for s in (weights.input_scale, weights.down_input_scale) if s is not None)]


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
    assert torch.equal(
        ours.cpu().contiguous().view(-1).view(torch.uint8), theirs.contiguous().view(-1).view(torch.uint8)
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    sizes = {"num_layers": 1, "num_experts": SHAPE.num_experts}
    return write_modelopt(folder / "c", **sizes, hidden=SHAPE.hidden, intermediate=SHAPE.intermediate)


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_experts_on_the_gpu_are_those_on_disk(
    checkpoint: Path, tmp_path: Path, layout: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a ring of four experts, so that pinned memory is written again while the GPU works."""
    monkeypatch.setattr(expert_stream, "AHEAD_BYTES", 1)
    path = checkpoint if layout is None else LAYOUTS[layout](with_configs(checkpoint), tmp_path / "c")
    experts = [(0, n % SHAPE.num_experts) for n in range(200)]
    with ExpertCheckpoint(path) as files, ExpertStream(files, experts, device=GPU) as stream:
        streamed = [tensors_of(weights) for weights in stream]
        for at, ours in zip(experts, streamed, strict=True):
            for x, y in zip(ours, tensors_of(files.read(*at)), strict=True):
                assert x.is_cuda
                assert_equal(x, y)


def triton(device: torch.device) -> tuple[Callable[[int, ExpertWeights], None], list[Tensor]]:
    layer = Layer(SHAPE, SHAPE.num_experts, device)
    return layer.write, [*layer.gate_up, *layer.down, layer.scale_2_e3]


def b12x(
    device: torch.device, scales: Scales = "exact"
) -> tuple[Callable[[int, ExpertWeights], None], list[Tensor]]:
    weights = B12xWeights(SHAPE, SHAPE.num_experts, device, scales=scales)
    names = (
        "w13",
        "w2",
        "_w13_storage",
        "_w2_storage",
        "w13_alpha",
        "w2_alpha",
        "input_scale",
        "fc2_input_scale",
    )
    return weights.write_slot, [getattr(weights, name) for name in names]


def b12x_baked(device: torch.device) -> tuple[Callable[[int, ExpertWeights], None], list[Tensor]]:
    return b12x(device, "baked")


@pytest.mark.parametrize("kind", [triton, b12x, b12x_baked])
def test_slots_hold_the_same_bits_as_on_a_cpu_and_nobody_waits(kind: Callable, checkpoint: Path) -> None:
    experts = [(0, n) for n in range(SHAPE.num_experts)]
    (write, there), (write_here, here) = kind(GPU), kind(CPU)
    with ExpertCheckpoint(checkpoint) as files:
        with ExpertStream(files, experts, device=GPU) as stream:
            try:
                for slot, weights in enumerate(stream):
                    write(slot, weights)
                    torch.cuda.set_sync_debug_mode("error")  # from the second on: the first makes tables
            finally:
                torch.cuda.set_sync_debug_mode("default")
        for slot, at in enumerate(experts):
            write_here(slot, files.read(*at))
    for x, y in zip(there, here, strict=True):
        assert_equal(x, y)
