"""The imports that a process needs to compile b12x kernels: they take seconds, so it does them before it is
forked."""

import contextlib
import gc
import os
from pathlib import Path

os.environ["CUTE_DSL_KEEP"] = "ptx,cubin"  # is read when cutlass is imported

import flashinfer.fused_moe.cute_dsl.b12x_moe
import flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch
import flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_w4a16_kernel  # noqa: F401
import torch
import tvm_ffi
from cutlass.cutlass_dsl import CuTeDSL

torch.set_num_threads(1)  # a fork has none of the others, and would wait for them
gc.disable()

with contextlib.suppress(TypeError):
    tvm_ffi.get_global_func(
        "ffi.ArrayGetItem"
    )()  # a process's first complaint reads debug symbols for a second


def compile_for(arch: str, folder: Path, *, sass: bool) -> None:
    """Make the compiler compile for `arch` from now on, and leave PTX, cubins and, which takes half a second
    each, SASS in the folder."""
    settings = CuTeDSL._get_dsl().envar
    settings.arch, settings.dump_dir, settings.keep_sass = arch, str(folder), sass
