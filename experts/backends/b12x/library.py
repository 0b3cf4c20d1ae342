"""The machine and packages that b12x needs, and the few private names of FlashInfer that we touch."""

import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

VERSIONS: dict[str, str | None] = {
    "flashinfer-python": "0.7.2.post1",
    "nvidia-cutlass-dsl": "4.7.1",
    "triton": None,
}
"""The packages that b12x needs, in exactly these versions, since the kernel's host code changes between post-releases; None
is any version. Without triton FlashInfer silently drops b12x from its namespace."""

CUDA = 13
INSTALL = "pip install " + " ".join(
    f"{name}=={version}" if version else name for name, version in VERSIONS.items()
)


@dataclass(frozen=True)
class Machine:
    """The facts about a machine that decide whether b12x runs on it.

    capability: of the device, None for a CPU. cuda: the major version that torch was built for, None without CUDA.
    installed: the versions of the packages in VERSIONS, None for a missing one.
    """

    capability: tuple[int, int] | None
    cuda: int | None
    installed: Mapping[str, str | None]


def machine_of(device: torch.device) -> Machine:
    """Return the facts about this process's machine and device."""
    on_gpu = device.type == "cuda"
    return Machine(
        capability=torch.cuda.get_device_capability(device) if on_gpu else None,
        cuda=int(torch.version.cuda.split(".")[0]) if torch.version.cuda else None,
        installed={name: _installed(name) for name in VERSIONS},
    )


def is_sm12x(machine: Machine) -> bool:
    """Return whether the device is a GPU of SM120 or SM121, for which the b12x kernels are made."""
    return machine.capability is not None and machine.capability[0] == 12


def why_not(machine: Machine) -> str | None:
    """Return one sentence that says why b12x cannot run here and what would help, or None if it can."""
    if machine.capability is None:
        return (
            "backend b12x needs an SM120 or SM121 GPU (RTX PRO 6000, DGX Spark), and this process has no GPU"
        )
    if not is_sm12x(machine):
        major, minor = machine.capability
        return f"backend b12x needs an SM120 or SM121 GPU (RTX PRO 6000, DGX Spark), this one is SM{major}{minor}"
    if machine.cuda is None or machine.cuda < CUDA:
        return (
            f"backend b12x needs CUDA {CUDA} or newer, but torch was built for CUDA {machine.cuda}; "
            f"install a torch of the cu{CUDA}0 index"
        )
    for name, version in VERSIONS.items():
        found = machine.installed.get(name)
        if found is None or version not in (None, found):
            need = f"{name} {version}" if version else name
            return f"backend b12x needs {need}, and {found or 'none'} is installed; run `{INSTALL}`"
    return None


def require(machine: Machine) -> None:
    """Raise ValueError if b12x cannot run here."""
    reason = why_not(machine)
    if reason:
        raise ValueError(reason)


def choose(machine: Machine, *, weights_only: bool) -> str:
    """Return the backend that `auto` stands for. weights_only: the checkpoint is W4A16, so it has no input scales.

    On an SM12x GPU it is b12x or a ValueError: nobody should serve slowly without knowing that a package is missing.
    """
    if machine.capability is None:
        return "cpu"
    if not is_sm12x(machine):
        return "torch"
    require(machine)
    return "b12x-w4a16" if weights_only else "b12x"


def disable_micro() -> None:
    """Keep calls of up to 40 token-expert pairs off FlashInfer's micro kernels, so that the static kernel takes them.

    The MMA micro kernel reads shared memory that other warps wrote, without a barrier (FlashInfer PR 5168), and at one
    token both micro kernels compute absent experts as expert 0 with weight 0, so that a NaN there poisons the row.
    Call it before any wrapper is made: the sizes of workspaces follow from it. It holds for the whole process.
    Raises RuntimeError if this FlashInfer has another name for the limit.
    """
    _set_micro_limit(0)


def enable_micro() -> None:
    """Restore FlashInfer's own choice: micro kernels for up to 8 tokens."""
    _set_micro_limit(8)


def write_output_to(wrapper: Any, out_TD: torch.Tensor) -> None:
    """Have the wrapper's next run write to out_TD, instead of its own buffer, from which we would have to copy.

    Raises RuntimeError if this FlashInfer has another name for its buffer.
    """
    if not hasattr(wrapper, "_moe_output"):
        raise RuntimeError(_gone("B12xMoEWrapper._moe_output"))
    wrapper._moe_output = out_TD


def _set_micro_limit(num_tokens: int) -> None:
    dispatch = _dispatch()
    if not hasattr(dispatch, "_MICRO_MAX_TOKENS"):
        raise RuntimeError(_gone("moe_dispatch._MICRO_MAX_TOKENS"))
    dispatch._MICRO_MAX_TOKENS = num_tokens


def _dispatch() -> Any:
    from flashinfer.fused_moe.cute_dsl.blackwell_sm12x import moe_dispatch

    return moe_dispatch


def _gone(name: str) -> str:
    return f"FlashInfer {_installed('flashinfer-python')} has no {name} any more; sparkmoe knows {VERSIONS['flashinfer-python']}"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
