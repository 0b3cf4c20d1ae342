"""FlashInfer's b12x host code on a machine without a GPU.

pretend_sm12x() makes the library believe in one, pretend_w4a16() its kernels for bfloat16 activations, too. The kernels
are replaced, either by a recorder of what would be launched, or (tests/support/b12x_contract.py) by the real compiled kernels up
to the point where they need a driver.
"""

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

Patch = Callable[[Any, str, Any], None]
"""A function that sets an attribute: setattr, or a monkeypatch's."""

NUM_SMS = {"sm_121a": 48, "sm_120a": 188}
"""How many SMs a DGX Spark has, and an RTX PRO 6000. FlashInfer chooses kernels by it."""


SHARED_MEMORY, SHARED_MEMORY_OF_SM = 101_376, 102_400
"""How many bytes of shared memory a block may have on an SM12x, and all blocks of an SM."""


class _Cuda13:
    major = 13


def pretend_sm12x(patch: Patch, *, arch: str = "sm_121a") -> Any:
    """Make FlashInfer believe in an SM12x and return its moe_dispatch module.

    Kernels compile for arch if nothing has imported cutlass yet.
    """
    num_sms = NUM_SMS[arch]
    os.environ.setdefault("CUTE_DSL_ARCH", arch)
    os.environ.setdefault("FLASHINFER_CUTE_DSL_DISABLE_CACHE", "1")
    import torch
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x import moe_dispatch, moe_w4a16_prepare
    from flashinfer.jit import cpp_ext

    patch(cpp_ext, "get_cuda_version", _Cuda13)
    patch(moe_dispatch, "get_num_sm", lambda _device: num_sms)
    patch(moe_dispatch, "get_max_active_clusters", lambda _size: num_sms)
    patch(moe_dispatch, "_canonical_cuda_device", torch.device)
    patch(moe_dispatch, "_MICRO_MAX_TOKENS", moe_dispatch._MICRO_MAX_TOKENS)  # so that it is set back
    patch(
        moe_w4a16_prepare,
        "_make_workspace",
        lambda device, **_: torch.zeros(4 * num_sms + 2, dtype=torch.int32),
    )
    return moe_dispatch


def pretend_w4a16(patch: Patch, compile_kernel: Callable[..., Any], *, arch: str) -> None:
    """Make the kernels for bfloat16 activations believe in a GPU, too; pretend_sm12x() comes first. compile_kernel: in the place of cute.compile. Triton's kernels, which sort the routes, do
    nothing.
    """
    import torch
    from cuda.bindings.driver import CUdevice_attribute, CUstream
    from cutlass.base_dsl.runtime import cuda
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x import moe_w4a16_kernel
    from triton.runtime.jit import JITFunction

    device = SimpleNamespace(multi_processor_count=NUM_SMS[arch], shared_memory_per_block_optin=SHARED_MEMORY)
    attributes = {
        CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: SHARED_MEMORY_OF_SM
    }
    patch(moe_w4a16_kernel, "cached_compile", compile_kernel)
    patch(moe_w4a16_kernel, "current_cuda_stream", lambda: CUstream(0))
    patch(cuda, "get_device_attribute", attributes.__getitem__)
    patch(torch.cuda, "get_device_properties", lambda _device: device)
    patch(torch.cuda, "is_current_stream_capturing", lambda: False)
    patch(torch.Tensor, "is_cuda", property(lambda _: True))
    patch(JITFunction, "run", lambda *_, **__: None)


class Recorder:
    """A stand-in for the compiler. launches: (kernel's name, the arguments that it would be called with)."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, tuple[Any, ...]]] = []
        self.compiled: list[str] = []

    def compile(self, _module: str, name: str, _make: Callable[[], Any], **_: Any) -> Callable[..., None]:
        self.compiled.append(name)
        return lambda *args: self.launches.append((name, args))
