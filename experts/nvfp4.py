"""The numerics of NVFP4: a slow and obvious reference, equal to NVIDIA ModelOpt's byte for byte.

value = e2m1(code) * e4m3(scale of its group) * scale_2. N out features, K in features, G = K / 16 groups of a row.
"""

from functools import cache

import torch
from torch import Tensor

from experts.weights import Nvfp4Weight

GROUP = 16
"""The number of consecutive elements of a row that share one scale."""

E2M1_MAX = 6.0
E4M3_MAX = 448.0
_E4M3_MIN = 2.0**-9  # its smallest subnormal: a rounded scale is never zero

_MAGNITUDES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_VALUES = torch.cat((_MAGNITUDES, -_MAGNITUDES))  # the value of each 4-bit code: the sign is the high bit
_PAIRS = torch.stack(
    (_VALUES.repeat(16), _VALUES.repeat_interleave(16)), dim=1
)  # [256, 2]: the two values of each byte


def quantize(w_NK: Tensor, *, scale_2: Tensor | None = None) -> Nvfp4Weight:
    """Return the nearest NVFP4 matrix, on w's device. K must be a multiple of 16, else ValueError is raised.

    scale_2: float32 [], for matrices that must share one (gate and up); None takes the matrix's own.
    """
    num_rows, num_cols = w_NK.shape
    if num_cols % GROUP:
        raise ValueError(f"NVFP4 needs rows of a multiple of {GROUP} elements, got {num_rows} x {num_cols}")
    w_NGi = w_NK.float().reshape(num_rows, -1, GROUP)
    if scale_2 is None:
        scale_2 = scale_2_of(w_NGi.abs().amax())
    scale_NG = _block_scales(w_NGi.abs().amax(dim=-1), scale_2)
    scaled_NGi = w_NGi / (scale_NG.float() * scale_2).unsqueeze(-1)
    return Nvfp4Weight(pack(encode_e2m1(scaled_NGi.reshape(w_NK.shape))), scale_NG, scale_2)


def dequantize(w: Nvfp4Weight, dtype: torch.dtype) -> Tensor:
    """Return the matrix [N, K], multiplied in float32 and then rounded to `dtype`."""
    scale_NG = w.scale.float() * w.scale_2
    values_NGi = unpack(w.packed).reshape(*scale_NG.shape, GROUP)
    return (values_NGi * scale_NG.unsqueeze(-1)).flatten(-2).to(dtype)


def scale_2_of(amax: Tensor) -> Tensor:
    """Return the multiplier with which a matrix of this largest magnitude uses the whole range: amax / 2688, float32.

    An all-zero matrix gets the smallest normal float, zero codes and unit block scales. (ModelOpt divides by
    zero there and writes NaN.)
    """
    return (amax.float() / (E2M1_MAX * E4M3_MAX)).clamp(min=torch.finfo(torch.float32).tiny)


def input_scale(amax: float) -> Tensor:
    """Return float32 []: the scale of activations whose largest magnitude was `amax` in calibration."""
    return scale_2_of(torch.tensor(amax, dtype=torch.float32))


def encode_e2m1(x: Tensor) -> Tensor:
    """Return the 4-bit codes (uint8, x's shape) of the nearest E2M1 values; ties go to the even code, beyond 6 is 6.

    A negative number that rounds to zero keeps its sign bit.
    """
    m = x.abs().clamp(max=E2M1_MAX)
    # torch.round sends halves to the even integer, which here is the even code
    code = torch.where(m < 2, (2 * m).round(), torch.where(m < 4, m.round() + 2, (m / 2).round() + 4))
    return code.to(torch.uint8) | (x < 0).to(torch.uint8) << 3


def pack(codes: Tensor) -> Tensor:
    """Pack [..., K] codes into [..., K/2] bytes: element 2i in the low nibble, 2i+1 in the high one."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """Return the [..., K] float32 E2M1 values of [..., K/2] packed bytes."""
    return _pairs(packed.device)[packed.int()].flatten(-2)


@cache
def _pairs(device: torch.device) -> Tensor:
    return _PAIRS.to(device)


def _block_scales(amax_NG: Tensor, scale_2: Tensor) -> Tensor:
    """Return the scales float8_e4m3fn [N, G] of groups with these largest magnitudes; a group of zeros gets 1."""
    scale_NG = amax_NG / (E2M1_MAX * scale_2)
    scale_NG = scale_NG.masked_fill(scale_NG == 0, 1.0)
    return scale_NG.clamp(_E4M3_MIN, E4M3_MAX).to(torch.float8_e4m3fn)
