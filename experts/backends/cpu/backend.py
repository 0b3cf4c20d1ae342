"""Backend `cpu`: experts that stay quantised, a byte an element, and are computed by compiled loops.

A CPU is bound by the bytes of the weights that it reads. An E2M1 value is half an integer of -12 to 12, so int8 keeps it
exactly, and one float32 scale (e4m3 * scale_2 / 2) per 16 of them is applied to their sum: 1.25 bytes a weight where
dequantised float32 needs 4, and no rounding that float32 weights would not have.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from experts.backends import ExpertBackend
from experts.backends.cpu import loops
from experts.nvfp4 import GROUP, unpack
from experts.weights import ExpertWeights, MoEShape, Nvfp4Weight


class CpuBackend(ExpertBackend):
    """A backend that runs each forward in one thread and computes in float32, whatever the dtype of the activations."""

    def __init__(self, shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        if device.type != "cpu":
            raise ValueError(f"backend cpu runs on a CPU, not on {device}; `auto` chooses for this device")
        self._layers = {layer: _Layer(shape, num_slots) for layer in shape.moe_layers}
        self._first_slot = 0
        self._num_pairs = self._num_activated = 0

    def take_physical(self, first_slot: int) -> Callable[[], Tensor]:
        """Have the loop that computes a forward find and count the local pairs: one call less, and no tensor of slots."""
        self._first_slot = first_slot
        return self._totals

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        self._layers[layer].write(slot, weights)

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        sum_TD = out_TD if out_TD.dtype == torch.float32 else torch.empty_like(out_TD, dtype=torch.float32)
        weights = self._layers[layer]
        num_pairs, num_activated = loops.forward(
            x_TD.float().numpy(),
            ids_TK.contiguous().numpy(),
            self._first_slot,
            w_TK.numpy(),
            weights.codes_13,
            weights.scales_13,
            weights.codes_2,
            weights.scales_2,
            sum_TD.numpy(),
        )
        self._num_pairs += num_pairs
        self._num_activated += num_activated
        if sum_TD is not out_TD:
            out_TD.copy_(sum_TD)

    def _totals(self) -> Tensor:
        return torch.tensor([self._num_pairs, self._num_activated])


class _Layer:
    """The weights of one layer: arrays as loops.forward takes them, and tensors on the same memory to write to."""

    def __init__(self, shape: MoEShape, num_slots: int) -> None:
        hidden, intermediate = shape.hidden, shape.intermediate
        self._13 = _blocks(num_slots, hidden, 2 * intermediate)
        self._2 = _blocks(num_slots, intermediate, hidden)
        self.codes_13, self.scales_13 = (tensor.numpy() for tensor in self._13)
        self.codes_2, self.scales_2 = (tensor.numpy() for tensor in self._2)

    def write(self, slot: int, weights: ExpertWeights) -> None:
        codes, scales = self._13
        gate, up = zip(codes[slot].chunk(2, dim=-1), scales[slot].chunk(2, dim=-1), strict=True)
        _write(weights.gate, *gate)
        _write(weights.up, *up)
        _write(weights.down, *(tensor[slot] for tensor in self._2))


def _blocks(num_slots: int, num_inputs: int, num_outputs: int) -> tuple[Tensor, Tensor]:
    num_blocks = num_inputs // GROUP
    codes = torch.zeros(num_slots, num_blocks, GROUP, num_outputs, dtype=torch.int8)
    return codes, torch.zeros(num_slots, num_blocks, num_outputs)


def _write(w: Nvfp4Weight, codes_BJN: Tensor, scale_BN: Tensor) -> None:
    codes_BJN.copy_((unpack(w.packed) * 2).to(torch.int8).t().unflatten(0, (-1, GROUP)))
    scale_BN.copy_((w.scale.float() * w.scale_2).t() / 2)
