"""The kernels of backend `triton`, which dequantise NVFP4 weights in registers, on their way to the tensor cores.

T tokens, D hidden, K top-k, e slots, I intermediate, P = T * K pairs. A matrix has N outputs and 2 * J inputs. R: the pairs
of local experts, those of an expert together. A block is up to BLOCK_R of them, all of one expert. A byte of a matrix holds
the codes of inputs j and J + j; `order_of` and `pack` in backend.py say which input stands where.
"""

import triton
import triton.language as tl

TWO_119 = tl.constexpr(2.0**119)
SCALE_SHIFT = 8
"""Dequantised weights are too small by 2 to this power; Layer.scale_2_e3 makes up for it after the product."""

_DEQUANTIZE = tl.constexpr("""{
    .reg .b32 t, u, zero;
    mov.b32 zero, 0x80008000;
    and.b32 t, $4, 0x81C081C0;
    fma.rn.bf16x2 $0, t, $5, zero;
    shl.b32 t, $4, 3;
    and.b32 t, t, 0x81C081C0;
    fma.rn.bf16x2 $1, t, $6, zero;
    shl.b32 t, $4, 6;
    and.b32 t, t, 0x81C081C0;
    fma.rn.bf16x2 $2, t, $7, zero;
    shl.b32 t, $4, 1;
    and.b32 t, t, 0x80008000;
    shr.b32 u, $4, 5;
    and.b32 u, u, 0x01000100;
    or.b32 t, t, u;
    shr.b32 u, $4, 4;
    and.b32 u, u, 0x00C000C0;
    or.b32 t, t, u;
    fma.rn.bf16x2 $3, t, $8, zero;
}""")
"""Assembly that turns a word of two times four codes into bfloat16. The sign of a code goes to bit 15, the rest to bits
8 to 6, which makes value * 2^-126, also where bfloat16 is subnormal. The product with scale * 2^118 is exact. $0 and $1 are
inputs j to j + 3, $2 and $3 the four from J + j on."""


