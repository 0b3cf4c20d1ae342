"""Paged attention of prompts by a Triton kernel that reads the contexts in place, in the KV cache: one launch a step.

T rows of a step, P chunks, X tiles, N blocks of a table, S slots of the cache, H query heads, G KV heads, Q of them to one KV
head, D head dim. Tensors may have any strides but the last, which is 1.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from router.cache.kv_cache import LayerCache
from router.kernels.decode_attention import widened
from router.kernels.prompt_tiles import PromptTiles

BLOCK_S = 64
"""Tokens of a context that a program reads at a time."""


def prompt_attention(
    q_THD: Tensor, cache: LayerCache, prompts: PromptTiles, block_size: int, scale: float, out_THD: Tensor
) -> None:
    """Write out = softmax(q k * scale) v over each row's context up to its own token, computed in float32.

    The step's keys and values must be in the cache. Rows that stand in no tile of `prompts` are left as they are.
    """
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = cache.k_SGD.shape[1]
    queries = num_heads // num_kv_heads
    _attend[(num_kv_heads, len(prompts.tile_X4))](
        q_THD=q_THD,
        k_SGD=cache.k_SGD,
        v_SGD=cache.v_SGD,
        scale_SG2=cache.scale_SG2,
        table_PN=prompts.table_PN,
        tile_X4=prompts.tile_X4,
        out_THD=out_THD,
        scale=scale * math.log2(math.e),
        q_stride_t=q_THD.stride(0),
        q_stride_h=q_THD.stride(1),
        out_stride_t=out_THD.stride(0),
        out_stride_h=out_THD.stride(1),
        table_stride=prompts.table_PN.stride(0),
        G=num_kv_heads,
        Q=queries,
        D=head_dim,
        BLOCK_R=max(16, triton.next_power_of_2(queries * prompts.tokens)),
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_S=BLOCK_S,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["table_stride"])  # the longest context sets it: another one in every step
def _attend(
    q_THD,
    k_SGD,
    v_SGD,
    scale_SG2,
    table_PN,
    tile_X4,
    out_THD,
    scale,
    q_stride_t,
    q_stride_h,
    out_stride_t,
    out_stride_h,
    table_stride,
    G: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Compute one tile for the query heads of one KV head; a row is one head of one token.

    scale: already times log2(e), since the kernel computes 2^x.
    """
    group, tile_4 = tl.program_id(0), tile_X4 + tl.program_id(1) * 4
    chunk, first_row = tl.load(tile_4), tl.load(tile_4 + 1)
    position, count = tl.load(tile_4 + 2).to(tl.int32), tl.load(tile_4 + 3).to(tl.int32)
    r, d = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    token, head = r // Q, group * Q + r % Q
    real = (token < count)[:, None] & (d < D)[None, :]
    q_at = (first_row + token) * q_stride_t + head * q_stride_h
    q = tl.load(q_THD + q_at[:, None] + d[None, :], mask=real, other=0.0)
    table_N, own, end = table_PN + chunk * table_stride, position + token, position + count
    peak = tl.full((BLOCK_R,), float("-inf"), tl.float32)
    weight = tl.zeros((BLOCK_R,), tl.float32)
    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    edge = (position + 1) // BLOCK_S * BLOCK_S  # before it every row sees every token
    for begin in tl.range(0, edge, BLOCK_S, num_stages=3):
        peak, weight, total = _add(
            *(peak, weight, total, q, k_SGD, v_SGD, scale_SG2, table_N, begin, own, end, group, scale),
            *(False, G, D, BLOCK_D, BLOCK_SIZE, BLOCK_S),
        )
    for begin in tl.range(edge, end, BLOCK_S, num_stages=1):
        peak, weight, total = _add(
            *(peak, weight, total, q, k_SGD, v_SGD, scale_SG2, table_N, begin, own, end, group, scale),
            *(True, G, D, BLOCK_D, BLOCK_SIZE, BLOCK_S),
        )
    out = (total / weight[:, None]).to(out_THD.dtype.element_ty)
    out_at = (first_row + token) * out_stride_t + head * out_stride_h
    tl.store(out_THD + out_at[:, None] + d[None, :], out, mask=real)


@triton.jit
def _add(
    peak,
    weight,
    total,
    q,
    k_SGD,
    v_SGD,
    scale_SG2,
    table_N,
    begin,
    own,
    end,
    group,
    scale,
    EDGE: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Add BLOCK_S tokens of the context, from `begin` on, to the running softmax: peak, weight and total.

    EDGE: some of the tokens are beyond the chunk's end, or beyond a row's own token.
    """
    token, d = begin + tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    held = token < end if EDGE else tl.full((BLOCK_S,), True, tl.int1)
    block = tl.load(table_N + token // BLOCK_SIZE, mask=held, other=0)
    at = (block * BLOCK_SIZE + token % BLOCK_SIZE) * G + group
    here = held[:, None] & (d < D)[None, :]
    k = tl.load(k_SGD + at[:, None] * D + d[None, :], mask=here, other=0.0)
    v = tl.load(v_SGD + at[:, None] * D + d[None, :], mask=here, other=0.0)
    if scale_SG2 is not None:
        k, v = widened(k, q.dtype), widened(v, q.dtype)
    score = tl.dot(q, tl.trans(k), input_precision="ieee")
    if scale_SG2 is None:
        score *= scale
    else:
        score *= (tl.load(scale_SG2 + at * 2, mask=held, other=0.0) * scale)[None, :]
    if EDGE:
        score = tl.where(token[None, :] > own[:, None], float("-inf"), score)
    higher = tl.maximum(peak, tl.max(score, axis=1))
    p = tl.exp2(score - higher[:, None])
    shrink = tl.exp2(peak - higher)
    weight = weight * shrink + tl.sum(p, axis=1)
    if scale_SG2 is not None:
        p *= tl.load(scale_SG2 + at * 2 + 1, mask=held, other=0.0)[None, :]
    total = tl.dot(p.to(q.dtype), v, total * shrink[:, None], input_precision="ieee")
    return higher, weight, total
