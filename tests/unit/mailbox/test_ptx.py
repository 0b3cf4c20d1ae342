"""What the mailbox's kernels become for each GPU: Triton's interpreter runs no inline assembly and shows no ordering."""

import re
from functools import cache

import pytest

pytest.importorskip("triton", reason="triton is of the extra gpu, and for Linux only")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from experts.fabric.mailbox import kernels

CAPABILITIES = (90, 120, 121)
"""Hopper, RTX PRO 6000 and DGX Spark."""

TABLE = {"table": "*i64", "position": "i32"}
ROWS = {"x_TD": "*bf16", "ids_TK": "*i32", "w_TK": "*fp32"}
SIZES = {"D": 2048, "K": 8, "BLOCK": 2048, "BLOCK_K": 256}
SIGNATURES = {
    "wait_for_outbox": (TABLE, {}, 1),
    "wait_for_inboxes": (TABLE, {}, 1),
    "post_rows": (TABLE | ROWS | {"arrived": "*i32", "num_rows": "i32"}, SIZES, 8),
    "fetch_rows": ({"table": "*i64"} | ROWS | {"num_rows": "i32"}, SIZES, 8),
    "post_partial": (TABLE | {"partial_TD": "*bf16", "arrived": "*i32"}, {"D": 2048, "BLOCK": 2048}, 8),
    "sum_partials": (
        {"table": "*i64", "own_TD": "*bf16", "out_TD": "*bf16", "num_rows": "i32"},
        {"D": 2048, "WIRE": tl.bfloat16, "OWN": True, "BLOCK": 2048},
        8,
    ),
}


@cache
def ptx_of(name: str, capability: int) -> str:
    arguments, constants, num_warps = SIGNATURES[name]
    signature = arguments | dict.fromkeys(constants, "constexpr")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, kind in enumerate(signature.values())
        if kind.startswith("*")
    }
    source = ASTSource(getattr(kernels, name), signature, constants, aligned)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
    return compiled.asm["ptx"]


@pytest.fixture(params=CAPABILITIES, ids=lambda capability: f"sm_{capability}")
def capability(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_kernel_compiles_and_touches_host_memory_with_no_atomic_operation(
    name: str, capability: int
) -> None:
    ptx = ptx_of(name, capability)
    assert f".target sm_{capability}" in ptx
    atomics = re.findall(r"\b(?:atom|red)\.\S+", ptx)
    assert not [one for one in atomics if ".sys" in one], "every flag has one writer"
    assert len(atomics) == (name in ("post_rows", "post_partial")), "the blocks of a post count themselves"
    assert all(".gpu" in one and ".acq_rel" in one for one in atomics)


@pytest.mark.parametrize("name", ["wait_for_outbox", "wait_for_inboxes"])
def test_a_wait_acquires_in_one_warp(name: str, capability: int) -> None:
    ptx = ptx_of(name, capability)
    assert "ld.acquire.sys.global.u64" in ptx
    assert ".reqntid 32" in ptx
    assert len(re.findall(r"ld\.acquire\.sys", ptx)) >= 3, (
        "the flag before and in the loop, and the stop word"
    )
    assert "st.release" not in ptx


@pytest.mark.parametrize("name", ["post_rows", "post_partial"])
def test_a_post_releases_once_behind_a_barrier(name: str, capability: int) -> None:
    ptx = ptx_of(name, capability)
    copy, _, after = ptx.partition("bar.sync")
    assert "st.release" not in copy
    assert len(re.findall(r"@first st\.release\.sys\.global\.u64", after)) == 1, "by the first thread alone"
    assert "setp.eq.u32 first, thread, 0" in after
    assert "ld.acquire.sys" not in ptx, "it reads no host memory"


@pytest.mark.parametrize(
    ("name", "loads", "stores"),
    [("post_rows", 1, 1), ("fetch_rows", 1, 1), ("post_partial", 1, 1), ("sum_partials", 2, 1)],
)
def test_rows_move_16_bytes_at_a_time(name: str, loads: int, stores: int, capability: int) -> None:
    """Unless pointers and sizes are known to be multiples of 16, Triton moves 2 bytes of bfloat16 at a time."""
    ptx = ptx_of(name, capability)
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)) >= loads
    assert len(re.findall(r"st\.global\S*\.v4\.b32", ptx)) >= stores
    assert not re.findall(r"(?:ld|st)\.global\S*\.b16", ptx)
