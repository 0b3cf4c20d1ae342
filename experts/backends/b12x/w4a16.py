"""A layer of backend `b12x-w4a16`: NVFP4 weights and bfloat16 activations.

The kernel reads weights in another order. B12xMoEWrapper would repack them at its first run and keep both; here the library
repacks each expert as it comes, and the launch function that the wrapper uses gets the result.
T tokens, D hidden, K top-k, e local slots, I intermediate.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from experts.backends import Scales
from experts.backends.b12x.layout import padded_intermediate
from experts.backends.b12x.weights import B12xWeights
from experts.weights import ExpertWeights, MoEShape

_PER_EXPERT = ("w13", "w13_scale", "w13_global_scale", "w2", "w2_scale", "w2_global_scale")


@dataclass(frozen=True, eq=False)
class W4A16Workspaces:
    """The scratch memory of the kernels, shared by all layers."""

    num_slots: int
    top_k: int
    max_tokens: int
    scratch: Any

    @classmethod
    def allocate(
        cls, shape: MoEShape, num_slots: int, *, top_k: int, max_tokens: int, device: torch.device
    ) -> "W4A16Workspaces":
        from flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch import allocate_sm120_moe_workspace

        scratch = allocate_sm120_moe_workspace(
            state_E=num_slots,
            weight_E=num_slots,
            k=shape.hidden,
            n=padded_intermediate(shape.intermediate),
            num_topk=top_k,
            device=device,
            routed_rows=max_tokens * top_k,
            quant_mode="w4a16",
            activation="silu",
        )
        return cls(num_slots=num_slots, top_k=top_k, max_tokens=max_tokens, scratch=scratch)


class W4A16Layer:
    """The repacked weights of all slots of a layer, written in place; nothing else holds them."""

    def __init__(self, shape: MoEShape, num_slots: int, device: torch.device, *, scales: Scales) -> None:
        self._one = B12xWeights(shape, 1, device, scales=scales, weights_only=True)
        self._num_slots = num_slots
        first = self._repack()
        self.packed: Any = replace(
            first,
            **{name: _for_slots(getattr(first, name), num_slots) for name in _PER_EXPERT},
            num_experts=num_slots,
        )
        self._workspaces: W4A16Workspaces | None = None

    @property
    def is_bound(self) -> bool:
        """Return whether bind() has been called."""
        return self._workspaces is not None

    def write_slot(self, slot: int, expert: ExpertWeights) -> None:
        """Repack an expert and copy it into a slot."""
        self._one.write_slot(0, expert)
        new = self._repack()
        for name in _PER_EXPERT:
            getattr(self.packed, name)[slot].copy_(getattr(new, name)[0])

    def bind(self, workspaces: W4A16Workspaces) -> None:
        """Set the scratch memory for the runs that follow."""
        self._workspaces = workspaces

    def run(self, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, out_TD: Tensor) -> None:
        """Launch the kernel; see ExpertBackend.forward. The layer must be bound."""
        from flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch import launch_sm120_moe

        assert self._workspaces is not None
        one = self._one
        launch_sm120_moe(
            a=x_TD,
            topk_ids=ids_TK,
            topk_weights=w_TK,
            w1_weight=one.w13,
            w1_weight_sf=one.w13_scale,
            w1_alpha=one.w13_alpha,
            w2_weight=one.w2,
            w2_weight_sf=one.w2_scale,
            w2_alpha=one.w2_alpha,
            num_experts=self._num_slots,
            top_k=self._workspaces.top_k,
            num_local_experts=self._num_slots,
            scatter_output=out_TD,
            quant_mode="w4a16",
            _workspace=self._workspaces.scratch,
            _prepared_weights=self.packed,  # used instead of w1 and w2, of which it only reads the size of I
        )

    def _repack(self) -> Any:
        """Return the library's W4A16PackedWeights of the one expert in `_one`.

        Waits for the device four times, because the library looks for the largest scales on the host.
        """
        from flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_w4a16_prepare import (
            prepare_w4a16_packed_weights,
        )

        one = self._one
        return prepare_w4a16_packed_weights(
            w13_fp4=one.w13,
            w13_blockscale=one.w13_scale,
            w13_global_scale=one.w13_alpha,
            w2_fp4=one.w2,
            w2_blockscale=one.w2_scale,
            w2_global_scale=one.w2_alpha,
            activation="silu",
            params_dtype=torch.bfloat16,
        )


def _for_slots(of_one: Tensor, num_slots: int) -> Tensor:
    return torch.zeros(num_slots, *of_one.shape[1:], dtype=of_one.dtype, device=of_one.device)
