"""Weights in the kernel's memory: against FlashInfer's own layout functions, and read back.

e slots, D hidden, I intermediate, N rows, G groups of 16.
"""

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.backends.b12x.layout import (
    UNCALIBRATED_SCALE,
    _warn_of_no_input_scale,
    mma_view,
    padded_intermediate,
    prepare,
    scale_storage,
    swizzle_into,
    unswizzle,
)
from experts.backends.b12x.weights import B12xWeights
from experts.nvfp4 import dequantize, quantize, scale_2_of
from experts.weights import ExpertWeights, MoEShape, Nvfp4Weight
from tests.support.memory import peak_of_tensors

CPU = torch.device("cpu")


def moe_shape(hidden: int, intermediate: int) -> MoEShape:
    return MoEShape(num_layers=1, moe_layers=(0,), num_experts=4, hidden=hidden, intermediate=intermediate)


def random_expert(shape: MoEShape, seed: int, *, up_scale: float = 1.0) -> ExpertWeights:
    """Draw an expert. up_scale: of up's weights, so that its scale_2 differs from gate's."""
    generator = torch.Generator().manual_seed(seed)
    gate, up, down = (
        quantize(torch.randn(rows, cols, generator=generator) * std)
        for rows, cols, std in (
            (shape.intermediate, shape.hidden, 0.02),
            (shape.intermediate, shape.hidden, 0.02 * up_scale),
            (shape.hidden, shape.intermediate, 0.02),
        )
    )
    return ExpertWeights(gate, up, down, scale_2_of(torch.tensor(5.0)), scale_2_of(torch.tensor(0.3 + seed)))


