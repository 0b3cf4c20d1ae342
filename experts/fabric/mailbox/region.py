"""Region: sealed shared memory that two processes of a host map, and what lies where in an outbox and an inbox.

T rows, D hidden, K top-k.
"""

import fcntl
import mmap
import os
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from experts.fabric import FabricError

LINE_BYTES = 128
"""The alignment of everything in a region: no less than a cache line of any host, and a multiple of 16 for wide loads."""

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass(frozen=True)
class LaneShape:
    """The sizes that both ends of a lane have agreed on. rows: the most of one step. dtype: that of x and partial sums."""

    rows: int
    hidden: int
    top_k: int
    dtype: torch.dtype

    @property
    def x_offset(self) -> int:
        """Bytes from the beginning of an outbox to x, and of an inbox to the partial sums."""
        return LINE_BYTES

    @property
    def ids_offset(self) -> int:
        """Bytes from the beginning of an outbox to the physical ids."""
        return self.x_offset + _lines(self.rows * self.hidden * self.dtype.itemsize)

    @property
    def weights_offset(self) -> int:
        """Bytes from the beginning of an outbox to the weights."""
        return self.ids_offset + _lines(4 * self.rows * self.top_k)

    @property
    def outbox_bytes(self) -> int:
        """The size of an outbox."""
        return self.weights_offset + _lines(4 * self.rows * self.top_k)

    @property
    def inbox_bytes(self) -> int:
        """The size of an inbox."""
        return self.ids_offset


class Region:
    """A mapping of sealed shared memory. address: of its first byte in this process. bytes: uint8, all of it.

    The memory stays mapped as long as `bytes` or a view of it lives; `close` ends what a GPU knows of it.
    """

    def __init__(self, fd: int, num_bytes: int) -> None:
        """Map the memory behind a descriptor, which becomes this object's own."""
        self.fd = fd
        self._registered = False
        with torch.inference_mode(False):  # an inference tensor could not be written outside that mode
            self.bytes = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
        self.address = self.bytes.data_ptr()

    @classmethod
    def create(cls, num_bytes: int) -> Self:
        """Make a region of zeros whose size no process can change."""
        fd = os.memfd_create("sparkmoe-mailbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, num_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            return cls(fd, num_bytes)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def map(cls, fd: int, num_bytes: int) -> Self:
        """Map a region that a peer made, from a descriptor that becomes this object's own.

        Raises FabricError, and closes the descriptor, unless it is sealed memory of just this size: a peer that could
        truncate it could end this process with SIGBUS.
        """
        try:
            seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
            size = os.fstat(fd).st_size
            if size != num_bytes or seals & _SEALS != _SEALS:
                raise FabricError(f"not a sealed region of {num_bytes} bytes: {size} bytes, seals {seals:#x}")
            return cls(fd, num_bytes)
        except OSError as error:
            os.close(fd)
            raise FabricError(f"not a region: {error.strerror}") from error
        except BaseException:
            os.close(fd)
            raise

    def register(self) -> None:
        """Let kernels of this process's GPU read and write the region at its own address. Raises FabricError."""
        runtime: Any = torch.cuda.cudart()
        error = int(runtime.cudaHostRegister(self.address, len(self.bytes), _PORTABLE_AND_MAPPED))
        if error:
            raise FabricError(f"CUDA cannot map a region of {len(self.bytes)} bytes: error {error}")
        self._registered = True

    def close(self) -> None:
        """Take the region from the GPU, whose work on it must have ended, and close the descriptor. Idempotent."""
        if self._registered:
            self._registered = False
            runtime: Any = torch.cuda.cudart()
            runtime.cudaHostUnregister(self.address)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def tensor(self, offset: int, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """Return a [rows, columns] view that begins `offset` bytes into the region."""
        return self.bytes[offset : offset + rows * columns * dtype.itemsize].view(dtype).view(rows, columns)


_PORTABLE_AND_MAPPED = 3  # cudaHostRegisterPortable | cudaHostRegisterMapped


def _lines(num_bytes: int) -> int:
    """Return the size rounded up to whole lines."""
    return -(-num_bytes // LINE_BYTES) * LINE_BYTES
