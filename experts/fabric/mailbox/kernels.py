"""Triton kernels of a mailbox: posting, waiting, fetching and adding. A CUDA graph may hold them.

They read addresses, the step's first flag and its row count from a table on the device (device.py lays it out), so that
replacing a peer, or a step of fewer rows, recaptures nothing. A flag is raised by st.release.sys of one thread after a
barrier of its block, and by the block that is the last to arrive; it is awaited by ld.acquire.sys of one warp, in a kernel
of its own, after which plain loads of the next kernel see the data. No atomic operation touches host memory.

T rows, D hidden, K top-k, R peers. Sizes are multiples of 8, so that loads and stores are 16 bytes wide.
"""

import triton
import triton.language as tl

FIRST = tl.constexpr(0)
"""The table's entries, int64: the flag of the step's first MoE layer ..."""

ROWS = tl.constexpr(1)
"""... how many rows are real ..."""

STOP = tl.constexpr(2)
"""... addresses: this process's stop word ..."""

FLAG = tl.constexpr(3)
"""... the outbox: its flag ..."""

X = tl.constexpr(4)
IDS = tl.constexpr(5)
WEIGHTS = tl.constexpr(6)
STOPPED = tl.constexpr(7)
"""... 1 once a wait of this step has seen the stop, 0 at its beginning: a post looks here, and not at host memory, which
would cost it a way over the bus ..."""

NUM_PEERS = tl.constexpr(8)
"""... the number of inboxes, and from here on flag and partial sums of each."""

PEERS = tl.constexpr(9)

LOOKS = tl.constexpr(16)
"""How often a wait looks at its flag before it looks at the stop word once: each look is a way over the bus."""


@triton.jit
def load_acquire(address):
    """Read the int64 at an address of host memory; what its writer wrote before is seen by what follows."""
    return tl.inline_asm_elementwise(
        "ld.acquire.sys.global.u64 $0, [$1];",
        "=l,l",
        [address],
        dtype=tl.int64,
        is_pure=False,
        pack=1,
    )


@triton.jit
def store_release(address, value):
    """Write an int64 to host memory by the block's first thread, after everything that it saw written."""
    return tl.inline_asm_elementwise(
        """{
        .reg .pred first;
        .reg .u32 thread;
        mov.u32 thread, %tid.x;
        setp.eq.u32 first, thread, 0;
        @first st.release.sys.global.u64 [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,l",
        [address, value],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def raise_flag(table, flag, position, arrived):
    """Raise a flag once all blocks of this kernel have arrived here, unless a wait of this step has seen the stop.

    arrived: int32 on the device, zero before and after.
    """
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(arrived, 0)
        if tl.load(table + STOPPED) == 0:
            store_release(flag, tl.load(table + FIRST) + position)


@triton.jit(do_not_specialize=["position"])
def wait_for_outbox(table, position):
    """Wait for the rows of a layer, or for a stop."""
    wait(table, tl.load(table + FLAG), position)


@triton.jit(do_not_specialize=["position"])
def wait_for_inboxes(table, position):
    """Wait for the partial sums of every peer, or for a stop."""
    for peer in range(0, tl.load(table + NUM_PEERS)):
        wait(table, tl.load(table + PEERS + 2 * peer), position)


@triton.jit
def wait(table, flag, position):
    """Wait until a flag has this layer's value, or the stop word has."""
    value, stop = tl.load(table + FIRST) + position, tl.load(table + STOP)
    seen, looks = load_acquire(flag), 0
    while seen < value:
        seen = load_acquire(flag)
        looks += 1
        if looks % LOOKS == 0:  # noqa: SIM102 Triton would look at both sides of an `and`
            if load_acquire(stop) >= value:
                tl.store(table + STOPPED, 1)
                seen = value


@triton.jit
def at_address(table, entry, dtype: tl.constexpr):
    """Return the pointer that stands in the table, which is a multiple of 16."""
    return tl.multiple_of(tl.multiple_of(tl.load(table + entry), 16).to(tl.pointer_type(dtype)), 16)


@triton.jit(do_not_specialize=["position", "num_rows"])
def post_rows(
    table,
    position,
    x_TD,
    ids_TK,
    w_TK,
    arrived,
    num_rows,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Copy real rows of x to the outbox, ids and weights of all num_rows with -1 for the others, and raise its flag."""
    real = tl.load(table + ROWS)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = at < tl.multiple_of(real * D, 8)
    out = at_address(table, X, x_TD.dtype.element_ty)
    tl.store(out + at, tl.load(x_TD + at, mask=held, other=0.0), mask=held)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    here = k < num_rows * K
    ids = tl.load(ids_TK + k, mask=here, other=-1)
    tl.store(at_address(table, IDS, tl.int32) + k, tl.where(k < real * K, ids, -1), mask=here)
    weights = tl.load(w_TK + k, mask=here, other=0.0)
    tl.store(at_address(table, WEIGHTS, tl.float32) + k, weights, mask=here)
    raise_flag(table, tl.load(table + FLAG), position, arrived)


@triton.jit(do_not_specialize=["num_rows"])
def fetch_rows(
    table,
    x_TD,
    ids_TK,
    w_TK,
    num_rows,
    D: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Copy what lies in the outbox; rows that are not real are zeros with ids of -1."""
    real = tl.load(table + ROWS)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held, here = at < tl.multiple_of(real * D, 8), at < tl.multiple_of(num_rows * D, 8)
    x = tl.load(at_address(table, X, x_TD.dtype.element_ty) + at, mask=held, other=0.0)
    tl.store(x_TD + at, x, mask=here)
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    ids = tl.load(at_address(table, IDS, tl.int32) + k, mask=k < real * K, other=-1)
    tl.store(ids_TK + k, ids, mask=k < num_rows * K)
    weights = tl.load(at_address(table, WEIGHTS, tl.float32) + k, mask=k < real * K, other=0.0)
    tl.store(w_TK + k, weights, mask=k < num_rows * K)


@triton.jit(do_not_specialize=["position"])
def post_partial(table, position, partial_TD, arrived, D: tl.constexpr, BLOCK: tl.constexpr):
    """Copy the partial sums of real rows to the inbox, and raise its flag."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = at < tl.multiple_of(tl.load(table + ROWS) * D, 8)
    out = at_address(table, PEERS + 1, partial_TD.dtype.element_ty)
    tl.store(out + at, tl.load(partial_TD + at, mask=held, other=0.0), mask=held)
    raise_flag(table, tl.load(table + PEERS), position, arrived)


@triton.jit(do_not_specialize=["num_rows"])
def sum_partials(
    table,
    own_TD,
    out_TD,
    num_rows,
    D: tl.constexpr,
    WIRE: tl.constexpr,
    OWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add this rank's partial sums, if it has any, and those of all peers in float32 in rank order.

    WIRE: the dtype of partial sums. Rows that are not real become zeros.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    held = at < tl.multiple_of(tl.load(table + ROWS) * D, 8)
    total = tl.zeros((BLOCK,), tl.float32)
    if OWN:
        total += tl.load(own_TD + at, mask=held, other=0.0).to(tl.float32)
    for peer in range(0, tl.load(table + NUM_PEERS)):
        partial = at_address(table, PEERS + 1 + 2 * peer, WIRE)
        total += tl.load(partial + at, mask=held, other=0.0).to(tl.float32)
    here = at < tl.multiple_of(num_rows * D, 8)
    tl.store(out_TD + at, total.to(out_TD.dtype.element_ty), mask=here)
