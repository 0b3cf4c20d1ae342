"""Triton kernels for the small operations of a decode step on a GPU, which would cost more to start one by one.

Each program computes one row: cache writes, RMSNorm, rotary embedding, softmax and top-k of the gate.
T rows of a step, S slots of the cache, H query heads, G KV heads, D head dim, R rotated features, E experts, K top-k. Tensors
may have any strides but the last, which is 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from router.cache.fp8 import LARGEST, SMALLEST_PEAK
from router.cache.kv_cache import LayerCache


def write_cache(k_TGD: Tensor, v_TGD: Tensor, slot_T: Tensor, cache: LayerCache) -> None:
    """Write each row's key and value into its slot of the cache; a row with a negative slot is written nowhere.

    An FP8 cache gets what fp8.quantize makes of them.
    """
    num_rows, num_heads, head_dim = k_TGD.shape
    assert all(tensor is None or tensor.is_contiguous() for tensor in cache)
    _write_cache[(num_rows,)](
        k_TGD=k_TGD,
        v_TGD=v_TGD,
        slot_T=slot_T,
        k_SGD=cache.k_SGD,
        v_SGD=cache.v_SGD,
        scale_SG2=cache.scale_SG2,
        k_stride_t=k_TGD.stride(0),
        k_stride_g=k_TGD.stride(1),
        v_stride_t=v_TGD.stride(0),
        v_stride_g=v_TGD.stride(1),
        LARGEST=LARGEST,
        SMALLEST_PEAK=SMALLEST_PEAK,
        G=num_heads,
        D=head_dim,
        BLOCK_G=triton.next_power_of_2(num_heads),
        BLOCK_D=triton.next_power_of_2(head_dim),
    )


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Return x / sqrt(mean(x * x) + eps) * weight along the last dimension, computed in float32, in x's dtype."""
    width = x.shape[-1]
    rows_RD = x.reshape(-1, width)
    out_RD = torch.empty_like(rows_RD)
    _rms_norm[(len(rows_RD),)](
        x_RD=rows_RD,
        weight_D=weight_D,
        out_RD=out_RD,
        stride=rows_RD.stride(0),
        eps=eps,
        D=width,
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=4 if width >= 1024 else 1,
    )
    return out_RD.view(x.shape)


