"""The arithmetic of FlashInfer's b12x NVFP4 kernels in torch, on whole tensors.

R rows (token-expert pairs), K elements of a row, G = K / 16 blocks, D hidden, I intermediate, S slices of I.
Read off the kernels of flashinfer-python 0.7.2.post1 (cute_dsl/fp4_common.py, blackwell_sm12x/moe_static_kernel.py,
_moe_dynamic/generic.py). Not emulated: the order of additions inside a tensor core, rcp.approx and ex2.approx.
"""

import torch
from torch import Tensor

from experts.nvfp4 import E2M1_MAX, E4M3_MAX, GROUP, unpack

STATIC_PAIRS = 1024
"""A call of up to this many token-expert pairs, absent experts included, takes the static kernel."""

STATIC_SLICE = 256
DYNAMIC_SLICE = 128
"""The number of intermediate elements that FC2 sums in float32 before it rounds to bfloat16, by kernel."""


def is_static(num_tokens: int, top_k: int) -> bool:
    """Return whether a call of this size takes the static kernel."""
    return num_tokens * top_k <= STATIC_PAIRS


def to_fp4_and_back(x_RK: Tensor, scale_R: Tensor) -> Tensor:
    """Round float32 x to blocks of FP4, and return the values that the tensor cores see: e2m1(code) * e4m3(block scale).

    scale_R: the plain multiplier of each row; the result times it is about x.
    """
    value_RGi, block_RG = to_fp4(x_RK, scale_R)
    return (value_RGi * block_RG.unsqueeze(-1)).flatten(-2)


def to_fp4(x_RK: Tensor, scale_R: Tensor) -> tuple[Tensor, Tensor]:
    """Return E2M1 values, float32 [R, G, 16], and e4m3 block scales, float32 [R, G]: product times scale_R is about x.

    A block whose scale rounds to zero is zero; one whose scale exceeds 448 saturates.
    """
    x_RGi = x_RK.unflatten(-1, (-1, GROUP))
    inverse_R1 = scale_R.reciprocal()[:, None]
    amax_RG = x_RGi.abs().amax(dim=-1)
    block_RG = (amax_RG * (1 / E2M1_MAX) * inverse_R1).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
    factor_RG = (block_RG.reciprocal() * inverse_R1).masked_fill_(block_RG == 0, 0.0)
    return round_to_e2m1(x_RGi * factor_RG.unsqueeze(-1)), block_RG


def round_to_e2m1(x: Tensor) -> Tensor:
    """Round to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives; ties go to the even code, beyond 6 is 6."""
    m = x.abs().clamp_(max=E2M1_MAX)
    small, middle, large = (m * 2).round_() / 2, m.round(), (m / 2).round_() * 2
    return torch.where(m < 2, small, torch.where(m < 4, middle, large)).copysign_(x)


def code_values(packed_NK: Tensor, scale_NG: Tensor) -> Tensor:
    """Return float32 [N, K]: e2m1(code) * e4m3(block scale), without the multiplier of the matrix."""
    values_NGi = unpack(packed_NK).unflatten(-1, (-1, GROUP))
    return (values_NGi * scale_NG.float().unsqueeze(-1)).flatten(-2)


def swiglu(up_RI: Tensor, gate_RI: Tensor) -> Tensor:
    """Return silu(gate) * up as float32, rounded to bfloat16 as on its way through shared memory."""
    return (gate_RI * gate_RI.sigmoid() * up_RI).bfloat16().float()


def static_terms(sum_RSD: Tensor, w_R: Tensor, alpha_R: Tensor) -> Tensor:
    """Return bfloat16 [R, S, D], the terms that the static kernel adds up: bf16(w * alpha) times the bfloat16 slice sums."""
    return sum_RSD.bfloat16() * (w_R * alpha_R).bfloat16()[:, None, None]


def dynamic_terms(sum_RSD: Tensor, w_R: Tensor, alpha_R: Tensor) -> Tensor:
    """Return bfloat16 [R, S, D], the terms that the dynamic kernel adds up: w times the bfloat16 of alpha * slice sum."""
    scaled_RSD = (sum_RSD * alpha_R[:, None, None]).bfloat16().float()
    return (scaled_RSD * w_R[:, None, None]).bfloat16()


def static_combine(terms_TND: Tensor) -> Tensor:
    """Return bfloat16 [T, D]: the terms of each token added in float32, in their order.

    The bits are always the same.
    """
    sum_TD = terms_TND[:, 0].float()
    for n in range(1, terms_TND.shape[1]):
        sum_TD += terms_TND[:, n]
    return sum_TD.bfloat16()


def dynamic_combine(terms_TND: Tensor) -> Tensor:
    """Return bfloat16 [T, D]: one of the sums that the dynamic kernel's bfloat16 atomics may give; see dynamic_bound."""
    sum_TD = terms_TND[:, 0].clone()
    for n in range(1, terms_TND.shape[1]):
        sum_TD += terms_TND[:, n]
    return sum_TD


def dynamic_bound(terms_TND: Tensor) -> Tensor:
    """Return float32 [T, D]: how far any order of bfloat16 additions of these terms can be from their exact sum.

    This is the standard bound of summation: |error| <= sum|term| * ((1 + u)^(N - 1) - 1), where u = 2^-8 is half a unit
    in the last place of bfloat16 and N the number of terms (Higham, Accuracy and Stability of Numerical Algorithms,
    4.2). Two orders differ by at most twice that.
    """
    unit, additions = 2.0**-8, max(terms_TND.shape[1] - 1, 0)
    return terms_TND.float().abs().sum(dim=1) * ((1 + unit) ** additions - 1)
