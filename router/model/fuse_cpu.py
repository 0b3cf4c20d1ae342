"""Norms and rotary embeddings of transformers' modelling code in one call where theirs are many. Modules keep their code.

T rows of a step, H query heads, G KV heads, D head dim, R rotated features.
"""

from functools import cache, partial
from types import FunctionType, MethodType
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from router.kernels import cpu_loops, cpu_loops_run, our_kernels_run

_ROPE = "apply_rotary_pos_emb"


def fuse_norms(model: torch.nn.Module) -> None:
    """Make every RMSNorm one operation instead of six."""
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            weight: Tensor = cast(Any, module).weight.detach()
            eps: float = cast(Any, module).variance_epsilon
            if cpu_loops_run(weight.dtype, weight.device):
                module.forward = partial(_rms_norm_on_cpu, weight.numpy(), eps)
            elif our_kernels_run(weight.dtype, weight.device):
                module.forward = partial(_rms_norm_on_gpu, weight, eps)
            else:
                module.forward = partial(_rms_norm, weight, eps)


def fuse_rope(model: torch.nn.Module) -> None:
    """Make rotary embeddings one or two operations instead of fourteen, in families that rotate halves, as most do.

    Our kernels must run on the model's device.
    """
    ours_for = rope_on_gpu if next(model.parameters()).is_cuda else rope_on_cpu
    for module in model.modules():
        if ours := _with_our_rope(type(module).forward, ours_for):
            module.forward = MethodType(ours, module)


@cache  # a family's layers share their code
def _with_our_rope(forward: Any, rope: Any) -> FunctionType | None:
    """Return a forward with the same code that calls `rope` where it called its own; None if it does not fit."""
    if _ROPE not in forward.__code__.co_names or not rotates_halves(forward.__globals__[_ROPE]):
        return None
    names = {**forward.__globals__, _ROPE: rope}
    ours = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


def rotates_halves(rope: Any) -> bool:
    """Return whether a family's function does what rope_on_cpu does, tried on numbers with all and with some features."""
    q, k = torch.rand(1, 2, 3, 8), torch.rand(1, 1, 3, 8)
    for width in (8, 4):
        cos, sin = torch.rand(2, 1, 3, width)
        try:
            theirs = rope(q, k, cos, sin)
        except RuntimeError:  # a family that always rotates all features
            continue
        if not all(map(torch.allclose, theirs, rope_on_cpu(q, k, cos, sin))):
            return False
    return True


def rope_on_cpu(q_1HTD: Tensor, k_1GTD: Tensor, cos_1TR: Tensor, sin_1TR: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys with their first R features rotated, as transformers' apply_rotary_pos_emb does."""
    cos_TR, sin_TR = cos_1TR[0].numpy(), sin_1TR[0].numpy()

    def rotated(x_1HTD: Tensor) -> Tensor:
        x_THD = x_1HTD[0].transpose(0, 1).contiguous()
        out_THD = torch.empty_like(x_THD)
        cpu_loops.rotate_halves(x_THD.numpy(), cos_TR, sin_TR, out_THD.numpy())
        return out_THD.transpose(0, 1)[None]

    return rotated(q_1HTD), rotated(k_1GTD)


def rope_on_gpu(q_1HTD: Tensor, k_1GTD: Tensor, cos_1TR: Tensor, sin_1TR: Tensor) -> tuple[Tensor, Tensor]:
    """Return what rope_on_cpu returns, computed by one kernel on a GPU."""
    from router.kernels import rows

    q_THD, k_TGD = q_1HTD[0].transpose(0, 1), k_1GTD[0].transpose(0, 1)
    q_THD, k_TGD = rows.rotate_halves(q_THD, k_TGD, cos_1TR[0], sin_1TR[0])
    return q_THD.transpose(0, 1)[None], k_TGD.transpose(0, 1)[None]


def _rms_norm(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


def _rms_norm_on_gpu(weight: Tensor, eps: float, x: Tensor) -> Tensor:
    """Compute an RMSNorm by our kernel, which takes 2 us where torch's takes 3.6."""
    from router.kernels import rows

    return rows.rms_norm(x, weight, eps)


def _rms_norm_on_cpu(weight: np.ndarray, eps: float, x: Tensor) -> Tensor:
    """Compute an RMSNorm by our loop: torch makes seven operations of it on a CPU, a tenth of a decode step."""
    x = x.contiguous()
    out = torch.empty_like(x)
    rows = (-1, x.shape[-1])
    cpu_loops.rms_norm(x.view(rows).numpy(), weight, eps, out.view(rows).numpy())
    return out
