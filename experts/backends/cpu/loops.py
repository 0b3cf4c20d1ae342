"""The compiled loops of backend `cpu`, which compute a layer's experts straight from their NVFP4 codes.

numba compiles them for this machine when the module is first imported (seconds) and keeps the result on disk. They are
written so that LLVM turns the loops over N into vector instructions: the innermost loop has 16 turns, a number that the
compiler knows, so it unrolls it. None of them holds Python's lock (the GIL).

T tokens, D hidden, K top-k, P pairs (token, k) as t * K + k, e local slots, I intermediate; R rows of one expert.
A product is x [R, B, J] by [B, J, N]: B blocks of J = 16 input features, N output features.
"""

import numpy as np
from numba import njit

from experts.cpu_math import exp

Array = np.ndarray

ROWS = 16
"""The rows of one expert that are computed together: their sums stay in the core's cache while its weights pass by."""

_ids, _codes, _scales, _rows = "int32[:,::1]", "int8[:,:,:,::1]", "float32[:,:,::1]", "float32[:,::1]"
_forward = (
    f"UniTuple(int64, 2)({_rows}, {_ids}, int64, {_rows}, {_codes}, {_scales}, {_codes}, {_scales}, {_rows})"
)
_fast = {"nogil": True, "cache": True, "error_model": "numpy", "fastmath": {"contract"}}


@njit(f"UniTuple(int64, 2)({_ids}, int64, int64, {_ids})", **_fast)
def to_local(phys_TK: Array, first_slot: int, num_slots: int, local_TK: Array) -> tuple[int, int]:
    """Write to local_TK the local slot of every physical id, -1 where it is not in [first_slot, first_slot + num_slots).

    Returns how many pairs are local, and how many slots they belong to.
    """
    num_local = num_slots_hit = 0
    hit_e = np.zeros(num_slots, np.bool_)
    for t in range(phys_TK.shape[0]):
        for k in range(phys_TK.shape[1]):
            local = np.int64(phys_TK[t, k]) - first_slot
            if 0 <= local < num_slots:
                local_TK[t, k] = local
                num_local += 1
                num_slots_hit += not hit_e[local]
                hit_e[local] = True
            else:
                local_TK[t, k] = -1
    return num_local, num_slots_hit


@njit(**_fast)
def _one_row(x_BJ: Array, codes_BJN: Array, scale_BN: Array, y_N: Array) -> None:
    for b in range(codes_BJN.shape[0]):
        for n in range(codes_BJN.shape[2]):
            block = np.float32(0)
            for j in range(16):
                block += x_BJ[b, j] * np.float32(codes_BJN[b, j, n])
            y_N[n] += scale_BN[b, n] * block


@njit(**_fast)
def _two_rows(x_RBJ: Array, codes_BJN: Array, scale_BN: Array, y_RN: Array) -> None:
    """Compute two rows for little more than the price of one: a code is fetched and converted once for both."""
    for b in range(codes_BJN.shape[0]):
        for n in range(codes_BJN.shape[2]):
            block_0 = block_1 = np.float32(0)
            for j in range(16):
                code = np.float32(codes_BJN[b, j, n])
                block_0 += x_RBJ[0, b, j] * code
                block_1 += x_RBJ[1, b, j] * code
            y_RN[0, n] += scale_BN[b, n] * block_0
            y_RN[1, n] += scale_BN[b, n] * block_1


@njit(**_fast)
def _product(x_RBJ: Array, codes_BJN: Array, scale_BN: Array, y_RN: Array) -> None:
    """Set y to the sum over blocks of scale * (x . codes)."""
    num_rows = x_RBJ.shape[0]
    y_RN[:] = 0
    for b in range(codes_BJN.shape[0]):
        one = slice(b, b + 1)
        for r in range(0, num_rows - 1, 2):
            _two_rows(x_RBJ[r : r + 2, one], codes_BJN[one], scale_BN[one], y_RN[r : r + 2])
        if num_rows % 2:
            _one_row(x_RBJ[-1, one], codes_BJN[one], scale_BN[one], y_RN[-1])


@njit(**_fast)
def _swiglu(gate_up_R2I: Array, h_RI: Array) -> None:
    for r in range(h_RI.shape[0]):
        for i in range(h_RI.shape[1]):
            gate = gate_up_R2I[r, i]
            h_RI[r, i] = gate / (np.float32(1) + exp(-gate)) * gate_up_R2I[r, h_RI.shape[1] + i]


@njit(**_fast)
def _sort_pairs(ids_TK: Array, first_slot: int, num_slots: int) -> tuple[Array, Array]:
    """Return the pairs of local slots, slot by slot, and [e + 1] where the pairs of each slot begin."""
    begin_e = np.zeros(num_slots + 1, np.int64)
    for id_ in ids_TK.flat:
        slot = np.int64(id_) - first_slot
        if 0 <= slot < num_slots:
            begin_e[slot + 1] += 1
    for slot in range(num_slots):
        begin_e[slot + 1] += begin_e[slot]
    pair_P = np.empty(begin_e[-1], np.int64)
    next_e = begin_e.copy()
    for pair, id_ in enumerate(ids_TK.flat):
        slot = np.int64(id_) - first_slot
        if 0 <= slot < num_slots:
            pair_P[next_e[slot]] = pair
            next_e[slot] += 1
    return pair_P, begin_e


@njit(_forward, **_fast)
def forward(
    x_TD: Array,
    ids_TK: Array,
    first_slot: int,
    w_TK: Array,
    codes_13: Array,
    scales_13: Array,
    codes_2: Array,
    scales_2: Array,
    out_TD: Array,
) -> tuple[int, int]:
    """Set every row of out_TD to the sum of w * expert(x) over the token's local experts.

    ids_TK: those in [first_slot, first_slot + e) are the local slots, all others are skipped.
    Returns how many pairs are local, and how many slots they belong to.
    codes_13: [e, D / 16, 16, 2I], gate's columns first; codes_2: [e, I / 16, 16, D]; scales: the same without the 16.
    """
    num_slots, _, _, width = codes_13.shape
    top_k = ids_TK.shape[1]
    num_activated = 0
    x_RD = np.empty((ROWS, x_TD.shape[1]), np.float32)
    x_RBJ = x_RD.reshape(ROWS, -1, 16)
    gate_up_R2I = np.empty((ROWS, width), np.float32)
    h_RI = np.empty((ROWS, width // 2), np.float32)
    h_RBJ = h_RI.reshape(ROWS, -1, 16)
    y_RD = np.empty((ROWS, out_TD.shape[1]), np.float32)

    pair_P, begin_e = _sort_pairs(ids_TK, first_slot, num_slots)
    out_TD[:] = 0
    for slot in range(num_slots):
        num_activated += begin_e[slot + 1] > begin_e[slot]
        for begin in range(begin_e[slot], begin_e[slot + 1], ROWS):
            pair_R = pair_P[begin : min(begin + ROWS, begin_e[slot + 1])]
            rows = len(pair_R)
            for r in range(rows):
                x_RD[r] = x_TD[pair_R[r] // top_k]
            _product(x_RBJ[:rows], codes_13[slot], scales_13[slot], gate_up_R2I[:rows])
            _swiglu(gate_up_R2I[:rows], h_RI[:rows])
            _product(h_RBJ[:rows], codes_2[slot], scales_2[slot], y_RD[:rows])
            for r in range(rows):
                token, k = divmod(pair_R[r], top_k)
                out_TD[token] += w_TK[token, k] * y_RD[r]
    return begin_e[-1], num_activated
