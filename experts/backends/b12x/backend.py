"""Backends `b12x` (W4A4) and `b12x-w4a16`: FlashInfer's fused MoE kernels on an SM120 or SM121 GPU.

T tokens, D hidden, K top-k, e local slots. FlashInfer has no expert parallelism for W4A4, and needs none here: it
computes the local problem, with local ids and -1 for experts that are elsewhere.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from experts.backends import ExpertBackend, Scales
from experts.backends.b12x.library import disable_micro, enable_micro
from experts.backends.b12x.w4a4 import W4A4Layer, W4A4Workspaces
from experts.backends.b12x.w4a16 import W4A16Layer, W4A16Workspaces
from experts.progress import Progress
from experts.weights import ExpertWeights, MoEShape

Mode = Literal["w4a4", "w4a16"]
_LAYERS = {"w4a4": W4A4Layer, "w4a16": W4A16Layer}
_WORKSPACES = {"w4a4": W4A4Workspaces, "w4a16": W4A16Workspaces}

MAX_TOKENS = 2048
"""The most rows of one launch; workspaces are allocated for them. A larger call is computed in turns."""

MAX_TOP_K = 32
"""The largest top-k of the kernels that quantise a token once for all its experts."""


class B12xBackend(ExpertBackend):
    """A backend of FlashInfer's kernels, whose weights and workspaces are allocated once.

    After warm(), forward allocates nothing and waits for nothing.
    A slot written after warm() moves the multipliers that a captured graph holds (the library folds two of them into a
    tensor of its own), so such a graph must be captured anew; weights stay where they are.
    micro: leave FlashInfer's micro kernels on; see disable_micro().
    """

    def __init__(
        self,
        shape: MoEShape,
        num_slots: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        mode: Mode = "w4a4",
        scales: Scales = "exact",
        micro: bool = False,
        max_tokens: int = MAX_TOKENS,
    ) -> None:
        """Allocate all weights.

        Raises ValueError for a dtype other than bfloat16 and sizes that the kernel cannot take.
        """
        if dtype != torch.bfloat16:
            raise ValueError(
                f"backend b12x computes on bfloat16; set fabric.wire_dtype=bfloat16, not {dtype}"
            )
        (enable_micro if micro else disable_micro)()
        self._shape, self._num_slots, self._device = shape, num_slots, device
        self._mode: Mode = mode
        self._max_tokens = max_tokens
        self._layers = {
            layer: _LAYERS[mode](shape, num_slots, device, scales=scales) for layer in shape.moe_layers
        }
        self._buffers: _Buffers | None = None
        self._buckets: tuple[int, ...] = ()

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        self._layers[layer].write_slot(slot, weights)

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        """Compute what ExpertBackend.forward says. Ids beyond the slots are refused on a CPU only; ExpertShard sends none.

        Raises ValueError for anything else that the kernel would fail on, or take and compute something else.
        A call whose T is not one of the warmed buckets is padded to the next larger one, through buffers.
        """
        check_call(x_TD, ids_TK, w_TK, out_TD, hidden=self._shape.hidden, num_slots=self._num_slots)
        buffers = self._buffers_for(ids_TK.shape[1])
        for start in range(0, x_TD.shape[0], self._max_tokens):
            rows = slice(start, start + self._max_tokens)
            self._turn(layer, buffers, x_TD[rows], ids_TK[rows], w_TK[rows], out_TD[rows])

    def warm(self, buckets: Sequence[int] | None = None, *, top_k: int) -> Iterator[Progress]:
        """Compile what calls of these numbers of tokens need, seconds each, and fill the library's caches of every layer.

        buckets: token_buckets() if None. From then on the backend launches these sizes only. Raises ValueError for a
        bucket beyond max_tokens.
        """
        sizes = tuple(sorted(set(token_buckets(self._max_tokens) if buckets is None else buckets)))
        if not sizes or sizes[0] < 1 or sizes[-1] > self._max_tokens:
            raise ValueError(f"token buckets must be in 1..{self._max_tokens}, got {list(sizes)}")
        self._buckets = ()
        buffers = self._buffers_for(top_k)
        first, *others = self._layers
        work = [(first, size) for size in sizes]
        work += [(layer, size) for layer in others for size in {sizes[0], sizes[-1]}]
        for done, (layer, size) in enumerate(work):
            yield Progress(done, len(work), "kernels", f"layer {layer}, {size} tokens")
            buffers.ids_TK[:size].fill_(-1)
            self._run(layer, buffers, *buffers.rows(size))
        yield Progress(len(work), len(work), "kernels")
        self._buckets = sizes

    def _turn(
        self, layer: int, buffers: "_Buffers", x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, out_TD: Tensor
    ) -> None:
        num_tokens = x_TD.shape[0]
        bucket = bucket_of(num_tokens, self._buckets)
        if bucket == num_tokens:
            self._run(layer, buffers, x_TD, ids_TK, w_TK, out_TD)
            return
        padded = buffers.rows(bucket)
        for target, source in zip(padded, (x_TD, ids_TK, w_TK), strict=False):
            target[:num_tokens].copy_(source)
        buffers.ids_TK[num_tokens:bucket].fill_(-1)
        self._run(layer, buffers, *padded)
        out_TD.copy_(padded[-1][:num_tokens])

    def _run(
        self, layer: int, buffers: "_Buffers", x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, out_TD: Tensor
    ) -> None:
        own = self._layers[layer]
        if not own.is_bound:
            own.bind(buffers.workspaces)
        own.run(x_TD, ids_TK, w_TK, out_TD)

    def _buffers_for(self, top_k: int) -> "_Buffers":
        """Return the buffers for this top_k.

        Raises ValueError if earlier calls had another: workspaces are sized by it.
        """
        if self._buffers is None:
            rows, hidden, device = self._max_tokens, self._shape.hidden, self._device
            self._buffers = _Buffers(
                top_k=top_k,
                workspaces=_WORKSPACES[self._mode].allocate(
                    self._shape, self._num_slots, top_k=top_k, max_tokens=rows, device=device
                ),
                x_TD=torch.zeros(rows, hidden, dtype=torch.bfloat16, device=device),
                ids_TK=torch.full((rows, top_k), -1, dtype=torch.int32, device=device),
                w_TK=torch.zeros(rows, top_k, dtype=torch.float32, device=device),
                out_TD=torch.zeros(rows, hidden, dtype=torch.bfloat16, device=device),
            )
        if self._buffers.top_k != top_k:
            raise ValueError(f"top_k is {top_k}, but this backend was set up for {self._buffers.top_k}")
        return self._buffers


@dataclass(frozen=True, eq=False)
class _Buffers:
    """The memory for calls of one top_k, shared by all layers, because one forward runs at a time.

    x_TD, ids_TK, w_TK, out_TD: for calls that are padded.
    """

    top_k: int
    workspaces: Any
    x_TD: Tensor
    ids_TK: Tensor
    w_TK: Tensor
    out_TD: Tensor

    def rows(self, num_tokens: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the first rows of x, ids, w and out."""
        return (
            self.x_TD[:num_tokens],
            self.ids_TK[:num_tokens],
            self.w_TK[:num_tokens],
            self.out_TD[:num_tokens],
        )


