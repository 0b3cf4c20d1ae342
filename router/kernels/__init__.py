"""Compiled kernels of the router: numba loops for a CPU, Triton for a GPU."""

from functools import cache
from importlib.util import find_spec

import torch


@cache
def our_kernels_run(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether kernels of ours compute on tensors of this dtype and device; elsewhere torch's operations do."""
    return cpu_loops_run(dtype, device) or (device.type == "cuda" and find_spec("triton") is not None)


@cache
def cpu_loops_run(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the loops of cpu_loops.py compute on tensors of this dtype and device."""
    return dtype == torch.float32 and device.type == "cpu"
