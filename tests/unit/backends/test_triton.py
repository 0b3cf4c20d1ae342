"""Backend triton without a GPU: where codes stand, how tiles are chosen, and the kernels in Triton's
interpreter."""

import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.backends import DEFAULTS
from experts.backends.registry import BACKENDS
from experts.nvfp4 import unpack
from experts.weights import MoEShape

pytest.importorskip("triton", reason="triton is of the extra gpu, and for Linux only")

from experts.backends.triton.backend import Matrix, gate_up_rows, order_of, pack, tiles, write_matrix
from tests.support.places import ROOT

CPU = torch.device("cpu")
MULTIPLES_OF_64 = st.integers(1, 96).map(lambda n: 64 * n)


def test_kernels_compute_the_reference() -> None:
    child = subprocess.run(
        [sys.executable, "-m", "tests.support.triton_interpreted"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert child.returncode == 0, child.stderr
    errors = json.loads(child.stdout)
    assert len(errors) == 2 * 3 * 3 + 3 * 3 + 2 * 3 * 3 + 2 * 4 * 2 + 7 * 2 * 2 + 2 + 3 + 4 + 4 + 2 * 6
    assert {call: error for call, error in errors.items() if error > 1e-5} == {}


def test_packed_codes_are_bfloat16s_after_a_shift_and_a_mask() -> None:
    """As the kernels' assembly takes them apart."""
    codes_NJ = torch.randint(0, 16, (2, 3, 8), dtype=torch.uint8)
    word = pack(*codes_NJ).view(torch.int32).long()
    magnitude = 0x81C081C0
    upper = (word << 1) & 0x80008000 | (word >> 5) & 0x01000100 | (word >> 4) & 0x00C000C0
    pairs = [word & magnitude, (word << 3) & magnitude, (word << 6) & magnitude, upper]
    halves = [torch.stack([pair & 0xFFFF, pair >> 16 & 0xFFFF], dim=-1) for pair in pairs]
    values = [half.to(torch.uint16).view(torch.bfloat16).double() * 2.0**126 for half in halves]
    for codes, found in zip(codes_NJ, (values[:2], values[2:]), strict=True):
        truth = unpack(codes | codes << 4)[..., ::2]
        assert torch.equal(torch.cat(found, dim=-1).flatten(1), truth.double())


@given(MULTIPLES_OF_64, st.integers(0, 2**32))
def test_bytes_become_words_as_their_codes_do(num_inputs: int, seed: int) -> None:
    """`pack` is the obvious way from codes; the tables, and pairs of bytes that move together, are the quick one."""
    random = torch.Generator().manual_seed(seed)
    packed_NB = torch.randint(256, (3, num_inputs // 2), dtype=torch.uint8, generator=random)
    codes_NK = torch.stack([packed_NB & 0xF, packed_NB >> 4], dim=-1).flatten(1)
    scale_NG = torch.randint(256, (3, num_inputs // 16), dtype=torch.uint8, generator=random)
    into = Matrix.zeros(2, 3, num_inputs, CPU)
    write_matrix(packed_NB, scale_NG, into=into, slot=1)
    low_NJ, high_NJ = codes_NK[:, order_of(num_inputs)].chunk(2, dim=1)
    assert torch.equal(into.packed_eNJ[1], pack(low_NJ, high_NJ))
    assert torch.equal(into.scale_eNGh[1].mT.flatten(1), scale_NG)
    assert not into.packed_eNJ[0].any()


@given(MULTIPLES_OF_64)
def test_rows_of_gate_and_up_take_turns(num_outputs: int) -> None:
    rows = gate_up_rows(num_outputs, CPU).reshape(-1, 2, 8)
    assert torch.equal(rows[:, 0].flatten(), order_of(num_outputs)), "gate's"
    assert torch.equal(rows[:, 1].flatten(), num_outputs + order_of(num_outputs)), "up's"


@given(MULTIPLES_OF_64)
def test_what_a_thread_holds_is_of_one_group(num_inputs: int) -> None:
    order_K = order_of(num_inputs)
    assert torch.equal(order_K.sort().values, torch.arange(num_inputs))
    for half_J in order_K.chunk(2):
        side = 4 if len(half_J) % 64 == 0 else 2
        held = (
            half_J.reshape(-1, side, 4, 4).transpose(1, 2).flatten(2) // 16
        )  # square, thread, bytes: their groups
        assert torch.equal(held, held[..., :1].expand_as(held))


@given(MULTIPLES_OF_64, MULTIPLES_OF_64, st.integers(1, 512), st.integers(1, 1 << 17))
def test_tiles_divide_the_matrices(hidden: int, intermediate: int, num_experts: int, num_pairs: int) -> None:
    gate_up, down = tiles(MoEShape(1, (0,), num_experts, hidden, intermediate), num_pairs)
    assert gate_up.rows == down.rows
    for each, num_outputs, num_inputs in ((gate_up, 2 * intermediate, hidden), (down, hidden, intermediate)):
        assert num_outputs % each.outputs == 0
        assert num_inputs // 2 % each.inputs == 0
        assert each.outputs >= 64
        assert each.inputs >= 32


def test_without_a_gpu_it_says_so() -> None:
    shape = MoEShape(1, (0,), 8, 256, 128)
    with pytest.raises(ValueError, match="needs a CUDA GPU of SM80 or newer, which cpu is not"):
        BACKENDS["triton"](shape, 8, torch.bfloat16, torch.device("cpu"), DEFAULTS)