@triton.jit(do_not_specialize=["first_slot", "num_slots", "num_pairs"])
def arrange(
    x_TD,
    ids_TK,
    first_slot,
    num_slots,
    counts_e,
    total,
    pair_eP,
    num_pairs,
    blocks_B4,
    num_blocks,
    arranged_TD,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
    NUM_LISTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Put one token's inputs into the order of positions, and append its pairs to the lists of their experts.

    The program that ends last cuts the lists into blocks of (slot, first pair of the list, number of rows, first row of R),
    and adds the number of pairs, and of the experts that have some, to the totals.
    ids_TK: ids of local experts are those in [first_slot, first_slot + num_slots).
    counts_e: zeros [1 + e], of which the first counts the programs that are done; zeros again at the end. Atomic additions
    give the places in a list, so they may differ from run to run; no result depends on them.
    LANES: a power of 2, at least TOP_K.
    """
    token = tl.program_id(0)
    for first in tl.static_range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        x_D = tl.load(x_TD + token.to(tl.int64) * D + _input(d, D // 2), mask=d < D)
        tl.store(arranged_TD + token.to(tl.int64) * D + d, x_D, mask=d < D)
    k = tl.arange(0, LANES)
    slot = tl.load(ids_TK + token * TOP_K + k, mask=k < TOP_K, other=-1) - first_slot
    ours = (slot >= 0) & (slot < num_slots) & (k < TOP_K)
    at = tl.atomic_add(counts_e + 1 + slot, 1, mask=ours)
    tl.store(pair_eP + slot.to(tl.int64) * num_pairs + at, token * TOP_K + k, mask=ours)
    tl.debug_barrier()
    if tl.atomic_add(counts_e, 1) == tl.num_programs(0) - 1:
        _cut(counts_e, total, blocks_B4, num_blocks, NUM_LISTS, BLOCK_R)


@triton.jit
def _cut(counts_e, total, blocks_B4, num_blocks, NUM_LISTS: tl.constexpr, BLOCK_R: tl.constexpr):
    slot_e = tl.arange(0, NUM_LISTS)
    count_e = tl.load(counts_e + 1 + slot_e, volatile=True)
    start_e = tl.cumsum(count_e) - count_e
    cut_e = tl.cdiv(count_e, BLOCK_R)
    block_e = tl.cumsum(cut_e) - cut_e
    tl.debug_barrier()
    tl.store(counts_e, 0)
    tl.store(counts_e + 1 + slot_e, 0)
    tl.store(num_blocks, tl.sum(cut_e))
    tl.store(total, tl.load(total) + tl.sum(count_e))
    tl.store(total + 1, tl.load(total + 1) + tl.sum((count_e > 0).to(tl.int32)))
    for n in range(0, tl.max(cut_e)):
        at = blocks_B4 + 4 * (block_e + n)
        here = n < cut_e
        tl.store(at, slot_e, mask=here)
        tl.store(at + 1, n * BLOCK_R, mask=here)
        tl.store(at + 2, tl.minimum(count_e - n * BLOCK_R, BLOCK_R), mask=here)
        tl.store(at + 3, start_e + n * BLOCK_R, mask=here)


@triton.jit(do_not_specialize=["num_pairs"])
def gate_up(
    x_TD,
    packed_eNJ,
    scale_eNGh,
    scale_2_e3,
    pair_eP,
    num_pairs,
    blocks_B4,
    num_blocks,
    h_RI,
    TOP_K: tl.constexpr,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """Compute h = silu(gate(x)) * up(x) for one block of rows and BLOCK_N / 2 positions of I.

    N = 2 I: 8 outputs of gate and 8 of up in turn.
    """
    if tl.program_id(1) >= tl.load(num_blocks):
        return
    slot, first, num_rows, first_row = _block(blocks_B4)
    r = tl.arange(0, BLOCK_R)
    pair_R = tl.load(pair_eP + slot.to(tl.int64) * num_pairs + first + r, mask=r < num_rows, other=0)
    n = slot.to(tl.int64) * (2 * I) + tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = x_TD + (pair_R // TOP_K).to(tl.int64) * D
    sum_NR = _product(
        rows, r < num_rows, packed_eNJ, scale_eNGh, n, D // 2, BLOCK_N, BLOCK_R, BLOCK_J, STAGES, ROWS_FIRST
    )
    p = tl.program_id(0) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    at_R = h_RI + (first_row + r).to(tl.int64) * I
    scale_gate, scale_up = tl.load(scale_2_e3 + 3 * slot), tl.load(scale_2_e3 + 3 * slot + 1)
    if ROWS_FIRST:
        sum_NR = tl.trans(tl.reshape(sum_NR, (BLOCK_R, BLOCK_N // 16, 2, 8)), (0, 1, 3, 2))
        gate, up = tl.split(tl.reshape(sum_NR, (BLOCK_R, BLOCK_N // 2, 2)))
        at = at_R[:, None] + p[None, :]
        here = (r < num_rows)[:, None]
    else:
        sum_NR = tl.trans(tl.reshape(sum_NR, (BLOCK_N // 16, 2, 8, BLOCK_R)), (0, 2, 3, 1))
        gate, up = tl.split(tl.reshape(sum_NR, (BLOCK_N // 2, BLOCK_R, 2)))
        at = at_R[None, :] + p[:, None]
        here = (r < num_rows)[None, :]
    gate *= scale_gate
    h = gate * tl.sigmoid(gate) * (up * scale_up)
    tl.store(at, h.to(h_RI.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["num_pairs"])
def down(
    h_RI,
    packed_eNJ,
    scale_eNGh,
    scale_2_e3,
    pair_eP,
    num_pairs,
    blocks_B4,
    num_blocks,
    w_TK,
    y_PD,
    D: tl.constexpr,
    I: tl.constexpr,  # noqa: E741
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """Compute y = w * down(h) for one block of rows, and write it at each row's pair. N = D."""
    if tl.program_id(1) >= tl.load(num_blocks):
        return
    slot, first, num_rows, first_row = _block(blocks_B4)
    r = tl.arange(0, BLOCK_R)
    rows = h_RI + (first_row + r).to(tl.int64) * I
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = slot.to(tl.int64) * D + n
    sum_NR = _product(
        rows, r < num_rows, packed_eNJ, scale_eNGh, at, I // 2, BLOCK_N, BLOCK_R, BLOCK_J, STAGES, ROWS_FIRST
    )
    pair_R = tl.load(pair_eP + slot.to(tl.int64) * num_pairs + first + r, mask=r < num_rows, other=0)
    w_R = tl.load(w_TK + pair_R, mask=r < num_rows, other=0.0) * tl.load(scale_2_e3 + 3 * slot + 2)
    at_R = y_PD + pair_R.to(tl.int64) * D
    if ROWS_FIRST:
        y = sum_NR * w_R[:, None]
        tl.store(at_R[:, None] + n[None, :], y.to(y_PD.dtype.element_ty), mask=(r < num_rows)[:, None])
    else:
        y = sum_NR * w_R[None, :]
        tl.store(at_R[None, :] + n[:, None], y.to(y_PD.dtype.element_ty), mask=(r < num_rows)[None, :])


@triton.jit(do_not_specialize=["first_slot", "num_slots"])
def combine(
    y_PD, ids_TK, first_slot, num_slots, out_TD, TOP_K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Set out to the sum of a token's local pairs, in the order of its top-k."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    sum_D = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(TOP_K):
        pair = token * TOP_K + k
        slot = tl.load(ids_TK + pair) - first_slot
        end = tl.where((slot >= 0) & (slot < num_slots), D, 0)
        sum_D += tl.load(y_PD + pair * D + d, mask=d < end, other=0.0)
    tl.store(out_TD + token * D + d, sum_D.to(out_TD.dtype.element_ty), mask=d < D)


@triton.jit
def _block(blocks_B4):
    at = blocks_B4 + 4 * tl.program_id(1)
    return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)


@triton.jit
def _product(
    rows_R,
    here_R,
    packed_eNJ,
    scale_eNGh,
    at_N,
    J: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_J: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS_FIRST: tl.constexpr,
):
    """Return float32 W x for rows at_N of the packed matrices and the inputs at rows_R: [R, N] if ROWS_FIRST, else [N, R].

    With few rows a product is quickest if the weights are the left operand and stay in registers. But products of 16 rows
    and more become Hopper's wgmma, which would tear the words of four bytes apart there; as its right operand the weights
    go through shared memory.
    """
    SQUARE: tl.constexpr = 64 if J % 64 == 0 else 32
    GROUPS: tl.constexpr = max(BLOCK_J, SQUARE) // 16
    j = tl.arange(0, BLOCK_J)
    packed_NJ = packed_eNJ + at_N[:, None] * J + j[None, :]
    scale_Ng = scale_eNGh + at_N[:, None] * (J // 8) + tl.arange(0, 2 * GROUPS)[None, :]
    if ROWS_FIRST:
        x = rows_R[:, None] + j[None, :]
        here = here_R[:, None]
        sum_NR = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    else:
        x = rows_R[None, :] + j[:, None]
        here = here_R[None, :]
        sum_NR = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for at in tl.range(0, J, BLOCK_J, num_stages=STAGES):
        x_low = tl.load(x + at, mask=here, other=0.0)
        x_high = tl.load(x + (J + at), mask=here, other=0.0)
        scale = tl.load(scale_Ng + at // SQUARE * (SQUARE // 8)).to(tl.int32) << 20
        scale = (scale.to(tl.float32, bitcast=True) * TWO_119 * TWO_119).to(tl.bfloat16)
        low_Ng, high_Ng = tl.split(tl.reshape(scale, (BLOCK_N, GROUPS, 2)))
        low_NJ, high_NJ = dequantize(
            tl.load(packed_NJ + at), _each(low_Ng, J, BLOCK_J), _each(high_Ng, J, BLOCK_J)
        )
        if ROWS_FIRST:
            sum_NR = tl.dot(x_low, tl.trans(low_NJ), sum_NR)
            sum_NR = tl.dot(x_high, tl.trans(high_NJ), sum_NR)
        else:
            sum_NR = tl.dot(low_NJ, x_low, sum_NR)
            sum_NR = tl.dot(high_NJ, x_high, sum_NR)
    return sum_NR


@triton.jit
def _input(p, J: tl.constexpr):
    """Return which of the 2 * J inputs stands at position p: see `order_of`."""
    SIDE: tl.constexpr = 4 if J % 64 == 0 else 2
    chunk, group, word = p // 16 % SIDE, p % 16 // (16 // SIDE), p % (16 // SIDE) // 4
    at = p // (16 * SIDE) * (16 * SIDE) + group * 16 + (word * SIDE + chunk) * 4 + p % 4
    return tl.max_contiguous(tl.multiple_of(at, 4), 4)


@triton.jit
def _each(scale_Ng, J: tl.constexpr, BLOCK_J: tl.constexpr):
    """Repeat the scales of groups for every position. Half a square has all of the square's groups."""
    SIDE: tl.constexpr = 4 if J % 64 == 0 else 2
    squares: tl.constexpr = max(BLOCK_J // (16 * SIDE), 1)
    chunks: tl.constexpr = min(BLOCK_J // 16, SIDE)
    N: tl.constexpr = scale_Ng.shape[0]
    scale = tl.reshape(scale_Ng, (N, squares, 1, SIDE, 1))
    return tl.reshape(tl.broadcast_to(scale, (N, squares, chunks, SIDE, 16 // SIDE)), (N, BLOCK_J))


@triton.jit
def dequantize(packed, low_scale, high_scale):
    """Return the bfloat16 values of both nibbles of each byte, times their scales."""
    return tl.inline_asm_elementwise(
        _DEQUANTIZE,
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [packed, low_scale, high_scale],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )
