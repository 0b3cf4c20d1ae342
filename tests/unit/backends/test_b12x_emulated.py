"""The emulation of the b12x kernels against one that is written out step by step, and shards against the whole.

T tokens, D hidden, K top-k, I intermediate.
"""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.backends import Scales
from experts.backends.b12x import numerics
from experts.backends.b12x.emulated import B12xEmulatedBackend
from experts.backends.reference import ReferenceBackend
from experts.nvfp4 import dequantize
from experts.weights import ExpertWeights, MoEShape
from tests.bench.b12x_accuracy import score
from tests.bench.perplexity import perplexity, windows_of
from tests.support.places import DEMO_MODEL, HELDOUT
from tests.unit.backends.test_b12x_layout import moe_shape, random_expert

CPU = torch.device("cpu")
LAYER = 0
NUM_EXPERTS = 5

E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)


def nearest(value: float, grid: Tensor) -> float:
    """Round to the nearest value of a grid: ties go to the even index, that is, to the even mantissa; what is
    beyond the grid to its end."""
    distances = (grid - abs(value)).abs()
    best = [n for n, distance in enumerate(distances.tolist()) if distance == distances.min()]
    chosen = float(grid[next((n for n in best if n % 2 == 0), best[0])])
    return -chosen if value < 0 else chosen


def as_f32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def as_bf16(value: Tensor) -> Tensor:
    return value.bfloat16().float()


def slow_fp4(row: Tensor, gs: float) -> Tensor:
    """Quantise a row in blocks of 16, one number at a time."""
    out: list[float] = []
    inverse = as_f32(1 / as_f32(gs))
    for block in row.split(16):
        scale = nearest(as_f32(as_f32(block.abs().max().item() * as_f32(1 / 6)) * inverse), E4M3)
        factor = as_f32(as_f32(1 / scale) * inverse) if scale else 0.0
        out += [nearest(as_f32(value * factor), E2M1) * scale for value in block.tolist()]
    return torch.tensor(out)


def slow_moe(
    experts: list[ExpertWeights], x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, static: bool
) -> Tensor:
    """Compute the layer one step at a time, with exact scales, for experts whose gate and up share a
    multiplier; static or dynamic, in the order of slots."""
    intermediate, hidden = experts[0].down.packed.shape[1] * 2, x_TD.shape[1]
    width = 256 if static else 128
    out_TD = torch.zeros(x_TD.shape)
    for t, slots in enumerate(ids_TK.tolist()):
        total_D = torch.zeros(hidden)
        for k, slot in enumerate(slots):
            if slot < 0:
                continue
            expert = experts[slot]
            assert expert.input_scale is not None
            assert expert.down_input_scale is not None
            one = torch.tensor(1.0)
            up, gate, down = (
                dequantize(type(m)(m.packed, m.scale, one), torch.float32)
                for m in (expert.up, expert.gate, expert.down)
            )
            x_D = slow_fp4(as_bf16(x_TD[t]), expert.input_scale.item())
            alpha = expert.gate.scale_2 * expert.input_scale
            u_I, g_I = (up @ x_D) * alpha, (gate @ x_D) * alpha
            a_I = as_bf16(g_I / (1 + torch.exp(-g_I)) * u_I)
            a_I = slow_fp4(a_I, expert.down_input_scale.item())
            alpha_2, w = expert.down.scale_2 * expert.down_input_scale, w_TK[t, k]
            for start in range(0, intermediate, width):
                sum_D = down[:, start : start + width] @ a_I[start : start + width]
                if static:
                    total_D = total_D + as_bf16(as_bf16(sum_D) * as_bf16(w * alpha_2))
                else:
                    total_D = as_bf16(total_D + as_bf16(w * as_bf16(alpha_2 * sum_D)))
        out_TD[t] = as_bf16(total_D)
    return out_TD


def shared_scale(expert: ExpertWeights) -> ExpertWeights:
    """Return an expert whose gate and up have one multiplier, as the slow reference needs it."""
    up = type(expert.up)(expert.up.packed, expert.up.scale, expert.gate.scale_2)
    return ExpertWeights(expert.gate, up, expert.down, expert.input_scale, expert.down_input_scale)


@cache
def experts_of(hidden: int, intermediate: int) -> list[ExpertWeights]:
    shape = moe_shape(hidden, intermediate)
    return [shared_scale(random_expert(shape, seed)) for seed in range(NUM_EXPERTS)]


@cache
def whole(hidden: int, intermediate: int, scales: Scales = "exact") -> B12xEmulatedBackend:
    return emulated(moe_shape(hidden, intermediate), experts_of(hidden, intermediate), scales=scales)


def emulated(
    shape: MoEShape, experts: list[ExpertWeights], *, scales: Scales = "exact"
) -> B12xEmulatedBackend:
    backend = B12xEmulatedBackend(shape, len(experts), torch.float32, CPU, scales=scales)
    for slot, expert in enumerate(experts):
        backend.write_slot(LAYER, slot, expert)
    return backend


