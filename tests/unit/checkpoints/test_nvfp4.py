"""NVFP4 numerics, against ModelOpt's own bytes and against compressed-tensors."""

import pytest
import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import NVFP4
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from experts.nvfp4 import dequantize, encode_e2m1, input_scale, pack, quantize, scale_2_of, unpack
from experts.weights import Nvfp4Weight
from tests.support.checkpoints import FIXTURES

MODELOPT = load_file(FIXTURES / "matrices.safetensors")
ALL_BYTES = torch.arange(256, dtype=torch.uint8)
CODES = torch.arange(16, dtype=torch.uint8)

seeds = st.integers(0, 2**32 - 1)
magnitudes = st.floats(-6, 4).map(lambda exponent: 10.0**exponent)


def random_matrix(seed: int, magnitude: float) -> Tensor:
    """Return a matrix [8, 64] with rows of quite different magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(8, 1, generator=generator) + 0.1
    return torch.randn(8, 64, generator=generator) * rows * magnitude


@pytest.mark.parametrize("name", sorted({key.split(".")[0] for key in MODELOPT}))
def test_quantises_to_the_bytes_that_modelopt_writes(name: str) -> None:
    ours = quantize(MODELOPT[f"{name}.source"])
    torch.testing.assert_close(ours.packed, MODELOPT[f"{name}.packed"], rtol=0, atol=0)
    torch.testing.assert_close(ours.scale.view(torch.uint8), MODELOPT[f"{name}.scale"].view(torch.uint8))
    torch.testing.assert_close(ours.scale_2, MODELOPT[f"{name}.scale_2"], rtol=0, atol=0)
    torch.testing.assert_close(
        dequantize(ours, torch.bfloat16), MODELOPT[f"{name}.dequantised"], rtol=0, atol=0
    )


def test_unpacks_every_byte_as_compressed_tensors_does() -> None:
    theirs = unpack_fp4_from_uint8(ALL_BYTES.reshape(1, 256), 1, 512, dtype=torch.float32)
    torch.testing.assert_close(unpack(ALL_BYTES), theirs.flatten(), rtol=0, atol=0)


@given(seeds, magnitudes)
def test_dequantises_as_compressed_tensors_does(seed: int, magnitude: float) -> None:
    weight = quantize(random_matrix(seed, magnitude))
    state = {
        "weight_packed": weight.packed,
        "weight_scale": weight.scale,
        "weight_global_scale": weight.scale_2.reciprocal().reshape(1),
    }
    theirs = NVFP4PackedCompressor.decompress(
        state, QuantizationScheme(targets=["Linear"], weights=NVFP4["weights"])
    )["weight"]
    torch.testing.assert_close(
        dequantize(weight, torch.float32), theirs.float(), rtol=2**-8, atol=0
    )  # theirs is bf16


def test_packs_what_it_unpacked() -> None:
    codes = torch.stack((ALL_BYTES & 15, ALL_BYTES >> 4), dim=1).flatten()
    assert torch.equal(pack(codes), ALL_BYTES)
    without_minus_zero = [byte for byte in ALL_BYTES.tolist() if 8 not in (byte & 15, byte >> 4)]
    packed = torch.tensor(without_minus_zero, dtype=torch.uint8)
    assert torch.equal(pack(encode_e2m1(unpack(packed))), packed)


def test_the_first_element_is_in_the_low_nibble() -> None:
    assert unpack(torch.tensor([0x71], dtype=torch.uint8)).tolist() == [0.5, 6.0]


@given(st.floats(-10, 10, width=32))
def test_encodes_to_the_nearest_value(x: float) -> None:
    values = unpack(pack(CODES))
    code = encode_e2m1(torch.tensor([x]))
    assert (values[code.long()] - x).abs() == (values - x).abs().min()


@pytest.mark.parametrize(
    ("tie", "value"), [(0.25, 0.0), (0.75, 1.0), (1.25, 1.0), (1.75, 2.0), (2.5, 2.0), (3.5, 4.0), (5.0, 4.0)]
)
def test_a_tie_goes_to_the_even_code(tie: float, value: float) -> None:
    code = encode_e2m1(torch.tensor([tie, -tie]))
    assert unpack(pack(code)).tolist() == [value, -value]
    assert code.remainder(2).tolist() == [0, 0]


@given(seeds, magnitudes)
def test_no_element_is_off_by_more_than_its_scale(seed: int, magnitude: float) -> None:
    w = random_matrix(seed, magnitude)
    weight = quantize(w)
    unit = (weight.scale.float() * weight.scale_2).repeat_interleave(16, dim=1)
    assert ((dequantize(weight, torch.float32) - w).abs() <= unit * 1.001).all()


@given(seeds, magnitudes)
def test_quantising_again_changes_nothing(seed: int, magnitude: float) -> None:
    once = quantize(random_matrix(seed, magnitude))
    twice = quantize(dequantize(once, torch.float32), scale_2=once.scale_2)
    assert torch.equal(once.scale.view(torch.uint8), twice.scale.view(torch.uint8))
    assert torch.equal(unpack(once.packed), unpack(twice.packed))  # minus zero becomes zero


def test_matrices_can_share_a_scale_2() -> None:
    gate, up = random_matrix(0, 1.0), random_matrix(1, 0.1)
    shared = scale_2_of(torch.maximum(gate.abs().amax(), up.abs().amax()))
    weight = quantize(up, scale_2=shared)
    assert weight.scale_2 is shared
    assert torch.nn.functional.cosine_similarity(dequantize(weight, torch.float32), up).min() > 0.99


def test_more_than_the_scales_can_say_saturates() -> None:
    weight = quantize(torch.full((1, 16), 1e6), scale_2=torch.tensor(1.0))
    assert dequantize(weight, torch.float32).unique().tolist() == [6 * 448]


def test_a_matrix_of_zeros_stays_zero() -> None:
    weight = quantize(torch.zeros(2, 32))
    assert weight.scale_2 > 0
    assert weight.scale.float().unique().tolist() == [1.0]
    assert not dequantize(weight, torch.float32).any()


def test_dequantises_to_the_dtype_asked_for() -> None:
    weight = Nvfp4Weight(
        ALL_BYTES.reshape(2, 128), torch.ones(2, 16).to(torch.float8_e4m3fn), torch.tensor(0.5)
    )
    for dtype in (torch.float32, torch.bfloat16):
        assert dequantize(weight, dtype).dtype == dtype
        assert dequantize(weight, dtype).shape == (2, 256)


def test_input_scale_is_amax_over_the_range_of_both_formats() -> None:
    assert input_scale(6 * 448).item() == 1.0
    assert input_scale(1.0).dtype == torch.float32


def test_rows_must_be_whole_groups() -> None:
    with pytest.raises(ValueError, match="multiple of 16 elements, got 4 x 24"):
        quantize(torch.zeros(4, 24))
