"""KVCache: the tensors of keys and values, by slot, and how much memory they get. See block_tables.py for who holds what.

S slots (num_blocks * block_size), G KV heads, D head dim.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from router.cache.fp8 import E4M3
from router.config import KVCacheConfig
from router.model_config import TrunkShape

MEMINFO = Path("/proc/meminfo")

HOST_BYTES = 8 * 2**30
"""The memory of a machine with unified memory that is nobody's: operating system, Ray, page tables."""


class LayerCache(NamedTuple):
    """Views of one layer's keys and values.

    scale_SG2: float32, the multipliers of each slot's and head's key and value in an FP8 cache; None in others.
    """

    k_SGD: Tensor
    v_SGD: Tensor
    scale_SG2: Tensor | None


class KVCache:
    """Keys and values of all layers: k[layer] and v[layer] are [S, G, D], scales[layer] of an FP8 cache [S, G, 2]."""

    def __init__(
        self, shape: TrunkShape, *, num_slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Allocate the tensors. dtype: that of the stored keys and values, see stored_dtype."""
        size = (shape.num_layers, num_slots, shape.num_kv_heads, shape.head_dim)
        self.k = torch.zeros(
            size, dtype=dtype, device=device
        )  # zeros: slots that a mask hides must be finite
        self.v = torch.zeros(size, dtype=dtype, device=device)
        self.scales: Tensor | None = None
        if dtype == E4M3:
            self.scales = torch.zeros(*size[:3], 2, dtype=torch.float32, device=device)

    def layer(self, layer: int) -> LayerCache:
        """Return views of one layer."""
        return LayerCache(self.k[layer], self.v[layer], None if self.scales is None else self.scales[layer])

    def erase(self, slots: np.ndarray) -> None:
        """Write zeros into these slots of every layer."""
        if len(slots) == 0:
            return
        index = torch.from_numpy(slots).to(self.k.device)
        for tensor in (self.k, self.v) if self.scales is None else (self.k, self.v, self.scales):
            tensor[:, index] = 0


def memory_for(config: KVCacheConfig, *, device: torch.device, set_aside: int = 0) -> int:
    """Return the bytes for keys and values, once the trunk is loaded.

    set_aside: the bytes that a shard on this device takes, or will take.
    """
    if config.memory_gib != "auto":
        return int(config.memory_gib * 2**30)
    if device.type == "cpu":
        available = mem_available(MEMINFO.read_text())
        return min(available // 4, 4 * 2**30)  # the experts, and other processes, need memory too
    free, total = torch.cuda.mem_get_info(device)
    if torch.cuda.get_device_properties(device).is_integrated:
        free, total = of_unified_memory(total, available=mem_available(MEMINFO.read_text()))
    return left_over(free, total, own=torch.cuda.memory_allocated(device), set_aside=set_aside)


def of_unified_memory(total: int, *, available: int) -> tuple[int, int]:
    """Return the bytes that a GPU which shares the host's memory has free, and in all.

    What CUDA calls free there is the kernel's MemFree, which counts the page cache as used: it would depend on what was
    read before. MemAvailable does not. HOST_BYTES are left to the host, which else stands still without an OOM kill.
    total: as CUDA says. available: the kernel's MemAvailable.
    """
    return max(0, min(available, total) - HOST_BYTES), max(0, total - HOST_BYTES)


def mem_available(meminfo: str) -> int:
    """Return the bytes that processes can have without swapping: MemAvailable of /proc/meminfo.

    MemFree would leave out the page cache, which the kernel gives up for them.
    """
    line = next(line for line in meminfo.splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def left_over(free: int, total: int, *, own: int, set_aside: int) -> int:
    """Return the bytes of a GPU that neither others hold nor a shard will want, less a tenth for activations.

    The shard may have loaded already or not, so what it takes is not simply missing from `free`.
    """
    return max(0, min(free * 9 // 10, total * 9 // 10 - own - set_aside))


def stored_dtype(config: KVCacheConfig, *, dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype of keys and values in the cache. dtype: the trunk's. Raises ValueError where the GPU cannot do it."""
    if config.dtype == "auto":
        return dtype
    if device.type == "cuda" and (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        raise ValueError(
            f"router.kv_cache.dtype={config.dtype} needs a GPU of SM89 or newer; {torch.cuda.get_device_name(device)} "
            f"is SM{capability[0]}{capability[1]}: set it to auto"
        )
    return E4M3


def num_blocks_for(shape: TrunkShape, num_bytes: int, *, block_size: int, dtype: torch.dtype) -> int:
    """Return how many blocks of keys and values in this dtype fit into num_bytes. Raises ValueError if none does."""
    bytes_per_vector = shape.head_dim * dtype.itemsize + (4 if dtype == E4M3 else 0)  # a float32 scale
    bytes_per_token = 2 * shape.num_layers * shape.num_kv_heads * bytes_per_vector
    num_blocks = num_bytes // (bytes_per_token * block_size)
    if num_blocks == 0:
        raise ValueError(
            f"router.kv_cache: {num_bytes / 2**30:.2g} GiB hold no block of "
            f"{block_size} tokens of {bytes_per_token} bytes each; set router.kv_cache.memory_gib"
        )
    return num_blocks
