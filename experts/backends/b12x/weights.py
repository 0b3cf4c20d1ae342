"""The experts of one layer in the memory that the b12x kernels read. e local slots, D hidden, I intermediate."""

import torch

from experts.backends import Scales
from experts.backends.b12x.layout import (
    PreparedExpert,
    check_shape,
    mma_view,
    padded_intermediate,
    prepare,
    scale_storage,
    swizzle_into,
    unswizzle,
)
from experts.weights import ExpertWeights, MoEShape


class B12xWeights:
    """The only copy of a layer's weights. It is allocated once; slots are written in place, so no data_ptr ever moves.

    w13: uint8 [e, 2I, D/2], rows [up; gate]. w2: uint8 [e, D, I/2]. I is padded to a multiple of 256: up's rows
    are [0, intermediate), gate's [I, I + intermediate), and the padding is zero.
    w13_scale, w2_scale: e4m3 [32, 4, m, 4, k, e] views, as convert_sf_to_mma_layout makes them.
    w13_alpha, w2_alpha, input_scale, fc2_input_scale: float32 [e]; see PreparedExpert. 1 in slots not yet written.
    """

    def __init__(
        self,
        shape: MoEShape,
        num_slots: int,
        device: torch.device,
        *,
        scales: Scales,
        weights_only: bool = False,
    ) -> None:
        check_shape(shape)
        self.shape = shape
        self.intermediate = padded_intermediate(shape.intermediate)
        self._scales: Scales = scales
        self._weights_only = weights_only
        fc1, fc2 = (2 * self.intermediate, shape.hidden), (shape.hidden, self.intermediate)
        with torch.inference_mode(False):  # the wrapper reads `_version`, which inference tensors lack
            self.w13 = torch.zeros(num_slots, fc1[0], fc1[1] // 2, dtype=torch.uint8, device=device)
            self.w2 = torch.zeros(num_slots, fc2[0], fc2[1] // 2, dtype=torch.uint8, device=device)
            self._w13_storage = scale_storage(num_slots, *fc1, device)
            self._w2_storage = scale_storage(num_slots, *fc2, device)
            self.w13_alpha, self.w2_alpha, self.input_scale, self.fc2_input_scale = (
                torch.ones(num_slots, dtype=torch.float32, device=device) for _ in range(4)
            )
        self.w13_scale, self.w2_scale = mma_view(self._w13_storage), mma_view(self._w2_storage)

    def write_slot(self, slot: int, weights: ExpertWeights) -> None:
        """Copy an expert into a slot, through memory for about one expert."""
        new = prepare(weights, self._scales, weights_only=self._weights_only)
        stated, padded = self.shape.intermediate, self.intermediate
        device = self.w13.device
        for half in range(2):
            rows = slice(half * stated, (half + 1) * stated)
            self.w13[slot, half * padded :][:stated].copy_(new.w13_packed[rows])
            tiles = slice(half * padded // 128, (half + 1) * padded // 128)
            swizzle_into(self._w13_storage[slot, tiles], new.w13_scale[rows].to(device))
        self.w2[slot, :, : stated // 2].copy_(new.w2_packed)
        swizzle_into(self._w2_storage[slot], new.w2_scale.to(device))
        for name in ("w13_alpha", "w2_alpha", "input_scale", "fc2_input_scale"):
            getattr(self, name)[slot].copy_(getattr(new, name))

    def read_slot(self, slot: int) -> PreparedExpert:
        """Return a copy of what write_slot prepared, read back from the kernel's memory without its padding."""
        stated, padded = self.shape.intermediate, self.intermediate
        rows = torch.cat((torch.arange(stated), padded + torch.arange(stated))).to(self.w13.device)
        w13_scale = unswizzle(self._w13_storage[slot]).view(torch.uint8)[rows].view(torch.float8_e4m3fn)
        return PreparedExpert(
            w13_packed=self.w13[slot][rows],
            w13_scale=w13_scale,
            w2_packed=self.w2[slot, :, : stated // 2].clone(),
            w2_scale=unswizzle(self._w2_storage[slot])[:, : stated // 16].contiguous(),
            w13_alpha=self.w13_alpha[slot].clone(),
            w2_alpha=self.w2_alpha[slot].clone(),
            input_scale=self.input_scale[slot].clone(),
            fc2_input_scale=self.fc2_input_scale[slot].clone(),
        )
