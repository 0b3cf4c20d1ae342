"""Registry of the backends: BACKENDS builds each one by its name in the config, resolve_backend says what `auto` stands for.

The factories import their backend when they are called, so a process loads only the kernels that it runs.
"""

import importlib.util
from collections.abc import Callable

import torch

from experts.backends import ExpertBackend, KernelSettings
from experts.weights import MoEShape

BackendFactory = Callable[[MoEShape, int, torch.dtype, torch.device, KernelSettings], ExpertBackend]
"""Makes a backend with unwritten slots from (shape, num_slots, dtype of x and out, device, settings)."""


def _reference(
    shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device, settings: KernelSettings
) -> ExpertBackend:
    from experts.backends.reference import ReferenceBackend

    return ReferenceBackend(shape, num_slots, dtype, device)


def _torch(
    shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device, settings: KernelSettings
) -> ExpertBackend:
    from experts.backends.grouped_mm import GroupedMmBackend

    return GroupedMmBackend(shape, num_slots, dtype, device)


def _cpu(
    shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device, settings: KernelSettings
) -> ExpertBackend:
    from experts.backends.cpu.backend import CpuBackend

    return CpuBackend(shape, num_slots, dtype, device)


def _triton(
    shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device, settings: KernelSettings
) -> ExpertBackend:
    from experts.backends.triton.backend import TritonBackend

    return TritonBackend(shape, num_slots, dtype, device)


def _b12x(
    shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device, settings: KernelSettings
) -> ExpertBackend:
    from experts.backends.b12x.backend import B12xBackend
    from experts.backends.b12x.library import machine_of, require

    require(machine_of(device))
    return B12xBackend(shape, num_slots, dtype, device, scales=settings.scales, micro=settings.micro)


def _b12x_w4a16(
    shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device, settings: KernelSettings
) -> ExpertBackend:
    from experts.backends.b12x.backend import B12xBackend
    from experts.backends.b12x.library import machine_of, require

    require(machine_of(device))
    return B12xBackend(shape, num_slots, dtype, device, mode="w4a16")


def _b12x_emulated(
    shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device, settings: KernelSettings
) -> ExpertBackend:
    from experts.backends.b12x.emulated import B12xEmulatedBackend

    return B12xEmulatedBackend(shape, num_slots, dtype, device, scales=settings.scales)


BACKENDS: dict[str, BackendFactory] = {
    "reference": _reference,
    "torch": _torch,
    "cpu": _cpu,
    "triton": _triton,
    "b12x": _b12x,
    "b12x-w4a16": _b12x_w4a16,
    "b12x-emulated": _b12x_emulated,
}


def resolve_backend(
    name: str, *, shape: MoEShape, dtype: torch.dtype, device: torch.device, weights_only: bool
) -> str:
    """Return the name of the backend to run: `name` itself, or what `auto` stands for with these sizes on this device.

    weights_only: the checkpoint is W4A16, so it has no input scales.
    Raises ValueError on an SM12x GPU that lacks what b12x needs.
    """
    from experts.backends.b12x.library import choose, machine_of

    if name != "auto":
        return name
    chosen = choose(machine_of(device), weights_only=weights_only)
    return "triton" if chosen == "torch" and _triton_can(shape, dtype, device) else chosen


def _triton_can(shape: MoEShape, dtype: torch.dtype, device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    from experts.backends.triton.backend import why_not

    return why_not(shape, dtype, device) is None
