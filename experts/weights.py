"""The types in which expert weights travel from a checkpoint to a backend. The module does not import torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MoEShape:
    """The sizes of a checkpoint's routed experts, read off its tensors (not its config).

    moe_layers: the indices of the layers that have routed experts, of `num_layers` in all.
    """

    num_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    hidden: int
    intermediate: int


@dataclass(frozen=True, eq=False)
class Nvfp4Weight:
    """One NVFP4 matrix [N, K], stored [out, in]: value = e2m1(packed) * e4m3(scale) * scale_2.

    packed: uint8 [N, K/2], element 2i in the low nibble, 2i+1 in the high one.
    scale: float8_e4m3fn [N, K/16], linear (not swizzled), one per 16 elements of a row.
    scale_2: float32 [], the multiplier of the whole matrix (ModelOpt's weight_scale_2).
    """

    packed: "Tensor"
    scale: "Tensor"
    scale_2: "Tensor"


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights of one SwiGLU expert: down(silu(gate(x)) * up(x)).

    gate, up: [I, D]; down: [D, I].
    input_scale, down_input_scale: float32 [], the plain multipliers amax / 2688 of the inputs of gate and up, and of
        down; None in a W4A16 checkpoint.
    """

    gate: Nvfp4Weight
    up: Nvfp4Weight
    down: Nvfp4Weight
    input_scale: "Tensor | None"
    down_input_scale: "Tensor | None"