@dataclass(frozen=True)
class Call:
    x_TD: Tensor
    ids_TK: Tensor
    w_TK: Tensor


def call(num_tokens: int, top_k: int, hidden: int, seed: int, *, lowest: int = -1) -> Call:
    random = torch.Generator().manual_seed(seed)
    ids_TK = torch.randint(lowest, NUM_EXPERTS, (num_tokens, top_k), dtype=torch.int32, generator=random)
    x_TD = torch.randn(num_tokens, hidden, generator=random).bfloat16().float()
    return Call(x_TD, ids_TK, torch.rand(num_tokens, top_k, generator=random))


def forward(backend: B12xEmulatedBackend | ReferenceBackend, case: Call) -> Tensor:
    out_TD = torch.full_like(case.x_TD, torch.nan)
    backend.forward(LAYER, case.x_TD, case.ids_TK, case.w_TK, out_TD=out_TD)
    return out_TD


def assert_equal_but_for_float32(ours: Tensor, theirs: Tensor) -> None:
    """Assert that two outputs are equal: they add in float32 in different orders, which now and then moves a rounding to the neighbouring
    value."""
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item() + 1e-12)
    differ = ((ours - theirs).abs() > 2**-7 * theirs.abs() + 1e-12).float().mean()
    assert differ < 0.02, differ


def relative(ours: Tensor, truth: Tensor) -> float:
    return ((ours - truth).norm() / truth.norm()).item()


SIZES = st.sampled_from([(128, 48), (128, 256), (128, 272)])


