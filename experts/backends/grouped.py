"""Backend `torch`: all experts of a call in two grouped products. T tokens, D hidden, K top-k, R routed pairs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from experts.nvfp4 import dequantize
from experts.weights import ExpertWeights, MoEShape


class GroupedBackend:
    """Weights are dequantised once, to the dtype of the activations: exact, quick on a CPU, large in memory.

    (token, expert) pairs are sorted by expert, so that every expert's tokens stand together, and torch's grouped
    product multiplies each group by its own matrix.
    """

    def __init__(self, shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self._num_slots = num_slots
        sizes_13 = (num_slots, 2 * shape.intermediate, shape.hidden)
        sizes_2 = (num_slots, shape.hidden, shape.intermediate)
        self._w13 = {layer: torch.zeros(sizes_13, dtype=dtype, device=device) for layer in shape.moe_layers}
        self._w2 = {layer: torch.zeros(sizes_2, dtype=dtype, device=device) for layer in shape.moe_layers}

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        gate, up = self._w13[layer][slot].chunk(2)
        for target, source in ((gate, weights.gate), (up, weights.up), (self._w2[layer][slot], weights.down)):
            target.copy_(dequantize(source, torch.float32))

    def forward(self, layer: int, x_TD: Tensor, local_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        slot_P = local_TK.flatten()
        count_e = torch.bincount(slot_P + 1, minlength=self._num_slots + 1)  # [0] counts the absent, slot -1
        num_absent = int(count_e[0])
        out_TD.zero_()
        if num_absent == slot_P.numel():
            return
        pair_R = slot_P.argsort(stable=True)[num_absent:]
        token_R = pair_R // local_TK.shape[1]
        ends_e = count_e[1:].cumsum(0).to(torch.int32)

        gate_up_R = F.grouped_mm(x_TD[token_R], self._w13[layer].transpose(1, 2), offs=ends_e)
        gate_R, up_R = gate_up_R.chunk(2, dim=-1)
        y_RD = F.grouped_mm(F.silu(gate_R).mul_(up_R), self._w2[layer].transpose(1, 2), offs=ends_e)
        y_RD = y_RD.float().mul_(w_TK.flatten()[pair_R, None])
        if out_TD.dtype == torch.float32:
            out_TD.index_add_(0, token_R, y_RD)
        else:
            out_TD.copy_(torch.zeros_like(out_TD, dtype=torch.float32).index_add_(0, token_R, y_RD))
