"""The parts of a step on the GPU, from the profiler: microseconds of every part of the model.

A kernel belongs to the part that its name says, or to that in which it stands: of the products only the order tells the gate's.
"""

from collections.abc import Callable, Sequence

import torch
from torch.profiler import ProfilerActivity, profile

NAMES = {
    "experts": ("gate_up", "down", "arrange", "combine"),
    "attention": ("_attend", "_add_parts", "_write_cache", "_rotate_halves", "fmha", "flash"),
    "norms": ("norm",),
    "gate": ("_softmax_top_k",),
    "dispatch": ("_to_local",),
    "products": ("_linear", "gemm", "gemv", "nvjet", "cutlass", "cublas", "splitK"),
}
COPIES = ("memcpy", "copy")


def parts_us(step: Callable[[], object]) -> dict[str, float]:
    """Return microseconds of a step by part, and `kernels`, how many there are.

    Each starts call by call or in a graph.
    """
    step()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    kernels = [event for event in profiled.events() or [] if event.device_type.name == "CUDA"]
    kernels.sort(key=lambda event: event.time_range.start)
    spent: dict[str, float] = {}
    for part, event in zip(parts_of([event.name for event in kernels]), kernels, strict=True):
        spent[part] = spent.get(part, 0.0) + event.device_time
    return spent | {"kernels": float(len(kernels))}


def parts_of(names: Sequence[str]) -> list[str]:
    """Return the parts of the model that a step's kernels belong to, in order.

    inputs: all before the first norm. sampling: all after the last product. dispatch: what stands between gate and
    experts, and the copies behind the experts. other: mostly residuals.
    """
    parts = [_named(name) for name in names]
    stage = ""  # gate or experts, until something else comes
    for n, part in enumerate(parts):
        if part == "gate":
            first = next((m + 1 for m in reversed(range(n)) if parts[m] != "products"), 0)
            parts[first:n] = ["gate"] * (n - first)
        if part in ("gate", "experts"):
            stage = part
        elif part == "other" and (stage == "gate" or (stage == "experts" and _is_copy(names[n]))):
            parts[n] = "dispatch"
        elif part != "dispatch":
            stage = ""
    first_norm = parts.index("norms") if "norms" in parts else 0
    last_product = max((n for n, part in enumerate(parts) if part == "products"), default=len(parts))
    parts[:first_norm] = ["inputs"] * first_norm
    parts[last_product + 1 :] = ["sampling"] * len(parts[last_product + 1 :])
    return parts


def _named(name: str) -> str:
    return next((part for part, words in NAMES.items() if any(word in name for word in words)), "other")


def _is_copy(name: str) -> bool:
    return any(word in name.lower() for word in COPIES)
