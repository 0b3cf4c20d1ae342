"""A layer of backend `b12x` (W4A4): its weights and FlashInfer's wrappers for them.

T tokens, D hidden, K top-k, e local slots.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from experts.backends import Scales
from experts.backends.b12x.layout import padded_intermediate
from experts.backends.b12x.library import write_output_to
from experts.backends.b12x.numerics import STATIC_PAIRS
from experts.backends.b12x.weights import B12xWeights
from experts.weights import ExpertWeights, MoEShape


@dataclass(frozen=True, eq=False)
class W4A4Workspaces:
    """The scratch memory of the kernels, shared by all layers. dynamic: None if no call can be that large."""

    num_slots: int
    top_k: int
    max_tokens: int
    static: Any
    dynamic: Any
    output: Tensor

    @classmethod
    def allocate(
        cls, shape: MoEShape, num_slots: int, *, top_k: int, max_tokens: int, device: torch.device
    ) -> "W4A4Workspaces":
        from flashinfer.fused_moe.cute_dsl.blackwell_sm12x.moe_dispatch import allocate_sm120_moe_workspace

        sizes: dict[str, Any] = {
            "state_E": num_slots,
            "weight_E": num_slots,
            "k": shape.hidden,
            "n": padded_intermediate(shape.intermediate),
            "num_topk": top_k,
            "device": device,
            "quant_mode": "nvfp4",
            "activation": "silu",
        }
        num_pairs = max_tokens * top_k
        static = allocate_sm120_moe_workspace(
            **sizes, max_rows=min(num_pairs, STATIC_PAIRS), backend="static"
        )
        dynamic = None
        if num_pairs > STATIC_PAIRS:
            dynamic = allocate_sm120_moe_workspace(**sizes, routed_rows=num_pairs, backend="dynamic")
        output = torch.zeros(max_tokens, shape.hidden, dtype=torch.bfloat16, device=device)
        return cls(
            num_slots=num_slots,
            top_k=top_k,
            max_tokens=max_tokens,
            static=static,
            dynamic=dynamic,
            output=output,
        )


class W4A4Layer:
    """The weights of one layer and two wrappers of its own, since a wrapper caches views of the weights that it saw last.

    There are two because alternating [e] and [1] input scales on one wrapper makes it fold, and leak, anew each time. The
    static kernel takes [e] without a copy. The dynamic one quantises a token once, not K times, if the scale is [1].
    """

    def __init__(self, shape: MoEShape, num_slots: int, device: torch.device, *, scales: Scales) -> None:
        self.weights = B12xWeights(shape, num_slots, device, scales=scales)
        self._written: set[int] = set()
        self._static: Any = None
        self._dynamic: Any = None
        self._shared_input_scale = self.weights.input_scale

    @property
    def is_bound(self) -> bool:
        """Return whether bind() has been called since the last write that undid it."""
        return self._static is not None

    def write_slot(self, slot: int, expert: ExpertWeights) -> None:
        """Write a slot and drop the wrappers, which folded w13_alpha and input_scale into a tensor that is now old."""
        self.weights.write_slot(slot, expert)
        self._written.add(slot)
        self._static = self._dynamic = None

    def bind(self, workspaces: W4A4Workspaces) -> None:
        """Make the wrappers. Waits for the device once."""
        self._static_tokens = STATIC_PAIRS // workspaces.top_k
        self._static, self._dynamic = (_wrapper(self.weights, workspaces) for _ in range(2))
        self._shared_input_scale = _one_if_equal(self.weights.input_scale, sorted(self._written))

    def run(self, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, out_TD: Tensor) -> None:
        """Launch the kernel; see ExpertBackend.forward. The layer must be bound."""
        is_static, weights = x_TD.shape[0] <= self._static_tokens, self.weights
        wrapper = self._static if is_static else self._dynamic
        write_output_to(wrapper, out_TD)
        wrapper.run(
            x=x_TD,
            w1_weight=weights.w13,
            w1_weight_sf=weights.w13_scale,
            w2_weight=weights.w2,
            w2_weight_sf=weights.w2_scale,
            token_selected_experts=ids_TK,
            token_final_scales=w_TK,
            w1_alpha=weights.w13_alpha,
            w2_alpha=weights.w2_alpha,
            fc2_input_scale=weights.fc2_input_scale,
            input_global_scale=weights.input_scale if is_static else self._shared_input_scale,
        )


def _one_if_equal(scale_e: Tensor, slots: list[int]) -> Tensor:
    """Return the one scale [1] if these slots agree, else scale_e itself: the results are the same, on every shard."""
    with torch.inference_mode(False):  # the wrapper reads `_version`
        scale_s = scale_e[slots]
        return scale_s[:1].clone() if slots and bool((scale_s == scale_s[0]).all()) else scale_e


def _wrapper(weights: B12xWeights, workspaces: W4A4Workspaces) -> Any:
    from flashinfer import B12xMoEWrapper

    return B12xMoEWrapper(
        num_experts=workspaces.num_slots,
        top_k=workspaces.top_k,
        hidden_size=weights.shape.hidden,
        intermediate_size=weights.intermediate,
        use_cuda_graph=True,  # this stands for preallocated buffers
        max_num_tokens=workspaces.max_tokens,
        device=str(weights.w13.device),
        quant_mode="nvfp4",
        shared_static_workspace=workspaces.static,
        shared_dynamic_workspace=workspaces.dynamic,
        shared_output=workspaces.output,
    )
