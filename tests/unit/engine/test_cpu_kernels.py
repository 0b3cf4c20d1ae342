"""The router's compiled loops against torch's and the families' own functions."""

import importlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from experts import cpu_math
from router.kernels import cpu_loops
from router.model.fuse_cpu import rope_on_cpu, rotates_halves


@given(
    rows=st.integers(1, 5),
    width=st.integers(1, 70),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    seed=st.integers(0, 99),
)
def test_a_norm_is_torchs(rows: int, width: int, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    x_RD, weight_D = torch.randn(rows, width) * scale, torch.randn(width)
    out_RD = torch.empty_like(x_RD)
    cpu_loops.rms_norm(x_RD.numpy(), weight_D.numpy(), 1e-6, out_RD.numpy())
    torch.testing.assert_close(out_RD, F.rms_norm(x_RD, (width,), weight_D, 1e-6))


@njit
def _exp_of_each(x: np.ndarray, out: np.ndarray) -> None:
    for i in range(len(x)):
        out[i] = cpu_math.exp(x[i])


def test_exp_is_exact_to_a_float32s_last_digit_and_keeps_nan() -> None:
    x = np.linspace(-87, 88, 1_000_003, dtype=np.float32)
    out = np.empty_like(x)
    _exp_of_each(x, out)
    np.testing.assert_allclose(out, np.exp(x.astype(np.float64)), rtol=1.2e-7)

    edges = np.full(64, np.nan, np.float32)
    edges[:3] = -np.inf, -200, np.inf
    _exp_of_each(edges, edges)
    assert (edges[:2] < 1e-37).all()
    assert edges[2] > 1e38
    assert np.isnan(edges[3:]).all()  # as many as fill vector registers


@given(
    heads=st.integers(1, 3),
    rows=st.integers(1, 4),
    half=st.integers(1, 9),
    rest=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_a_rotation_is_transformers(heads: int, rows: int, half: int, rest: int, seed: int) -> None:
    torch.manual_seed(seed)
    theirs = importlib.import_module(
        "transformers.models.minimax_m2.modeling_minimax_m2"
    ).apply_rotary_pos_emb
    q, k = torch.randn(1, heads, rows, 2 * half + rest), torch.randn(1, 1, rows, 2 * half + rest)
    cos, sin = torch.randn(2, 1, rows, 2 * half)
    for ours, expected in zip(rope_on_cpu(q, k, cos, sin), theirs(q, k, cos, sin), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    ("family", "expected"), [("qwen3_moe", True), ("minimax_m2", True), ("ernie4_5_moe", False)]
)
def test_a_family_that_rotates_otherwise_keeps_its_own_function(family: str, expected: bool) -> None:
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    assert rotates_halves(modeling.apply_rotary_pos_emb) == expected
