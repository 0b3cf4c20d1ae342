"""Backend `b12x-emulated`: the answers of the b12x W4A4 kernel, computed by torch on any device.

T tokens, D hidden, K top-k, e local slots, I intermediate, P = T * K pairs, R of them routed here, S slices of I.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from experts.backends import ExpertBackend, Scales
from experts.backends.b12x import numerics
from experts.backends.b12x.layout import check_shape, padded_intermediate, prepare
from experts.weights import ExpertWeights, MoEShape

MAX_TERMS = 2**26
"""The most elements of [pairs, slices, D] at once; more tokens are computed in turns, with the same result."""


@dataclass(frozen=True, eq=False)
class _Slot:
    """The weights and multipliers of all slots of a layer, all float32; weights have the values that the tensor cores see.

    w13: [e, D, 2I], up's columns first. w2: [e, I', D], where I' is I padded with zero rows to a multiple of 256.
    Multipliers: [e].
    """

    w13: Tensor
    w2: Tensor
    w13_alpha: Tensor
    w2_alpha: Tensor
    input_scale: Tensor
    fc2_input_scale: Tensor


class B12xEmulatedBackend(ExpertBackend):
    """A backend that shows what accuracy W4A4 costs, without the hardware. x of any dtype is rounded to bfloat16 first.

    Static calls (up to 1024 pairs) are deterministic, like the kernel's. In larger ones the kernel adds bfloat16 numbers
    in any order; the emulation adds them in the order of the top-k, and numerics.dynamic_bound says how far another
    order may be.
    """

    def __init__(
        self,
        shape: MoEShape,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        scales: Scales = "exact",
    ) -> None:
        check_shape(shape)
        self._num_slots = num_slots
        self._scales: Scales = scales
        self._intermediate = shape.intermediate
        padded = padded_intermediate(shape.intermediate)
        self._layers = {
            layer: _Slot(
                torch.zeros(num_slots, shape.hidden, 2 * shape.intermediate, device=device),
                torch.zeros(num_slots, padded, shape.hidden, device=device),
                *(torch.ones(num_slots, device=device) for _ in range(4)),
            )
            for layer in shape.moe_layers
        }

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        new, own = prepare(weights, self._scales), self._layers[layer]
        own.w13[slot].copy_(numerics.code_values(new.w13_packed, new.w13_scale).t())
        own.w2[slot, : self._intermediate].copy_(numerics.code_values(new.w2_packed, new.w2_scale).t())
        own.w13_alpha[slot] = (
            new.w13_alpha * new.input_scale
        )  # FlashInfer's wrapper folds them in the same way
        own.w2_alpha[slot] = new.w2_alpha
        own.input_scale[slot] = new.input_scale
        own.fc2_input_scale[slot] = new.fc2_input_scale

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        num_tokens, top_k = ids_TK.shape
        static = numerics.is_static(num_tokens, top_k)
        width = numerics.STATIC_SLICE if static else numerics.DYNAMIC_SLICE
        terms_of_token = top_k * padded_intermediate(self._intermediate) // width * x_TD.shape[1]
        step = max(1, MAX_TERMS // terms_of_token)
        combine = numerics.static_combine if static else numerics.dynamic_combine
        for start in range(0, num_tokens, step):
            rows = slice(start, start + step)
            terms_TND = self.terms(layer, x_TD[rows], ids_TK[rows], w_TK[rows], static=static)
            out_TD[rows] = combine(terms_TND)

    def terms(self, layer: int, x_TD: Tensor, local_TK: Tensor, w_TK: Tensor, *, static: bool) -> Tensor:
        """Return bfloat16 [T, K * S, D]: the terms whose sum a token gets, in the order of its top-k, then of slices."""
        own, (num_tokens, top_k), hidden = self._layers[layer], local_TK.shape, x_TD.shape[1]
        width = numerics.STATIC_SLICE if static else numerics.DYNAMIC_SLICE
        num_slices = own.w2.shape[1] // width
        slot_P = local_TK.flatten().long()
        num_absent, *rows_e = torch.bincount(slot_P + 1, minlength=self._num_slots + 1).tolist()
        pair_R = slot_P.argsort(stable=True)[num_absent:]
        slot_R, w_R = slot_P[pair_R], w_TK.flatten()[pair_R]
        terms_PSD = x_TD.new_zeros(num_tokens * top_k, num_slices, hidden, dtype=torch.bfloat16)

        x_RD = x_TD[pair_R // top_k].bfloat16().float()
        x_RD = numerics.to_fp4_and_back(x_RD, own.input_scale[slot_R])
        alpha_R1, fc2_input_R = own.w13_alpha[slot_R, None], own.fc2_input_scale[slot_R]
        round_terms = numerics.static_terms if static else numerics.dynamic_terms
        start = 0
        for slot, num_rows in enumerate(rows_e):
            rows, start = slice(start, start + num_rows), start + num_rows
            if num_rows:
                up_RI, gate_RI = (x_RD[rows] @ own.w13[slot] * alpha_R1[rows]).chunk(2, dim=-1)
                a_RI = numerics.to_fp4_and_back(numerics.swiglu(up_RI, gate_RI), fc2_input_R[rows])
                sum_RSD = _slice_sums(a_RI, own.w2[slot], num_slices)
                alpha_R = own.w2_alpha[slot].expand(num_rows)
                terms_PSD[pair_R[rows]] = round_terms(sum_RSD, w_R[rows], alpha_R)
        return terms_PSD.view(num_tokens, top_k * num_slices, hidden)


def _slice_sums(a_RI: Tensor, w2_ID: Tensor, num_slices: int) -> Tensor:
    """Return float32 [R, S, D]: a @ w2, each slice of I by itself. w2 may have more rows than a has columns."""
    missing = w2_ID.shape[0] - a_RI.shape[1]
    a_RSi = torch.nn.functional.pad(a_RI, (0, missing)).unflatten(1, (num_slices, -1))
    return torch.bmm(a_RSi.transpose(0, 1), w2_ID.unflatten(0, (num_slices, -1))).transpose(0, 1)
