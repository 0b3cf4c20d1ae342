"""Defaults for the device and the dtype in which a process computes, where the config leaves them open."""

import torch


def default_device() -> torch.device:
    """Return the first GPU, or the CPU if there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(name: str, *, device: torch.device) -> torch.dtype:
    """Return the dtype of this name; `auto` is float32 on a CPU and bfloat16 on a GPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, name)
