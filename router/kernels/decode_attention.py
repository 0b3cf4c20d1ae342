"""Paged attention of decoding requests by Triton kernels that read the contexts in place, in the KV cache.

B decoding requests, N blocks of a table, S slots of the cache, H query heads, G KV heads, Q of them to one KV head, D head dim.
Tensors may have any strides but the last, which is 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from router.cache.kv_cache import LayerCache

BLOCK_S = 64
"""Tokens of a context that a program reads at a time."""

MAX_PARTS = 32
"""Most parts into which a context is cut, so that a few requests fill a GPU too."""


def decode_attention(
    q_BHD: Tensor,
    cache: LayerCache,
    table_BN: Tensor,
    length_B: Tensor,
    block_size: int,
    scale: float,
    out_BHD: Tensor,
) -> None:
    """Write out = softmax(q k * scale) v over the first length_B tokens of each request's blocks, computed in float32.

    q_BHD: one query of each request. table_BN: int64, the blocks of its context. out_BHD: the caller's.
    """
    num_rows, num_heads, head_dim = q_BHD.shape
    num_kv_heads = cache.k_SGD.shape[1]
    parts = num_parts(num_rows * num_kv_heads, q_BHD.device)
    partial_BHPD = q_BHD.new_empty(num_rows, num_heads, parts, head_dim, dtype=torch.float32)
    peak_BHP2 = q_BHD.new_empty(num_rows, num_heads, parts, 2, dtype=torch.float32)
    queries = num_heads // num_kv_heads
    sizes = {"D": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "H": num_heads, "PARTS": parts}
    _attend[(num_rows, num_kv_heads, parts)](
        q_BHD=q_BHD,
        k_SGD=cache.k_SGD,
        v_SGD=cache.v_SGD,
        scale_SG2=cache.scale_SG2,
        table_BN=table_BN,
        length_B=length_B,
        partial_BHPD=partial_BHPD,
        peak_BHP2=peak_BHP2,
        scale=scale,
        q_stride_b=q_BHD.stride(0),
        q_stride_h=q_BHD.stride(1),
        table_stride=table_BN.stride(0),
        G=num_kv_heads,
        Q=queries,
        BLOCK_Q=max(16, triton.next_power_of_2(queries)),
        BLOCK_SIZE=block_size,
        BLOCK_S=BLOCK_S,
        **sizes,
    )
    _add_parts[(num_rows, num_heads)](
        partial_BHPD=partial_BHPD,
        peak_BHP2=peak_BHP2,
        out_BHD=out_BHD,
        out_stride_b=out_BHD.stride(0),
        out_stride_h=out_BHD.stride(1),
        **sizes,
    )


def num_parts(num_programs: int, device: torch.device) -> int:
    """Return into how many parts to cut contexts: the power of two that makes about two programs for each SM."""
    wanted = 2 * _num_multiprocessors(device) // num_programs
    return min(MAX_PARTS, 1 << max(0, wanted.bit_length() - 1))


def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit
def _attend(
    q_BHD,
    k_SGD,
    v_SGD,
    scale_SG2,
    table_BN,
    length_B,
    partial_BHPD,
    peak_BHP2,
    scale,
    q_stride_b,
    q_stride_h,
    table_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Attend to one part of a context with the query heads of one KV head: sum of values, largest score, sum of weights."""
    row, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(length_B + row)
    size = tl.cdiv(tl.cdiv(length, PARTS), BLOCK_S) * BLOCK_S
    begin, end = part * size, tl.minimum(length, part * size + size)
    query, d = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_D)
    real = (query < Q)[:, None] & (d < D)[None, :]
    head = group * Q + query
    q = tl.load(q_BHD + row * q_stride_b + head[:, None] * q_stride_h + d[None, :], mask=real, other=0.0)
    peak = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_Q,), tl.float32)
    total = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    for first in tl.range(begin, end, BLOCK_S, num_stages=3):
        token = first + tl.arange(0, BLOCK_S)
        block = tl.load(table_BN + row * table_stride + token // BLOCK_SIZE, mask=token < end, other=0)
        at = (block * BLOCK_SIZE + token % BLOCK_SIZE).to(tl.int64) * G + group
        held = (token < end)[:, None] & (d < D)[None, :]
        k = tl.load(k_SGD + at[:, None] * D + d[None, :], mask=held, other=0.0)
        v = tl.load(v_SGD + at[:, None] * D + d[None, :], mask=held, other=0.0)
        if scale_SG2 is not None:
            k, v = widened(k, q.dtype), widened(v, q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if scale_SG2 is not None:
            score *= tl.load(scale_SG2 + at * 2, mask=token < end, other=0.0)[None, :]
        score = tl.where((token < end)[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        p = tl.exp(score - higher[:, None])
        shrink = tl.exp(peak - higher)
        weight = weight * shrink + tl.sum(p, axis=1)
        if scale_SG2 is not None:
            p *= tl.load(scale_SG2 + at * 2 + 1, mask=token < end, other=0.0)[None, :]
        total = total * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        peak = higher
    at = (row * H + head) * PARTS + part
    tl.store(peak_BHP2 + at * 2, peak, mask=query < Q)
    tl.store(peak_BHP2 + at * 2 + 1, weight, mask=query < Q)
    tl.store(partial_BHPD + at[:, None] * D + d[None, :], total, mask=real)


@triton.jit
def _add_parts(
    partial_BHPD,
    peak_BHP2,
    out_BHD,
    out_stride_b,
    out_stride_h,
    H: tl.constexpr,
    D: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    part, d = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    at = (row * H + head) * PARTS + part
    peak = tl.load(peak_BHP2 + at * 2)
    factor = tl.exp(peak - tl.max(peak, axis=0))
    weight = tl.sum(factor * tl.load(peak_BHP2 + at * 2 + 1), axis=0)
    partial = tl.load(partial_BHPD + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
    out = tl.sum(partial * factor[:, None], axis=0) / weight
    tl.store(
        out_BHD + row * out_stride_b + head * out_stride_h + d, out.to(out_BHD.dtype.element_ty), mask=d < D
    )


@triton.jit
def widened(x, dtype: tl.constexpr):
    """Return FP8 numbers in this dtype, not yet times their scale, in the register layout in which they were loaded."""
    # By way of float32: a GPU turns float16, which FP8 becomes first, into bfloat16 at a sixteenth of its speed.
    x = x.to(tl.float32).to(dtype)
    # Taken apart and joined again: the compiler would else move each byte by itself into the layout of a product.
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    return tl.reshape(tl.join(even, odd), x.shape)
