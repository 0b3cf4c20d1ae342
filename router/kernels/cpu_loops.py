"""Compiled loops for the small operations of a decode step on a CPU, which would cost more to start one by one.

numba compiles them for this machine when the module is first imported and keeps the result on disk. Float32 only.
T rows of a step, B decoding requests, N blocks of a table, S slots of the cache, H query heads, G KV heads, D head dim.
"""

import numpy as np
from numba import njit

from experts.cpu_math import exp

Array = np.ndarray

_heads = "float32[:,:,::1]"
_fast = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract", "reassoc"}}


@njit("void(float32[:,::1], float32[::1], float64, float32[:,::1])", **_fast)
def rms_norm(x_RD: Array, weight_D: Array, eps: float, out_RD: Array) -> None:
    """Write out = x / sqrt(mean(x * x) + eps) * weight for each of R rows."""
    num_rows, width = x_RD.shape
    for r in range(num_rows):
        squares = np.float32(0)
        for d in range(width):
            squares += x_RD[r, d] * x_RD[r, d]
        factor = np.float32(1 / np.sqrt(squares / width + eps))
        for d in range(width):
            out_RD[r, d] = x_RD[r, d] * factor * weight_D[d]


@njit(f"void({_heads}, float32[:,::1], float32[:,::1], {_heads})", **_fast)
def rotate_halves(x_THD: Array, cos_TR: Array, sin_TR: Array, out_THD: Array) -> None:
    """Write the rotary embedding of the first R features, where feature r turns with r + R / 2; copy the others."""
    num_rows, num_heads, _ = x_THD.shape
    half = cos_TR.shape[1] // 2
    for t in range(num_rows):
        for h in range(num_heads):
            x_D, out_D = x_THD[t, h], out_THD[t, h]
            for r in range(half):
                out_D[r] = x_D[r] * cos_TR[t, r] - x_D[r + half] * sin_TR[t, r]
                out_D[r + half] = x_D[r + half] * cos_TR[t, r + half] + x_D[r] * sin_TR[t, r + half]
            out_D[2 * half :] = x_D[2 * half :]


@njit(f"void({_heads}, {_heads}, int64[::1], {_heads}, {_heads})", **_fast)
def write_cache(k_TGD: Array, v_TGD: Array, slot_T: Array, k_SGD: Array, v_SGD: Array) -> None:
    """Write each row's key and value into its slot of the cache."""
    for t in range(len(slot_T)):
        k_SGD[slot_T[t]] = k_TGD[t]
        v_SGD[slot_T[t]] = v_TGD[t]


@njit(**_fast)
def _scores(q_D: Array, k_SGD: Array, slot_S: Array, group: int, score_S: Array) -> None:
    for s in range(len(slot_S)):
        k_D = k_SGD[slot_S[s], group]
        product = np.float32(0)
        for d in range(len(q_D)):
            product += q_D[d] * k_D[d]
        score_S[s] = product


@njit(**_fast)
def _softmax(score_S: Array, scale: float) -> None:
    """Replace scores by softmax(scale * score)."""
    highest = score_S.max()
    total = np.float32(0)
    for s in range(len(score_S)):
        score_S[s] = exp((score_S[s] - highest) * np.float32(scale))
    for s in range(len(score_S)):
        total += score_S[s]
    for s in range(len(score_S)):
        score_S[s] /= total


@njit(**_fast)
def _weighted_sum(weight_S: Array, v_SGD: Array, slot_S: Array, group: int, out_D: Array) -> None:
    out_D[:] = 0
    for s in range(len(slot_S)):
        v_D = v_SGD[slot_S[s], group]
        for d in range(len(out_D)):
            out_D[d] += weight_S[s] * v_D[d]


@njit(f"void({_heads}, {_heads}, {_heads}, int64[:,:], int64[::1], int64, float64, {_heads})", **_fast)
def decode_attention(
    q_BHD: Array,
    k_SGD: Array,
    v_SGD: Array,
    table_BN: Array,
    length_B: Array,
    block_size: int,
    scale: float,
    out_BHD: Array,
) -> None:
    """Attend with one query of each request to the first length_B tokens of its blocks, read in place.

    scale: above zero. Query heads of one KV head stand together.
    """
    num_heads, group_size = q_BHD.shape[1], q_BHD.shape[1] // k_SGD.shape[1]
    for b in range(q_BHD.shape[0]):
        slot_S = np.empty(length_B[b], np.int64)
        for s in range(len(slot_S)):
            slot_S[s] = table_BN[b, s // block_size] * block_size + s % block_size
        score_S = np.empty(len(slot_S), np.float32)
        for h in range(num_heads):
            group = h // group_size
            _scores(q_BHD[b, h], k_SGD, slot_S, group, score_S)
            _softmax(score_S, scale)
            _weighted_sum(score_S, v_SGD, slot_S, group, out_BHD[b, h])