@settings(max_examples=12)
@given(size=SIZES, num_tokens=st.integers(1, 3), top_k=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_static_is_the_kernel_step_by_step(
    size: tuple[int, int], num_tokens: int, top_k: int, seed: int
) -> None:
    case = call(num_tokens, top_k, size[0], seed)
    truth = slow_moe(experts_of(*size), case.x_TD, case.ids_TK, case.w_TK, static=True)
    assert_equal_but_for_float32(forward(whole(*size), case), truth)


@settings(max_examples=8)
@given(size=SIZES, num_tokens=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_dynamic_is_the_kernel_step_by_step(size: tuple[int, int], num_tokens: int, seed: int) -> None:
    case = call(num_tokens, 3, size[0], seed)
    terms_TND = whole(*size).terms(LAYER, case.x_TD, case.ids_TK, case.w_TK, static=False)
    truth = slow_moe(experts_of(*size), case.x_TD, case.ids_TK, case.w_TK, static=False)
    assert_equal_but_for_float32(numerics.dynamic_combine(terms_TND).float(), truth)


def test_more_than_1024_pairs_take_the_dynamic_kernel() -> None:
    backend = whole(128, 256)
    for num_tokens, static in ((256, True), (257, False)):
        case = call(num_tokens, 4, 128, seed=1)
        terms_TND = backend.terms(LAYER, case.x_TD, case.ids_TK, case.w_TK, static=static)
        combine = numerics.static_combine if static else numerics.dynamic_combine
        assert terms_TND.shape[1] == 4 * (1 if static else 2)
        assert torch.equal(forward(backend, case), combine(terms_TND).float())


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_any_order_of_bfloat16_additions_is_within_the_bound(seed: int) -> None:
    case = call(4, 4, 128, seed)
    terms_TND = whole(128, 272).terms(LAYER, case.x_TD, case.ids_TK, case.w_TK, static=False)
    exact_TD = terms_TND.double().sum(dim=1)
    bound_TD = numerics.dynamic_bound(terms_TND)
    random = torch.Generator().manual_seed(seed)
    for _ in range(5):
        order = torch.randperm(terms_TND.shape[1], generator=random)
        error_TD = (numerics.dynamic_combine(terms_TND[:, order]).double() - exact_TD).abs()
        assert (error_TD <= bound_TD + 1e-12).all()


@settings(max_examples=200)
@given(st.floats(-8, 8, width=32))
def test_e2m1_rounds_to_the_nearest_and_ties_to_even(value: float) -> None:
    assert numerics.round_to_e2m1(torch.tensor([value])).item() == nearest(value, E2M1)


@pytest.mark.parametrize("value", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
def test_e2m1_ties(value: float) -> None:
    ours = numerics.round_to_e2m1(torch.tensor([value, -value])).tolist()
    assert ours == [nearest(value, E2M1), -nearest(value, E2M1)]


def test_a_block_that_underflows_is_zero_and_one_that_overflows_saturates() -> None:
    x_RK = torch.tensor([[1e-6] * 16 + [1e6] * 16])
    values_RK = numerics.to_fp4_and_back(x_RK, torch.tensor([1.0]))
    assert not values_RK[0, :16].any()
    assert (values_RK[0, 16:] == 6 * 448).all()


@st.composite
def splits(draw: st.DrawFn) -> list[list[int]]:
    """Each expert on one of up to 4 shards; some shards may hold none."""
    shards: list[list[int]] = [[] for _ in range(draw(st.integers(1, 4)))]
    for expert in draw(st.permutations(range(NUM_EXPERTS))):
        draw(st.sampled_from(shards)).append(expert)
    return shards


@settings(max_examples=20)
@given(
    shards=splits(),
    num_tokens=st.sampled_from([1, 2, 7, 400]),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
def test_any_split_of_the_experts_sums_to_the_whole(
    shards: list[list[int]], num_tokens: int, top_k: int, seed: int
) -> None:
    """Each shard rounds its sum to bfloat16 once, and beyond 1024 pairs adds in bfloat16."""
    size = (128, 256)
    experts, case = experts_of(*size), call(num_tokens, top_k, 128, seed)
    total_TD = torch.zeros_like(case.x_TD)
    for share in shards:
        local_TK = torch.full_like(case.ids_TK, -1)
        for slot, expert in enumerate(share):
            local_TK[case.ids_TK == expert] = slot
        backend = emulated(moe_shape(*size), [experts[expert] for expert in share] or experts[:1])
        total_TD += forward(backend, Call(case.x_TD, local_TK, case.w_TK))
    unsplit_TD = forward(whole(*size), case)
    static = numerics.is_static(num_tokens, top_k)
    terms_TND = whole(*size).terms(LAYER, case.x_TD, case.ids_TK, case.w_TK, static=static)
    magnitude_TD = terms_TND.float().abs().sum(dim=1)
    roundings = 2 if static else 2 * terms_TND.shape[1]
    assert ((total_TD - unsplit_TD).abs() <= roundings * 2**-8 * magnitude_TD + 1e-12).all()


@pytest.mark.parametrize(
    ("num_tokens", "ids"),
    [
        pytest.param(1, [2, 4], id="one token"),
        pytest.param(3, [-1, -1], id="nothing here"),
        pytest.param(4096, [3, -1], id="4096 tokens on one expert"),
        pytest.param(3, [1, 1], id="the same expert twice"),
    ],
)
def test_is_near_the_reference(num_tokens: int, ids: list[int]) -> None:
    """W4A4 costs about 0.16 of the norm on random weights and activations."""
    shape, experts = moe_shape(128, 256), experts_of(128, 256)
    reference = ReferenceBackend(shape, NUM_EXPERTS, torch.float32, CPU)
    for slot, expert in enumerate(experts):
        reference.write_slot(LAYER, slot, expert)
    case = call(num_tokens, 2, 128, seed=3)
    case = Call(case.x_TD, torch.tensor([ids] * num_tokens, dtype=torch.int32), case.w_TK)
    ours_TD = forward(whole(128, 256), case)
    if num_tokens > 100:  # the reference goes token by token
        case = Call(case.x_TD[:50], case.ids_TK[:50], case.w_TK[:50])
    truth_TD = forward(reference, case)
    if truth_TD.any():
        assert relative(ours_TD[: len(truth_TD)], truth_TD) < 0.25
    else:
        assert not ours_TD.any()


def test_computing_in_turns_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = call(50, 3, 128, seed=5)
    at_once = forward(whole(128, 272), case)
    monkeypatch.setattr("experts.backends.b12x.emulated.MAX_TERMS", 128 * 3 * 2 * 7)
    torch.testing.assert_close(forward(whole(128, 272), case), at_once, rtol=1e-2, atol=1e-3)


def test_two_multipliers_for_gate_and_up_cost_nothing() -> None:
    """Where max-and-rescale would round one of the two again: here the error stays that of equal multipliers."""
    shape = moe_shape(128, 256)
    errors = []
    for up_scale in (1.0, 1 / 37):
        experts = [random_expert(shape, seed, up_scale=up_scale) for seed in range(NUM_EXPERTS)]
        reference = ReferenceBackend(shape, NUM_EXPERTS, torch.float32, CPU)
        for slot, expert in enumerate(experts):
            reference.write_slot(LAYER, slot, expert)
        case = call(64, 3, 128, seed=11)
        errors.append(relative(forward(emulated(shape, experts), case), forward(reference, case)))
    assert errors[1] == pytest.approx(errors[0], rel=0.15)


def test_exact_scales_beat_baked_ones() -> None:
    shape, experts = moe_shape(128, 256), experts_of(128, 256)
    reference = ReferenceBackend(shape, NUM_EXPERTS, torch.float32, CPU)
    for slot, expert in enumerate(experts):
        reference.write_slot(LAYER, slot, expert)
    case = call(64, 3, 128, seed=12)
    truth_TD = forward(reference, case)
    exact, baked = (
        relative(forward(whole(128, 256, scales), case), truth_TD) for scales in ("exact", "baked")
    )
    assert exact < baked, (exact, baked)


def test_the_demo_model_serves_with_it() -> None:
    """`python -m tests.bench.b12x_accuracy` measures it on more text: W4A4 costs 1.0 % of the perplexity."""
    windows = windows_of(DEMO_MODEL, HELDOUT)[::60]
    w4a16, w4a4 = (perplexity(score(backend, windows)) for backend in ("torch", "b12x-emulated"))
    assert w4a16 < w4a4 < 1.03 * w4a16
