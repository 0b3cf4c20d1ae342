"""One call of backend b12x, through FlashInfer's host code, to the compiled kernel's own check of its arguments.

    python -m tests.b12x_contract --experts 128 --hidden 2048 --intermediate 768 --top-k 8 --ranks 2 --tokens 16

No GPU: CPU tensors go by as CUDA ones. A kernel that accepts its arguments asks for the driver, and there is none:
that is the success, and the only way to see it. Prints one JSON line, with what is in the PTX and the cubin. A process
per call, because the library's next one would wait for ever. Placement is even; the rank with most experts is called.
"""

import argparse
import ctypes
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experts.backends.b12x import B12xBackend
from experts.weights import MoEShape
from tests.b12x_on_cpu import pretend_sm12x

ACCEPTED = "accepted"
FP4_MMA = "mma.sync.aligned.kind::mxf4nvf4.block_scale.scale_vec::4X.m16n8k64.row.col.f32.e2m1.e2m1.f32.ue4m3"
_REGCOUNT, _FRAME_SIZE = 0x2F, 0x11


class _Device(ctypes.Structure):
    _fields_ = (("type", ctypes.c_int), ("index", ctypes.c_int))


class _DlTensor(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("device", _Device))


class _Capsule:
    """A DLPack capsule that says where its tensor is."""

    def __init__(self, capsule: Any) -> None:
        self._capsule = capsule

    def __dlpack__(self, **_: Any) -> Any:
        return self._capsule

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0


CUDA = 2


def as_cuda(tensor: Tensor) -> Any:
    """The tensor as the kernel's checks see it, on device cuda:0. Its data must not be touched."""
    import tvm_ffi

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = tensor.__dlpack__()
    _DlTensor.from_address(pointer(capsule, b"dltensor")).device.type = CUDA
    return tvm_ffi.from_dlpack(_Capsule(capsule))


def call(shape: MoEShape, *, num_slots: int, top_k: int, num_tokens: int, arch: str) -> dict[str, Any]:
    """What happened: kernel, seconds, and `accepted` or what the kernel complained of."""
    dispatch = pretend_sm12x(setattr, arch=arch)
    kernels: list[str] = []
    seconds: list[float] = []

    def compile_kernel(
        _module: str, name: str, make: Callable[[], Any], extra_key_files: Any = ()
    ) -> Callable[..., Any]:
        started = time.monotonic()
        compiled = make()
        kernels.append(name)
        seconds.append(round(time.monotonic() - started, 1))
        return lambda *args: compiled(*(as_cuda(arg) if isinstance(arg, Tensor) else arg for arg in args))

    dispatch.build_and_load_cute_dsl_kernel = compile_kernel
    backend = B12xBackend(shape, num_slots, torch.bfloat16, torch.device("cpu"))
    x_TD = torch.zeros(num_tokens, shape.hidden, dtype=torch.bfloat16)
    ids_TK = torch.arange(num_tokens * top_k, dtype=torch.int32).view(num_tokens, top_k) % num_slots
    w_TK = torch.zeros(num_tokens, top_k)
    try:
        backend.forward(shape.moe_layers[0], x_TD, ids_TK, w_TK, out_TD=torch.empty_like(x_TD))
        verdict = "returned, which only a GPU can explain"
    except RuntimeError as error:
        missing_driver = "cudaErrorInsufficientDriver" in str(error) or "cuInit" in str(error)
        verdict = ACCEPTED if missing_driver else f"RuntimeError: {error}"
    except (TypeError, ValueError) as error:
        verdict = f"{type(error).__name__}: {error}"
    return {"verdict": verdict, "kernel": kernels[-1] if kernels else None, "seconds": sum(seconds)}


def facts_of_ptx(ptx: str) -> dict[str, Any]:
    """mma: how many block-scaled FP4 tensor-core instructions."""
    target = re.search(r"\.target (\w+)", ptx)
    return {"target": target[1] if target else None, "mma": ptx.count(FP4_MMA)}


def facts_of_cubin(cubin: bytes) -> dict[str, int]:
    """Of the largest kernel. stack: bytes, of which spilled registers are a part; so 0 means that none spilled.

    Attributes of .nv.info: format 4, a code, size 8, then the symbol and the value as 32-bit numbers.
    """

    def largest(code: int) -> int:
        found = re.finditer(rb"\x04" + re.escape(bytes([code])) + rb"\x08\x00....(....)", cubin, re.DOTALL)
        return max((int.from_bytes(one[1], "little") for one in found if one[1][2:] == b"\0\0"), default=0)

    return {"registers": largest(_REGCOUNT), "stack": largest(_FRAME_SIZE)}


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("experts", "hidden", "intermediate", "top-k", "ranks", "tokens"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--arch", default="sm_121a")
    options = parser.parse_args()
    shape = MoEShape(1, (0,), options.experts, options.hidden, options.intermediate)
    num_slots = math.ceil(options.experts / options.ranks)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {
            "CUTE_DSL_ARCH": options.arch,
            "CUTE_DSL_KEEP": "ptx,cubin",
            "CUTE_DSL_DUMP_DIR": folder,
        }
        result = call(
            shape, num_slots=num_slots, top_k=options.top_k, num_tokens=options.tokens, arch=options.arch
        )
        for ptx in Path(folder).rglob("*.ptx"):
            result |= facts_of_ptx(ptx.read_text())
        for cubin in Path(folder).rglob("*.cubin"):
            result |= facts_of_cubin(cubin.read_bytes())
    sys.stdout.write(json.dumps(result) + "\n")
    sys.stdout.flush()
    os._exit(0)  # the module that could not be loaded keeps a thread of tvm-ffi busy


if __name__ == "__main__":
    main()
