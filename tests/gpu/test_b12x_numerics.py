"""FP4 activations and the scales' layout of backend `b12x-emulated` beside FlashInfer's own kernels.

From SM100 on that is `flashinfer.fp4_quantize` as it is. For SM90 its kernel is compiled to nothing and returns what was
in the memory: there it is built once more from FlashInfer's sources, with the guards lifted and, in place of the instruction that
rounds to E2M1, CUDA's own function for GPUs without it (cuda_fp4.h). All else is FlashInfer's, rcp.approx included. Compiling
takes nvcc and minutes.

R rows, K elements of a row, G = K / 16 blocks.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from experts.backends.b12x import layout, numerics
from experts.nvfp4 import GROUP, encode_e2m1, pack

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(1800)]

flashinfer = pytest.importorskip("flashinfer")

GPU = torch.device("cuda")
SIZES = [
    (1, 64),
    (3, 128),
    (37, 768),
    (128, 2048),
    (129, 1536),
    (300, 4096),
    (1024, 512),
    (1025, 7168),
    (5, 80),
]
SCALES = [1.0, 2.0**-6, 0.00372, 1.7e-5, 117.0]


class Fp4(NamedTuple):
    """A matrix in FP4. packed: uint8 [R, K / 2]; scale: e4m3 bits as uint8, [R, G] or swizzled and flat."""

    packed: Tensor
    scale: Tensor


@pytest.fixture(scope="module", autouse=True)
def kernel_runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Return whether flashinfer.fp4_quantize works on this GPU."""
    from flashinfer.quantization import fp4_quantization

    capability = torch.cuda.get_device_capability()
    if capability < (9, 0):
        pytest.skip("FlashInfer quantises on SM90 and newer")
    with pytest.MonkeyPatch.context() as patch:
        if capability < (10, 0):
            spec = lifted_spec(tmp_path_factory.mktemp("csrc"))
            patch.setattr(fp4_quantization, "gen_fp4_quantization_sm90_module", lambda: spec)
            fp4_quantization.get_fp4_quantization_module.cache_clear()
        yield
        fp4_quantization.get_fp4_quantization_module.cache_clear()


def lifted_spec(csrc: Path) -> Any:
    """Return the spec that builds FlashInfer's quantisation for SM90 from sources in this folder."""
    from flashinfer.jit import env
    from flashinfer.jit.core import sm90a_nvcc_flags
    from flashinfer.quantization.fp4_quantization import gen_fp4_quantization_module

    shutil.copytree(env.FLASHINFER_CSRC_DIR / "nv_internal", csrc / "nv_internal", dirs_exist_ok=True)
    shutil.copyfile(env.FLASHINFER_CSRC_DIR / "tvm_ffi_utils.h", csrc / "tvm_ffi_utils.h")
    for name in ("quantization.cuh", "quantization_utils.cuh"):
        file = csrc / "nv_internal" / "tensorrt_llm" / "kernels" / name
        file.write_text(lifted(file.read_text()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(env, "FLASHINFER_CSRC_DIR", csrc)
        return gen_fp4_quantization_module(sm90a_nvcc_flags, "90_lifted")


def lifted(source: str) -> str:
    """Return the source with guards of SM100 lowered to SM90, but before the conversions from E2M1, which are
    not used here."""
    source = re.sub(r"\(__CUDA_ARCH__ >= 1000\)(?!\n  asm)", "(__CUDA_ARCH__ >= 900)", source)
    rounding = r'asm volatile\(\s*"\{\\n"\s*"\.reg \.b8 byte0;.*?\);\n  return val;'
    return re.sub(rounding, _ROUNDING, source, flags=re.DOTALL).replace(
        "#pragma once", "#pragma once\n#include <cuda_fp4.h>", 1
    )


_ROUNDING = """for (int i = 0; i < int(sizeof(val)); ++i) {
    float2 pair = reinterpret_cast<float2 const*>(&array)[i];
    reinterpret_cast<uint8_t*>(&val)[i] = __nv_cvt_float2_to_fp4x2(pair, __NV_E2M1, cudaRoundNearest);
  }
  return val;"""


def theirs(x_RK: Tensor, scale: float, *, swizzled: bool) -> Fp4:
    """Quantise with FlashInfer, which takes the multiplier's reciprocal."""
    inverse = torch.tensor([scale], device=GPU).reciprocal()
    return Fp4(*flashinfer.fp4_quantize(x_RK, inverse, is_sf_swizzled_layout=swizzled))


def ours(x_RK: Tensor, scale: float) -> Fp4:
    value_RGi, block_RG = numerics.to_fp4(x_RK.float(), torch.full((len(x_RK),), scale, device=GPU))
    code_RK = (encode_e2m1(value_RGi) | value_RGi.signbit().to(torch.uint8) << 3).flatten(1)
    return Fp4(pack(code_RK), block_RG.to(torch.float8_e4m3fn).view(torch.uint8))


def inputs(kind: str, num_rows: int, num_cols: int, scale: float) -> Tensor:
    """Return random bfloat16 inputs [R, K]."""
    x_RK = torch.randn(num_rows, num_cols, device=GPU) * 100 * scale
    if kind == "outliers":  # some blocks saturate, others vanish
        x_RK *= 10 ** torch.empty(num_rows, num_cols // GROUP, 1, device=GPU).uniform_(-7, 4).expand(
            -1, -1, GROUP
        ).flatten(1)
    if kind == "zeros":
        x_RK.masked_fill_(torch.rand_like(x_RK) < 0.9, 0.0)
        x_RK[::2] = 0
    return x_RK.bfloat16()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", ["plain", "outliers", "zeros"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bytes_are_flashinfers(size: tuple[int, int], kind: str, scale: float) -> None:
    x_RK = inputs(kind, *size, scale)
    found, expected = ours(x_RK, scale), theirs(x_RK, scale, swizzled=False)
    assert torch.equal(found.scale, expected.scale)
    used_RG1 = found.scale.unsqueeze(-1) != 0  # a block whose scale is zero is zero, whatever its codes
    found_RGi, expected_RGi = (
        each.packed.unflatten(1, (-1, GROUP // 2)).where(used_RG1, 0) for each in (found, expected)
    )
    assert torch.equal(found_RGi, expected_RGi)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_scales_lie_where_flashinfer_puts_them(size: tuple[int, int]) -> None:
    x_RK = inputs("plain", *size, 1.0)
    rows, swizzled = (theirs(x_RK, 1.0, swizzled=each) for each in (False, True))
    assert torch.equal(rows.packed, swizzled.packed)
    storage = layout.scale_storage(1, -(-size[0] // 128) * 128, -(-size[1] // 64) * 64, GPU)
    layout.swizzle_into(storage[0], rows.scale.view(torch.float8_e4m3fn))
    assert torch.equal(storage.view(torch.uint8).flatten(), swizzled.scale.flatten())
    interleaved = flashinfer.block_scale_interleave(rows.scale)
    assert torch.equal(storage.view(torch.uint8).flatten(), interleaved.flatten())