def random_scales(rows: int, groups: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(127, (rows, groups), dtype=torch.uint8, generator=generator).view(
        torch.float8_e4m3fn
    )


def assert_same_bytes(ours: Tensor, theirs: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    assert torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("rows", "cols"), [(128, 64), (256, 128), (1536, 2048), (2048, 768), (5120, 1536)])
def test_swizzle_and_view_are_those_of_flashinfer(rows: int, cols: int) -> None:
    utils = importlib.import_module("flashinfer.cute_dsl.utils")
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_w4a16_fp4_helpers import swizzle_block_scale

    scale_eNG = torch.stack([random_scales(rows, cols // 16, seed).view(torch.uint8) for seed in range(3)])
    theirs = swizzle_block_scale(scale_eNG).reshape(3 * rows, cols // 16).view(torch.float8_e4m3fn)
    storage = scale_storage(3, rows, cols, CPU)
    for slot, scale_NG in enumerate(scale_eNG.view(torch.float8_e4m3fn)):
        swizzle_into(storage[slot], scale_NG)
    assert_same_bytes(storage.flatten(), theirs.flatten())
    theirs_6d = utils.convert_sf_to_mma_layout(theirs, rows, cols, 3, 16)
    assert mma_view(storage).shape == theirs_6d.shape
    assert mma_view(storage).stride() == theirs_6d.stride()
    assert_same_bytes(mma_view(storage), theirs_6d)


@settings(max_examples=30)
@given(st.integers(1, 3), st.integers(1, 4), st.data())
def test_every_scale_is_where_the_layout_says(row_tiles: int, col_tiles: int, data: st.DataObject) -> None:
    rows, groups = data.draw(st.integers(1, 128 * row_tiles)), data.draw(st.integers(1, 4 * col_tiles))
    scale_NG = random_scales(rows, groups)
    storage = scale_storage(1, 128 * row_tiles, 64 * col_tiles, CPU)[0]
    storage.view(torch.uint8).fill_(0xFF)
    swizzle_into(storage, scale_NG)
    r, g = data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, groups - 1))
    at = storage.view(torch.uint8)[r // 128, g // 4, r % 32, r % 128 // 32, g % 4]
    assert at == scale_NG.view(torch.uint8)[r, g]
    back = unswizzle(storage).view(torch.uint8)
    assert torch.equal(back[:rows, :groups], scale_NG.view(torch.uint8))
    assert back.sum(dtype=torch.int64) == scale_NG.view(torch.uint8).sum(dtype=torch.int64), "padding is zero"


@settings(max_examples=25)
@given(
    hidden=st.sampled_from([128, 256]),
    intermediate=st.integers(1, 40).map(lambda n: 16 * n),
    up_scale=st.sampled_from([1.0, 0.1, 3.0]),
    order=st.permutations(range(3)),
)
def test_what_is_read_back_is_the_checkpoint(
    hidden: int, intermediate: int, up_scale: float, order: list[int]
) -> None:
    shape = moe_shape(hidden, intermediate)
    prepared = B12xWeights(shape, 3, CPU, scales="exact")
    for slot in order:
        prepared.write_slot(slot, random_expert(shape, seed=slot + 7, up_scale=up_scale))
    for slot in range(3):
        prepared.write_slot(slot, random_expert(shape, seed=slot, up_scale=up_scale))
    for slot in range(3):
        theirs, ours = random_expert(shape, seed=slot, up_scale=up_scale), prepared.read_slot(slot)
        up, gate = ours.w13_packed.chunk(2)
        up_scales, gate_scales = ours.w13_scale.view(torch.uint8).chunk(2)
        for one, other in ((up, theirs.up), (gate, theirs.gate), (ours.w2_packed, theirs.down)):
            assert_same_bytes(one, other.packed)
        for one, other in (
            (up_scales, theirs.up),
            (gate_scales, theirs.gate),
            (ours.w2_scale.view(torch.uint8), theirs.down),
        ):
            assert_same_bytes(one, other.scale.view(torch.uint8))
        assert ours.w13_alpha == theirs.gate.scale_2
        assert ours.input_scale == theirs.input_scale


def test_padding_is_zero() -> None:
    shape = moe_shape(128, 48)
    prepared = B12xWeights(shape, 1, CPU, scales="exact")
    prepared.write_slot(0, random_expert(shape, 0))
    assert padded_intermediate(48) == 256
    assert not prepared.w13[0, 48:256].any()
    assert not prepared.w13[0, 256 + 48 :].any()
    assert not prepared.w2[0, :, 24:].any()


def test_multipliers_are_those_of_a_modelopt_checkpoint() -> None:
    expert = random_expert(moe_shape(128, 256), 0)
    expert = replace(expert, up=replace(expert.up, scale_2=expert.gate.scale_2))
    new = prepare(expert, "exact")
    assert expert.input_scale is not None
    assert expert.down_input_scale is not None
    assert new.w13_alpha == expert.gate.scale_2
    assert new.input_scale == expert.input_scale
    assert new.fc2_input_scale == expert.down_input_scale
    assert new.w2_alpha == expert.down.scale_2 * expert.down_input_scale


def test_an_uncalibrated_expert_gets_the_stated_scales_and_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _warn_of_no_input_scale.cache_clear()
    expert = replace(random_expert(moe_shape(128, 256), 0), input_scale=None, down_input_scale=None)
    expert = replace(expert, up=replace(expert.up, scale_2=expert.gate.scale_2))
    new = prepare(expert, "exact")
    assert new.input_scale == new.fc2_input_scale == UNCALIBRATED_SCALE
    assert new.w2_alpha == expert.down.scale_2 * UNCALIBRATED_SCALE
    assert ["b12x-w4a16 needs none" in record.message for record in caplog.records] == [True]


def test_weights_only_needs_no_input_scales() -> None:
    expert = random_expert(moe_shape(128, 256), 0, up_scale=2.0)
    new = prepare(expert, "exact", weights_only=True)
    assert new.input_scale == new.fc2_input_scale == 1
    torch.testing.assert_close(new.w2_alpha, expert.down.scale_2 * expert.up.scale_2 / expert.gate.scale_2)


def test_baked_scales_are_the_product_rounded_to_e4m3() -> None:
    expert = random_expert(moe_shape(128, 256), 0, up_scale=2.0)
    new = prepare(expert, "baked")
    up_scale, gate_scale = new.w13_scale.view(torch.uint8).chunk(2)
    for ours, theirs in ((up_scale, expert.up), (gate_scale, expert.gate)):
        product = (theirs.scale.float() * theirs.scale_2).to(torch.float8_e4m3fn)
        assert_same_bytes(ours, product.view(torch.uint8))
    for one in (new.w13_alpha, new.w2_alpha, new.input_scale, new.fc2_input_scale):
        assert one == 1


def test_baking_loses_what_exact_keeps() -> None:
    """The 8.7 % that vLLM's convention costs weights of standard deviation 0.02."""
    matrix = quantize(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)) * 0.02)
    expert = ExpertWeights(matrix, matrix, matrix, None, None)
    baked = prepare(expert, "baked")
    truth = dequantize(matrix, torch.float32)
    error = (
        dequantize(Nvfp4Weight(baked.w2_packed, baked.w2_scale, baked.w2_alpha), torch.float32) - truth
    ).norm()
    assert 0.05 < error / truth.norm() < 0.15


def test_slots_are_written_in_place() -> None:
    shape = moe_shape(128, 256)
    prepared = B12xWeights(shape, 2, CPU, scales="exact")
    tensors = {name: value for name, value in vars(prepared).items() if isinstance(value, Tensor)}
    before = {name: value.data_ptr() for name, value in tensors.items()}
    assert {"w13", "w2", "w13_scale", "w2_scale", "w13_alpha", "w2_alpha", "input_scale"} <= before.keys()
    with torch.inference_mode():
        prepared.write_slot(1, random_expert(shape, 1))
    assert {name: getattr(prepared, name).data_ptr() for name in before} == before
    assert not any(value.is_inference() for value in tensors.values())
    assert not prepared.w13[0].any(), "only that slot"


def test_there_is_no_second_copy_of_the_weights() -> None:
    shape, num_slots = moe_shape(1024, 768), 16
    expert = random_expert(shape, 0)
    one = (shape.hidden * shape.intermediate * 3) * 9 // 16  # bytes: a code is half of one, a scale 1/16

    def load() -> B12xWeights:
        prepared = B12xWeights(shape, num_slots, CPU, scales="exact")
        for slot in range(num_slots):
            prepared.write_slot(slot, expert)
        return prepared

    prepared, peak = peak_of_tensors(load)
    assert prepared.w13.shape[0] == num_slots
    assert num_slots * one < peak < (num_slots + 1.1) * one, "the weights, and one expert on its way"


@pytest.mark.parametrize(
    ("hidden", "intermediate", "complaint"),
    [(2000, 768, "multiple of 128, the model's is 2000"), (2048, 100, "multiple of 16, the model's is 100")],
)
def test_refuses_sizes_that_no_padding_helps(hidden: int, intermediate: int, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        B12xWeights(moe_shape(hidden, intermediate), 1, CPU, scales="exact")
