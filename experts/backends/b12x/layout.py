"""The memory layout in which FlashInfer's b12x kernels read NVFP4 experts: pure functions on tensors of any device.

D hidden, I intermediate, N rows, K columns, G = K / 16 scales of a row, m = N / 128 row tiles, k = G / 4 column tiles.
Source of every rule: flashinfer-python 0.7.2.post1, flashinfer/cute_dsl/utils.py and fused_moe/cute_dsl.
"""

import logging
import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from experts.backends import Scales
from experts.nvfp4 import E4M3_MAX, GROUP
from experts.weights import ExpertWeights, MoEShape, Nvfp4Weight

logger = logging.getLogger(__name__)

HIDDEN_MULTIPLE = 128
"""The width of the kernels' TMA tiles; hidden sizes cannot be padded without copying every activation."""

INTERMEDIATE_MULTIPLE = 256
"""The static kernel takes two slices of 128 at a time. For other sizes the library would pad, that is copy, the weights."""

UNCALIBRATED_SCALE = 2.0**-4
"""The input scale of uncalibrated activations: blocks have full precision for amax 0.006 to 168, and saturate beyond."""


@dataclass(frozen=True, eq=False)
class PreparedExpert:
    """One expert in the terms of the kernel; codes and block scales are in rows, neither padded nor swizzled.

    w13: [2I, D] with up's rows first, then gate's; w2: [D, I]. packed is uint8 [N, K/2], scale e4m3 [N, G].
    FC1 = w13_alpha * (w13 @ x'), where x' is x in FP4 with the plain multiplier input_scale taken out.
    FC2 = w2_alpha * (w2 @ a'), where a' is the activation in FP4 with the plain multiplier fc2_input_scale.
    All four multipliers are float32 []. The wrapper multiplies w13_alpha by input_scale itself; nobody does so for
    w2_alpha, therefore the factor of FC2's input is already in it.
    """

    w13_packed: Tensor
    w13_scale: Tensor
    w2_packed: Tensor
    w2_scale: Tensor
    w13_alpha: Tensor
    w2_alpha: Tensor
    input_scale: Tensor
    fc2_input_scale: Tensor


def check_shape(shape: MoEShape) -> None:
    """Raise ValueError for sizes that the kernels cannot take, however the weights are padded."""
    if shape.hidden % HIDDEN_MULTIPLE:
        raise ValueError(
            f"b12x needs a hidden size that is a multiple of {HIDDEN_MULTIPLE}, the model's is {shape.hidden}"
        )
    if shape.intermediate % GROUP:
        raise ValueError(
            f"NVFP4 needs an expert size that is a multiple of {GROUP}, the model's is {shape.intermediate}"
        )


def padded_intermediate(intermediate: int) -> int:
    """Return the expert size that the kernels compute with."""
    return math.ceil(intermediate / INTERMEDIATE_MULTIPLE) * INTERMEDIATE_MULTIPLE


def prepare(weights: ExpertWeights, scales: Scales, *, weights_only: bool = False) -> PreparedExpert:
    """Return a checkpoint's expert in the kernel's terms. weights_only: for 16-bit activations, whose scales are all 1.

    The kernel has one multiplier for gate and up. Where the checkpoint has two, FC1 takes gate's: up, and so FC2's
    input, then comes out wrong by the factor r = gate's / up's. FC2's input scale times r gives the same FP4 codes and
    block scales as with the right input, and w2_alpha without r gives the right sum. No weight is rounded again.
    """
    if scales == "baked":
        gate, up, down = (_bake(matrix) for matrix in (weights.gate, weights.up, weights.down))
    else:
        gate, up, down = weights.gate, weights.up, weights.down
    one = torch.ones((), dtype=torch.float32, device=gate.scale_2.device)
    input_scale = fc2_input_scale = one
    if scales == "exact" and not weights_only:
        input_scale = _input_scale(weights.input_scale, like=one)
        fc2_input_scale = _input_scale(weights.down_input_scale, like=one)
    excess = gate.scale_2 / up.scale_2
    return PreparedExpert(
        w13_packed=torch.cat((up.packed, gate.packed)),
        w13_scale=torch.cat((up.scale, gate.scale)),
        w2_packed=down.packed,
        w2_scale=down.scale,
        w13_alpha=gate.scale_2,
        w2_alpha=down.scale_2 / excess if weights_only else down.scale_2 * fc2_input_scale,
        input_scale=input_scale,
        fc2_input_scale=fc2_input_scale if weights_only else fc2_input_scale * excess,
    )


def scale_storage(num_experts: int, rows: int, cols: int, device: torch.device) -> Tensor:
    """Return zero e4m3 [e, m, k, 32, 4, 4]: the order in memory that cuBLAS calls 128x4. rows % 128 == cols % 64 == 0.

    The scale of row r and group g is at [e, r // 128, g // 4, r % 32, r % 128 // 32, g % 4].
    """
    assert rows % 128 == 0, rows
    assert cols % (4 * GROUP) == 0, cols
    sizes = (num_experts, rows // 128, cols // (4 * GROUP), 32, 4, 4)
    return torch.zeros(sizes, dtype=torch.float8_e4m3fn, device=device)


def mma_view(storage: Tensor) -> Tensor:
    """Return [32, 4, m, 4, k, e]: the view of scale_storage() that the kernels take; strides differ, nothing is copied."""
    return storage.permute(3, 4, 1, 5, 2, 0)


def swizzle_into(storage: Tensor, scale_NG: Tensor) -> None:
    """Write e4m3 scales [N, G] to one expert's storage [m, k, 32, 4, 4]; what lies beyond N and G becomes zero."""
    rows = _rows_view(storage)
    num_rows, num_groups = rows.shape[0] * 128, rows.shape[3] * 4
    source = scale_NG.view(torch.uint8)
    missing_rows, missing_groups = num_rows - source.shape[0], num_groups - source.shape[1]
    if missing_rows or missing_groups:
        source = torch.nn.functional.pad(source, (0, missing_groups, 0, missing_rows))
    rows.copy_(source.reshape(rows.shape))


def unswizzle(storage: Tensor) -> Tensor:
    """Return a copy of the scales in rows, padding included: [m, k, 32, 4, 4] -> e4m3 [128 m, 4 k]."""
    rows = _rows_view(storage)
    return rows.reshape(rows.shape[0] * 128, rows.shape[3] * 4).view(torch.float8_e4m3fn)


def _rows_view(storage: Tensor) -> Tensor:
    """Return the view uint8 [m, 4, 32, k, 4], which is in the order of rows and groups."""
    return storage.view(torch.uint8).permute(0, 3, 2, 1, 4)


def _bake(matrix: Nvfp4Weight) -> Nvfp4Weight:
    scale = (matrix.scale.float() * matrix.scale_2).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    return Nvfp4Weight(matrix.packed, scale, torch.ones_like(matrix.scale_2))


def _input_scale(stated: Tensor | None, *, like: Tensor) -> Tensor:
    if stated is not None:
        return stated.to(like.device)
    _warn_of_no_input_scale()
    return torch.full_like(like, UNCALIBRATED_SCALE)


@cache
def _warn_of_no_input_scale() -> None:
    """Warn once in a process: what one expert lacks, most of them lack."""
    logger.warning(
        "the checkpoint has no input scales: W4A4 takes %g for activations that nobody calibrated; "
        "experts.backend=b12x-w4a16 needs none",
        UNCALIBRATED_SCALE,
    )
