"""A product of so few rows that each reads the matrix for itself, by a Triton kernel. Others are a library's.

T rows, N outputs, K inputs.
"""

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

READ_AGAIN = 8 << 20
"""Bytes of a matrix, times rows: a level 2 cache gives them as quickly as a library computes. One row is read once anyhow."""

OUTPUTS = 2
"""Of a program: the fewer, the more of a matrix is in flight."""

INPUTS = 2048
"""At a time."""


def linear(weight_NK: Tensor, bias_N: Tensor | None, x: Tensor) -> Tensor:
    """As torch's, with sums in float32."""
    num_outputs, num_inputs = weight_NK.shape
    num_rows = x.numel() // num_inputs
    if not is_ours(num_rows, weight_NK):
        return F.linear(x, weight_NK, bias_N)
    out = x.new_empty(*x.shape[:-1], num_outputs)
    _linear[(triton.cdiv(num_outputs, OUTPUTS), num_rows)](
        *(x.contiguous(), weight_NK, weight_NK if bias_N is None else bias_N, out, num_outputs),
        K=num_inputs,
        BIAS=bias_N is not None,
        BLOCK_N=OUTPUTS,
        BLOCK_K=min(INPUTS, triton.next_power_of_2(num_inputs)),
    )
    return out


def is_ours(num_rows: int, weight_NK: Tensor) -> bool:
    """Whether our kernel is the quicker one."""
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
