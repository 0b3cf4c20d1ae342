"""CPU tensors that say they are on cuda:0, for checks of a compiled kernel's arguments."""

import ctypes
from typing import Any

from torch import Tensor

CUDA = 2


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


def as_cuda(tensor: Tensor) -> Any:
    """Return the tensor as the kernel's checks see it. Its data must not be touched."""
    import tvm_ffi

    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    capsule = tensor.__dlpack__()
    _DlTensor.from_address(pointer(capsule, b"dltensor")).device.type = CUDA
    return tvm_ffi.from_dlpack(_Capsule(capsule))
