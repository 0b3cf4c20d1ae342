"""Flags and stop words on the host: 64-bit integers in shared memory, read with acquire and written with release.

Plain loads and stores would do on x86, and fail on the Arm cores of a Spark.
"""

import ctypes
from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

SPINS = 2_000
"""How often a wait looks before it lets other threads of this core run between two looks: some tens of microseconds."""

_sched_yield = ctypes.CDLL(None).sched_yield
_sched_yield.argtypes, _sched_yield.restype = [], ctypes.c_int


@intrinsic
def _load_acquire(typing_context: Any, address: Any) -> Any:
    """Read the int64 at an address; what its writer wrote before is seen by what follows."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def _store_release(typing_context: Any, address: Any, value: Any) -> Any:
    """Write the int64 at an address, after everything that was written before."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store_atomic(arguments[1], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


load_acquire: Any = _load_acquire  # calls of compiled code have no typing context
store_release: Any = _store_release


@njit("int64(int64)", nogil=True)
def read(address: int) -> int:
    """Return the word at an address."""
    return load_acquire(address)


@njit("void(int64, int64)", nogil=True)
def write(address: int, value: int) -> None:
    """Set the word at an address. Only its one writer may."""
    store_release(address, value)


@njit("boolean(int64, int64, int64)", nogil=True)
def wait(flag: int, stop: int, value: int) -> bool:
    """Wait until the flag at this address has the value, or more. Returns False if the stop word has it first."""
    looks = 0
    while load_acquire(flag) < value:
        if load_acquire(stop) >= value:
            return False
        looks += 1
        if looks > SPINS:
            _sched_yield()
    return True


class StopWord:
    """The stop word of this process for one link; any thread may raise it. address: where kernels and waits look."""

    def __init__(self, *, pinned: bool) -> None:
        """pinned: let a GPU see it, too."""
        with torch.inference_mode(False):
            self._word = torch.zeros(16, dtype=torch.int64, pin_memory=pinned)  # a cache line of its own
        self.address = self._word.data_ptr()

    @property
    def value(self) -> int:
        """The highest value that counts as stopped."""
        return read(self.address)

    def raise_to(self, value: int) -> None:
        """Stop everything at or below a value. It never falls."""
        if value > self.value:
            write(self.address, value)
