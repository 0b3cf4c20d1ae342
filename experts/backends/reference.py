"""Backend `reference`: one token and one expert at a time, in float32. T tokens, D hidden, K top-k."""

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.backends import ExpertBackend
from experts.nvfp4 import dequantize
from experts.weights import ExpertWeights, MoEShape


class ReferenceBackend(ExpertBackend):
    """The slow and obvious backend that every other one is tested against. It keeps the packed weights."""

    def __init__(self, shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self._device = device
        self._experts: dict[tuple[int, int], ExpertWeights] = {}

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        self._experts[layer, slot] = weights

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        sum_TD = torch.zeros_like(x_TD, dtype=torch.float32)
        for token, slots in enumerate(ids_TK.tolist()):
            for k, slot in enumerate(slots):
                if slot >= 0:
                    y_D = self._expert(self._experts[layer, slot], x_TD[token].float())
                    sum_TD[token] += w_TK[token, k] * y_D
        out_TD.copy_(sum_TD)

    def _expert(self, weights: ExpertWeights, x_D: Tensor) -> Tensor:
        gate, up, down = (
            dequantize(matrix, torch.float32).to(self._device)
            for matrix in (weights.gate, weights.up, weights.down)
        )
        return down @ (F.silu(gate @ x_D) * (up @ x_D))
