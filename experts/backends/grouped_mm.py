"""Backend `torch`: products of torch on dequantised weights, with the (token, expert) pairs sorted by expert.

T tokens, D hidden, K top-k, e local slots, P = T * K pairs, R of them routed to a local slot, I intermediate.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.backends import ExpertBackend
from experts.nvfp4 import dequantize
from experts.weights import ExpertWeights, MoEShape

FEW_ROWS = 8
"""The average number of rows per expert up to which a product with each expert's weights as the left factor is quicker."""


class GroupedMmBackend(ExpertBackend):
    """A backend whose weights are dequantised once, to the dtype of the activations: exact, quick on a CPU, large in memory.

    The rows of an expert stand together, so its weights are read once per forward.
    """

    def __init__(self, shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        sizes_13 = (num_slots, 2 * shape.intermediate, shape.hidden)  # rows: gate, then up
        sizes_2 = (num_slots, shape.hidden, shape.intermediate)
        self._w13 = {layer: torch.zeros(sizes_13, dtype=dtype, device=device) for layer in shape.moe_layers}
        self._w2 = {layer: torch.zeros(sizes_2, dtype=dtype, device=device) for layer in shape.moe_layers}
        self._num_slots = num_slots

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        gate, up = self._w13[layer][slot].chunk(2)
        for target, source in ((gate, weights.gate), (up, weights.up), (self._w2[layer][slot], weights.down)):
            target.copy_(dequantize(source, torch.float32))

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        slot_P = ids_TK.flatten()
        num_absent, *rows_e = torch.bincount(slot_P + 1, minlength=self._num_slots + 1).tolist()
        out_TD.zero_()
        if num_absent == slot_P.numel():
            return
        pair_R = slot_P.argsort(stable=True)[num_absent:]
        token_R = pair_R // ids_TK.shape[1]

        gate_up_R2I = _products(x_TD[token_R], self._w13[layer], rows_e)
        gate_RI, up_RI = gate_up_R2I.chunk(2, dim=-1)
        y_RD = _products(F.silu(gate_RI).mul_(up_RI), self._w2[layer], rows_e)
        y_RD = y_RD.float() * w_TK.flatten()[pair_R, None]
        if out_TD.dtype == torch.float32:
            out_TD.index_add_(0, token_R, y_RD)
        else:
            out_TD.copy_(torch.zeros_like(out_TD, dtype=torch.float32).index_add_(0, token_R, y_RD))


def _products(x_RK: Tensor, w_eNK: Tensor, rows_e: Sequence[int]) -> Tensor:
    """Return [R, N]: the first rows_e[0] rows of x times w[0] transposed, the next rows_e[1] times w[1], and so on."""
    active = [slot for slot, rows in enumerate(rows_e) if rows]
    if x_RK.is_cuda or len(x_RK) > FEW_ROWS * len(active):
        ends_e = torch.tensor(rows_e, dtype=torch.int32, device=x_RK.device).cumsum(0, dtype=torch.int32)
        return F.grouped_mm(x_RK, w_eNK.transpose(1, 2), offs=ends_e)
    parts = x_RK.contiguous().split([rows_e[slot] for slot in active])
    return torch.cat([w_eNK[slot] @ part.t() for slot, part in zip(active, parts, strict=True)], dim=1).t()