def add_rms_norm(x: Tensor, more: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return x + more, rounded to their dtype, and the RMSNorm of that sum."""
    x, more = x.contiguous(), more.contiguous()
    width = x.shape[-1]
    sum_, out = torch.empty_like(x), torch.empty_like(x)
    _add_rms_norm[(x.numel() // width,)](
        x_RD=x,
        more_RD=more,
        weight_D=weight_D,
        sum_RD=sum_,
        out_RD=out,
        eps=eps,
        D=width,
        BLOCK_D=triton.next_power_of_2(width),
        num_warps=4 if width >= 1024 else 1,
    )
    return sum_, out


def rotate_halves(
    q_THD: Tensor,
    k_TGD: Tensor,
    cos_TR: Tensor,
    sin_TR: Tensor,
    *,
    norms: tuple[Tensor, Tensor, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return queries and keys with the rotary embedding of their first R features; the others are copied.

    Feature r turns with r + R / 2. norms: an RMSNorm of each head comes first, with these weights [D] of queries and of
    keys and this epsilon. Both results are views of one new tensor.
    """
    num_rows, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_TGD.shape[1]
    rotated = q_THD.new_empty(num_rows, num_heads + num_kv_heads, head_dim)
    q_norm_D, k_norm_D, epsilon = norms or (q_THD, k_TGD, 0.0)  # read only where NORM
    _rotate_halves[(num_rows, num_heads + num_kv_heads)](
        q_THD=q_THD,
        k_TGD=k_TGD,
        cos_TR=cos_TR,
        sin_TR=sin_TR,
        out_TXD=rotated,
        q_norm_D=q_norm_D,
        k_norm_D=k_norm_D,
        epsilon=epsilon,
        q_stride_t=q_THD.stride(0),
        q_stride_h=q_THD.stride(1),
        k_stride_t=k_TGD.stride(0),
        k_stride_g=k_TGD.stride(1),
        cos_stride=cos_TR.stride(0),
        sin_stride=sin_TR.stride(0),
        H=num_heads,
        HEADS=num_heads + num_kv_heads,
        D=head_dim,
        R=cos_TR.shape[1],
        NORM=norms is not None,
        BLOCK_D=triton.next_power_of_2(head_dim),
        num_warps=1,
    )
    return rotated[:, :num_heads], rotated[:, num_heads:]


def softmax_top_k(
    logits_TE: Tensor, top_k: int, *, rounded_to: torch.dtype, divided: bool
) -> tuple[Tensor, Tensor]:
    """Return the largest K probabilities of each row, descending, float32 [T, K], and their experts' ids, int64 [T, K].

    Of equal ones the lower id comes first. Ids are below E for any logits; a row with a NaN or without a finite logit has
    NaN weights. divided: the weights are divided by their sum. rounded_to: the weights are
    rounded to this dtype (and stay float32), as a family whose gate returns them in it does.
    """
    num_rows, num_experts = logits_TE.shape
    w_TK = logits_TE.new_empty(num_rows, top_k, dtype=torch.float32)
    id_TK = logits_TE.new_empty(num_rows, top_k, dtype=torch.int64)
    _softmax_top_k[(num_rows,)](
        logits_TE=logits_TE,
        w_TK=w_TK,
        id_TK=id_TK,
        stride=logits_TE.stride(0),
        E=num_experts,
        K=top_k,
        DIVIDED=divided,
        ROUND=rounded_to == torch.bfloat16,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        num_warps=1,
    )
    return w_TK, id_TK


@triton.jit
def _write_cache(
    k_TGD,
    v_TGD,
    slot_T,
    k_SGD,
    v_SGD,
    scale_SG2,
    k_stride_t,
    k_stride_g,
    v_stride_t,
    v_stride_g,
    LARGEST: tl.constexpr,
    SMALLEST_PEAK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slot_T + row)
    if slot < 0:
        return
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)[None, :]
    here = (g < G)[:, None] & (d < D)
    k = tl.load(k_TGD + row * k_stride_t + g[:, None] * k_stride_g + d, mask=here, other=0.0)
    v = tl.load(v_TGD + row * v_stride_t + g[:, None] * v_stride_g + d, mask=here, other=0.0)
    to = slot * G + g
    if scale_SG2 is not None:
        k, v = k.to(tl.float32), v.to(tl.float32)
        k_scale = tl.maximum(tl.max(tl.abs(k), axis=1), SMALLEST_PEAK) / LARGEST
        v_scale = tl.maximum(tl.max(tl.abs(v), axis=1), SMALLEST_PEAK) / LARGEST
        k, v = k / k_scale[:, None], v / v_scale[:, None]
        tl.store(scale_SG2 + to * 2, k_scale, mask=g < G)
        tl.store(scale_SG2 + to * 2 + 1, v_scale, mask=g < G)
    tl.store(k_SGD + to[:, None] * D + d, k.to(k_SGD.dtype.element_ty), mask=here)
    tl.store(v_SGD + to[:, None] * D + d, v.to(v_SGD.dtype.element_ty), mask=here)


