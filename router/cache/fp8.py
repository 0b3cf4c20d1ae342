"""Keys and values in FP8: e4m3 with a float32 scale for each token and head, which needs no calibration and never overflows.

T tokens, G KV heads, D head dim.
"""

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_PEAK = 1e-30
"""Smallest peak of a vector that a scale is made for: a scale must not be zero, nor so small that it is inexact."""


def quantize(x_TGD: Tensor) -> tuple[Tensor, Tensor]:
    """Return e4m3 [T, G, D] and float32 scales [T, G], whose product is x. A value that is not finite becomes NaN."""
    x_TGD = x_TGD.float()
    scale_TG = x_TGD.abs().amax(dim=-1).clamp(min=SMALLEST_PEAK) / LARGEST
    return (x_TGD / scale_TG[..., None]).to(E4M3), scale_TG


def dequantize(e4m3: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return e4m3 * scale in this dtype. scale: of each vector along the last dimension."""
    return (e4m3.float() * scale[..., None]).to(dtype)
