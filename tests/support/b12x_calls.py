"""Calls of backend b12x: what may reach a kernel, and what must never. T tokens, D hidden, K top-k."""

from collections.abc import Callable

import torch
from torch import Tensor

from experts.backends.b12x.backend import B12xBackend

Arguments = dict[str, Tensor]
"""The tensors that ExpertBackend.forward takes: x_TD, local_TK, w_TK, out_TD."""


def arguments_of(num_tokens: int, *, hidden: int, top_k: int, num_slots: int) -> Arguments:
    """Return a right call's arguments: the experts of all slots in turn, and now and then none."""
    ids_TK = torch.arange(num_tokens * top_k, dtype=torch.int32).view(num_tokens, top_k)
    return {
        "x_TD": torch.zeros(num_tokens, hidden, dtype=torch.bfloat16),
        "local_TK": ids_TK % (num_slots + 1) - 1,
        "w_TK": torch.ones(num_tokens, top_k),
        "out_TD": torch.zeros(num_tokens, hidden, dtype=torch.bfloat16),
    }


def forward(backend: B12xBackend, layer: int, call: Arguments) -> None:
    backend.forward(layer, call["x_TD"], call["local_TK"], call["w_TK"], out_TD=call["out_TD"])


def strided(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t()


def misaligned(tensor: Tensor) -> Tensor:
    storage = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    return storage[1:].view(tensor.shape)


def with_top_k(right: Arguments, top_k: int) -> Arguments:
    num_tokens = len(right["x_TD"])
    ids_TK = torch.full((num_tokens, top_k), -1, dtype=torch.int32)
    return right | {"local_TK": ids_TK, "w_TK": torch.zeros(num_tokens, top_k)}


MISTAKES: dict[str, Callable[[Arguments], Arguments]] = {
    "float32 x": lambda c: c | {"x_TD": c["x_TD"].float()},
    "float16 x": lambda c: c | {"x_TD": c["x_TD"].half()},
    "strided x": lambda c: c | {"x_TD": strided(c["x_TD"])},
    "misaligned x": lambda c: c | {"x_TD": misaligned(c["x_TD"])},
    "narrow x": lambda c: c | {"x_TD": c["x_TD"][:, :64].contiguous()},
    "fewer rows of x": lambda c: c | {"x_TD": c["x_TD"][1:]},
    "int64 ids": lambda c: c | {"local_TK": c["local_TK"].long()},
    "strided ids": lambda c: c | {"local_TK": strided(c["local_TK"])},
    "an id beyond the slots": lambda c: c | {"local_TK": c["local_TK"].clone().fill_(1000)},
    "bfloat16 weights": lambda c: c | {"w_TK": c["w_TK"].bfloat16()},
    "strided weights": lambda c: c | {"w_TK": strided(c["w_TK"])},
    "fewer weights": lambda c: c | {"w_TK": c["w_TK"][:, 1:].contiguous()},
    "float32 out": lambda c: c | {"out_TD": c["out_TD"].float()},
    "short out": lambda c: c | {"out_TD": c["out_TD"][1:]},
    "strided out": lambda c: c | {"out_TD": strided(c["out_TD"])},
    "another top_k": lambda c: with_top_k(c, c["local_TK"].shape[1] // 2),
    "top_k 33": lambda c: with_top_k(c, 33),
    "no tokens": lambda c: {name: tensor[:0] for name, tensor in c.items()},
}
