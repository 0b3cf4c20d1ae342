"""Experts are written where they are: no operation on the host, and no wait for the device.

The device is torch's `meta`, on which whatever needs a value on the host raises, as it would wait on a GPU.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from experts.backends.b12x.emulated import B12xEmulatedBackend
from experts.backends.b12x.weights import B12xWeights
from experts.backends.grouped_mm import GroupedMmBackend
from experts.weights import ExpertWeights, MoEShape, Nvfp4Weight
from tests.unit.backends.test_b12x_layout import random_expert

SHAPE = MoEShape(num_layers=1, moe_layers=(0,), num_experts=3, hidden=128, intermediate=64)
META = torch.device("meta")

Write = Callable[[ExpertWeights], None]


class NothingOnTheHost(TorchDispatchMode):
    """It refuses operations that take or make a tensor on the CPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        on_host = [
            leaf
            for leaf in tree_leaves((args, kwargs, result))
            if isinstance(leaf, Tensor) and leaf.device.type == "cpu"
        ]
        assert not on_host, f"{func} on the host"
        return result


def triton() -> Write:
    backend = pytest.importorskip("experts.backends.triton.backend", reason="triton is for Linux only")
    layer = backend.Layer(SHAPE, 3, META)
    return lambda expert: layer.write(1, expert)


def b12x() -> Write:
    weights = B12xWeights(SHAPE, 3, META, scales="exact")
    return lambda expert: weights.write_slot(1, expert)


def b12x_baked() -> Write:
    weights = B12xWeights(SHAPE, 3, META, scales="baked")
    return lambda expert: weights.write_slot(1, expert)


def emulated() -> Write:
    backend = B12xEmulatedBackend(SHAPE, 3, torch.bfloat16, META)
    return lambda expert: backend.write_slot(0, 1, expert)


def grouped_mm() -> Write:
    backend = GroupedMmBackend(SHAPE, 3, torch.bfloat16, META)
    return lambda expert: backend.write_slot(0, 1, expert)


@pytest.mark.parametrize("write_of", [triton, b12x, b12x_baked, emulated, grouped_mm])
@pytest.mark.parametrize("has_input_scales", [True, False], ids=["W4A4", "W4A16"])
def test_an_expert_is_written_on_its_device(write_of: Callable[[], Write], has_input_scales: bool) -> None:
    here = random_expert(SHAPE, 1)
    gate, up, down = (
        Nvfp4Weight(w.packed.to(META), w.scale.to(META), w.scale_2.to(META))
        for w in (here.gate, here.up, here.down)
    )
    scale = torch.ones((), device=META) if has_input_scales else None
    there = ExpertWeights(gate, up, down, input_scale=scale, down_input_scale=scale)
    write = write_of()
    write(there)  # the first one of these sizes makes tables
    with NothingOnTheHost():
        write(there)