@triton.jit
def _rms_norm(x_RD, weight_D, out_RD, stride, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    row, d = tl.program_id(0), tl.arange(0, BLOCK_D)
    x = tl.load(x_RD + row.to(tl.int64) * stride + d, mask=d < D, other=0.0).to(tl.float32)
    weight = tl.load(weight_D + d, mask=d < D, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * weight
    tl.store(out_RD + row.to(tl.int64) * D + d, out.to(out_RD.dtype.element_ty), mask=d < D)


@triton.jit
def _add_rms_norm(x_RD, more_RD, weight_D, sum_RD, out_RD, eps, D: tl.constexpr, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    at = tl.program_id(0).to(tl.int64) * D + d
    x = tl.load(x_RD + at, mask=d < D, other=0.0).to(tl.float32)
    x += tl.load(more_RD + at, mask=d < D, other=0.0).to(tl.float32)
    rounded = x.to(sum_RD.dtype.element_ty)
    tl.store(sum_RD + at, rounded, mask=d < D)
    x = rounded.to(tl.float32)
    weight = tl.load(weight_D + d, mask=d < D, other=0.0).to(tl.float32)
    out = x * tl.rsqrt(tl.sum(x * x, axis=0) / D + eps) * weight
    tl.store(out_RD + at, out.to(out_RD.dtype.element_ty), mask=d < D)


@triton.jit
def _rotate_halves(
    q_THD,
    k_TGD,
    cos_TR,
    sin_TR,
    out_TXD,
    q_norm_D,
    k_norm_D,
    epsilon,
    q_stride_t,
    q_stride_h,
    k_stride_t,
    k_stride_g,
    cos_stride,
    sin_stride,
    H: tl.constexpr,
    HEADS: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    if head < H:
        x_D = q_THD + row * q_stride_t + head * q_stride_h
        norm_D = q_norm_D
    else:
        x_D = k_TGD + row * k_stride_t + (head - H) * k_stride_g
        norm_D = k_norm_D
    d = tl.arange(0, BLOCK_D)
    partner = tl.where(d < R // 2, d + R // 2, d - R // 2)
    x = tl.load(x_D + d, mask=d < D, other=0.0).to(tl.float32)
    other = tl.load(x_D + partner, mask=d < R, other=0.0).to(tl.float32)
    if NORM:
        shrink = tl.rsqrt(tl.sum(x * x, axis=0) / D + epsilon)
        x *= shrink * tl.load(norm_D + d, mask=d < D, other=0.0).to(tl.float32)
        other *= shrink * tl.load(norm_D + partner, mask=d < R, other=0.0).to(tl.float32)
    cos = tl.load(cos_TR + row * cos_stride + d, mask=d < R, other=1.0).to(tl.float32)
    sin = tl.load(sin_TR + row * sin_stride + d, mask=d < R, other=0.0).to(tl.float32)
    turned = x * cos + tl.where(d < R // 2, -other, other) * sin
    tl.store(out_TXD + (row * HEADS + head) * D + d, turned.to(out_TXD.dtype.element_ty), mask=d < D)


@triton.jit
def _softmax_top_k(
    logits_TE,
    w_TK,
    id_TK,
    stride,
    E: tl.constexpr,
    K: tl.constexpr,
    DIVIDED: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row, e, k = tl.program_id(0), tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    logit = tl.load(logits_TE + row * stride + e, mask=e < E, other=float("-inf")).to(tl.float32)
    p = tl.exp(logit - tl.max(logit, axis=0))
    p /= tl.sum(p, axis=0)
    # Ids stay below E whatever the logits are: a row with NaN, or without a finite logit, has NaN weights, which pass.
    key = tl.where(e < E, tl.where(p == p, p, 0.0), -1.0)
    w, ids = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.int64)
    for place in tl.static_range(K):
        best = tl.argmax(key, axis=0)
        w = tl.where(k == place, tl.sum(tl.where(e == best, p, 0.0), axis=0), w)
        ids = tl.where(k == place, best.to(tl.int64), ids)
        key = tl.where(e == best, -1.0, key)
    if DIVIDED:
        w /= tl.sum(w, axis=0)
    if ROUND:
        w = w.to(tl.bfloat16).to(tl.float32)
    tl.store(w_TK + row * K + k, w, mask=k < K)
    tl.store(id_TK + row * K + k, ids, mask=k < K)
