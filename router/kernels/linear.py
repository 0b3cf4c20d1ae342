"""Linear layers of few rows by a Triton kernel in which each row reads the matrix for itself; others are a library's.

T rows, N outputs, K inputs.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

READ_AGAIN = 8 << 20
"""Bytes of a matrix times rows up to which reading it anew for each row is quicker than a library: the L2 cache holds it.

A single row is ours whatever the size: it reads the matrix once in either case.
"""

OUTPUTS = 2
"""Outputs of one program. The fewer, the more of the matrix is in flight."""

INPUTS = 2048
"""Inputs that a program reads at a time."""


def linear(weight_NK: Tensor, bias_N: Tensor | None, x: Tensor) -> Tensor:
    """Return x @ weight.T + bias as torch's F.linear does, with sums in float32."""
    num_outputs, num_inputs = weight_NK.shape
    num_rows = x.numel() // num_inputs
    if not is_ours(num_rows, weight_NK):
        return F.linear(x, weight_NK, bias_N)
    out = x.new_empty(*x.shape[:-1], num_outputs)
    _linear[(triton.cdiv(num_outputs, OUTPUTS), num_rows)](
        x_TK=x.contiguous(),
        weight_NK=weight_NK,
        bias_N=weight_NK if bias_N is None else bias_N,  # read only where BIAS
        out_TN=out,
        N=num_outputs,
        K=num_inputs,
        BIAS=bias_N is not None,
        BLOCK_N=OUTPUTS,
        BLOCK_K=min(INPUTS, triton.next_power_of_2(num_inputs)),
    )
    return out


def is_ours(num_rows: int, weight_NK: Tensor) -> bool:
    """Return whether our kernel is quicker than a library's for so many rows and this matrix."""
    return num_rows == 1 or 0 < num_rows * weight_NK.numel() * weight_NK.element_size() <= READ_AGAIN


@triton.jit(do_not_specialize=["N"])
def _linear(
    x_TK,
    weight_NK,
    bias_N,
    out_TN,
    N,
    K: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    n, k = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    weight = weight_NK + n[:, None].to(tl.int64) * K + k[None, :]
    sum_NK = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for at in tl.static_range(0, K, BLOCK_K):
        x = tl.load(x_TK + row * K + at + k, mask=at + k < K, other=0.0).to(tl.float32)
        here = (n < N)[:, None] & (at + k < K)[None, :]
        sum_NK += tl.load(weight + at, mask=here, other=0.0).to(tl.float32) * x[None, :]
    sum_N = tl.sum(sum_NK, axis=1)
    if BIAS:
        sum_N += tl.load(bias_N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_TN + row * N + n, sum_N.to(out_TN.dtype.element_ty), mask=n < N)
