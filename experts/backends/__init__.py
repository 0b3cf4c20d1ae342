"""ExpertBackend: the kernel that computes the local experts of one shard.

T tokens, D hidden, K top-k, e local slots, I intermediate.
"""

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from experts.backends.b12x.layout import Scales
from experts.backends.pairs import LocalPairs
from experts.config import ExpertsConfig
from experts.progress import Progress
from experts.weights import ExpertWeights, MoEShape


@dataclass(frozen=True)
class KernelSettings:
    """What a user may choose of a kernel, see ExpertsConfig. Backends that know nothing of it do without."""

    scales: Scales = "exact"
    micro: bool = False

    @classmethod
    def of(cls, experts: ExpertsConfig) -> "KernelSettings":
        return cls(scales=experts.scales, micro=experts.micro)


DEFAULTS = KernelSettings()


class ExpertBackend(Protocol):
    """Owns the weights of `num_slots` experts in every MoE layer. One forward at a time.

    in_graph: a CUDA graph may hold a forward: it starts the same kernels for the same sizes, whatever the routing.
    """

    in_graph: bool = False

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        """Put an expert into a local slot, in place: no pointer that a captured graph holds may move."""
        ...

    def forward(self, layer: int, x_TD: Tensor, local_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        """out_TD = for every row, the sum of w * expert(x) over its local experts; zero if it has none.

        x_TD, out_TD: the backend's dtype, contiguous, T >= 1; out_TD is the caller's and is overwritten.
        local_TK: int32 local slots in [0, num_slots), or -1 where the expert is elsewhere: costs nothing.
        w_TK: float32 top-k weights. Accumulates in float32.
        """
        ...

    def take_physical(self, first_slot: int) -> LocalPairs | None:
        """For a backend whose kernels find and count the local pairs themselves; most do not.

        From then on `forward` gets, in place of local slots, physical ids: those of slots follow first_slot.
        """
        return None

    def warm(self, *, top_k: int) -> Iterable[Progress]:
        """Compile and set up what forwards with this top_k need, step by step; most backends need nothing.

        For a backend that does, forwards neither compile nor allocate from then on.
        """
        return ()


BackendFactory = Callable[[MoEShape, int, torch.dtype, torch.device, KernelSettings], ExpertBackend]
"""(shape, num_slots, dtype of x and out, device, settings) -> a backend with unwritten slots."""


def _reference(
    shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device, settings: KernelSettings
) -> ExpertBackend:
    from experts.backends.reference import ReferenceBackend

    return ReferenceBackend(shape, num_slots, dtype, device)


def _torch(
    shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device, settings: KernelSettings
) -> ExpertBackend:
    from experts.backends.grouped_mm import SortedPairsBackend

    return SortedPairsBackend(shape, num_slots, dtype, device)


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
    """The backend that `auto` stands for here. weights_only: for a W4A16 checkpoint.

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
    from experts.backends.triton.backend import complaint

    return complaint(shape, dtype, device) is None