def token_buckets(max_tokens: int) -> list[int]:
    """Return the powers of two below max_tokens, and max_tokens: padding then wastes less than half of a launch."""
    return [*(1 << n for n in range((max_tokens - 1).bit_length())), max_tokens]


def bucket_of(num_tokens: int, buckets: Sequence[int]) -> int:
    """Return the smallest bucket that holds this many tokens, num_tokens itself if none does.

    buckets: ascending.
    """
    at = bisect_left(buckets, num_tokens)
    return buckets[at] if at < len(buckets) else num_tokens


def check_call(
    x_TD: Tensor, local_TK: Tensor, w_TK: Tensor, out_TD: Tensor, *, hidden: int, num_slots: int
) -> None:
    """Raise ValueError for arguments that the kernel would refuse obscurely or, worse, accept. Waits for no device.

    The kernel's dynamic path passes bare pointers, so a wrong dtype, stride or size reads and writes elsewhere; T = 0
    raises TypeError; an id beyond the experts is not checked at all.
    """
    num_tokens, top_k = local_TK.shape
    if not num_tokens:
        raise ValueError("b12x cannot run on no tokens")
    if not 1 <= top_k <= MAX_TOP_K:
        raise ValueError(f"b12x takes 1 to {MAX_TOP_K} experts per token, not {top_k}")
    for name, tensor, dtype, shape in (
        ("x", x_TD, torch.bfloat16, (num_tokens, hidden)),
        ("out", out_TD, torch.bfloat16, (num_tokens, hidden)),
        ("ids", local_TK, torch.int32, (num_tokens, top_k)),
        ("weights", w_TK, torch.float32, (num_tokens, top_k)),
    ):
        if tensor.dtype != dtype or tuple(tensor.shape) != shape or tensor.device != x_TD.device:
            raise ValueError(
                f"{name} must be {dtype} {list(shape)} on {x_TD.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
        if not tensor.is_contiguous() or tensor.data_ptr() % 16:
            raise ValueError(f"{name} must be contiguous and start at a multiple of 16 bytes")
    if local_TK.device.type == "cpu" and int(local_TK.max()) >= num_slots:
        raise ValueError(f"ids must be below {num_slots}, got {int(local_TK.max())}")
