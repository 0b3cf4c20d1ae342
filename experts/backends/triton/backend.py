"""Backend `triton`: NVFP4 W4A16 on any CUDA GPU that has bfloat16 (SM80 and up); weights stay 4.5 bits in memory.

T tokens, D hidden, K top-k, e slots, I intermediate, P = T * K pairs, R: the pairs of local experts. A matrix has N outputs
and K inputs, J = K / 2.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from experts.backends import ExpertBackend
from experts.backends.triton import kernels as triton_kernels
from experts.nvfp4 import GROUP
from experts.progress import Progress
from experts.weights import ExpertWeights, MoEShape

kernels: Any = triton_kernels  # pyright does not know the calls of Triton's language

MULTIPLE = 64
"""D and I must be multiples of this."""

WARM_TOKENS = tuple(2**n for n in range(13))
"""The numbers of tokens whose kernels are compiled before a shard takes requests; the steps of `tiles` are coarser."""

MOVED = 1024
"""Columns that a program takes at a time where values are only moved or added up."""


class Tiles(NamedTuple):
    """The way in which a kernel cuts the product with a matrix into programs and steps.

    outputs, rows: of one program. inputs: bytes of packed inputs in one step. warps: of a program. stages: steps whose
    loads are in flight at a time.
    """

    outputs: int
    rows: int
    inputs: int
    warps: int
    stages: int

    def options(self) -> dict[str, Any]:
        """Return them by the kernels' names.

        With 16 rows and more the weights are the right operand, see `_product`.
        """
        return {
            "BLOCK_N": self.outputs,
            "BLOCK_R": self.rows,
            "BLOCK_J": self.inputs,
            "STAGES": self.stages,
            "ROWS_FIRST": self.rows >= 16,
            "num_warps": self.warps,
        }


class TritonBackend(ExpertBackend):
    """A backend that runs four kernels a forward (arrange, gate_up, down, combine) and never waits for the device."""

    in_graph = True

    def __init__(self, shape: MoEShape, num_slots: int, dtype: torch.dtype, device: torch.device) -> None:
        if reason := why_not(shape, dtype, device):
            raise ValueError(reason)
        self._shape, self._num_slots = shape, num_slots
        self._layers = {layer: Layer(shape, num_slots, device) for layer in shape.moe_layers}
        self._num_lists = triton.next_power_of_2(num_slots)
        self._counts_e = torch.zeros(1 + self._num_lists, dtype=torch.int32, device=device)
        self._total = torch.zeros(2, dtype=torch.int64, device=device)
        self._first_slot = 0

    def take_physical(self, first_slot: int) -> Callable[[], Tensor]:
        """Have the kernel `arrange` find and count the local pairs."""
        self._first_slot = first_slot
        return self._total.clone

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        self._layers[layer].write(slot, weights)

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        ids_TK = ids_TK.contiguous()
        weights, hidden, intermediate = self._layers[layer], self._shape.hidden, self._shape.intermediate
        (num_tokens, top_k), num_pairs = ids_TK.shape, ids_TK.numel()
        gate_up, down = tiles(self._shape, num_pairs)
        max_blocks = min(num_pairs, self._num_slots + num_pairs // gate_up.rows)
        block_d = min(MOVED, triton.next_power_of_2(hidden))

        arranged_TD = torch.empty_like(x_TD)
        h_RI = x_TD.new_empty(num_pairs, intermediate)
        y_PD = x_TD.new_empty(num_pairs, hidden)
        lists = {
            "pair_eP": ids_TK.new_empty(self._num_slots, num_pairs),
            "num_pairs": num_pairs,
            "blocks_B4": ids_TK.new_empty(max_blocks, 4),
            "num_blocks": ids_TK.new_empty(1),
        }
        kernels.arrange[(num_tokens,)](
            x_TD=x_TD,
            ids_TK=ids_TK,
            first_slot=self._first_slot,
            num_slots=self._num_slots,
            counts_e=self._counts_e,
            total=self._total,
            **lists,
            arranged_TD=arranged_TD,
            TOP_K=top_k,
            LANES=triton.next_power_of_2(top_k),
            NUM_LISTS=self._num_lists,
            BLOCK_R=gate_up.rows,
            D=hidden,
            BLOCK_D=block_d,
        )
        kernels.gate_up[(2 * intermediate // gate_up.outputs, max_blocks)](
            x_TD=arranged_TD,
            packed_eNJ=weights.gate_up.packed_eNJ,
            scale_eNGh=weights.gate_up.scale_eNGh,
            scale_2_e3=weights.scale_2_e3,
            **lists,
            h_RI=h_RI,
            TOP_K=top_k,
            D=hidden,
            I=intermediate,
            **gate_up.options(),
        )
        kernels.down[(hidden // down.outputs, max_blocks)](
            h_RI=h_RI,
            packed_eNJ=weights.down.packed_eNJ,
            scale_eNGh=weights.down.scale_eNGh,
            scale_2_e3=weights.scale_2_e3,
            **lists,
            w_TK=w_TK,
            y_PD=y_PD,
            D=hidden,
            I=intermediate,
            **down.options(),
        )
        kernels.combine[(num_tokens, triton.cdiv(hidden, block_d))](
            y_PD=y_PD,
            ids_TK=ids_TK,
            first_slot=self._first_slot,
            num_slots=self._num_slots,
            out_TD=out_TD,
            TOP_K=top_k,
            D=hidden,
            BLOCK_D=block_d,
        )

    def warm(self, *, top_k: int) -> Iterator[Progress]:
        """Compile each kernel for each size of tiles, a second or two each; Triton keeps the results on disk."""
        layer, device = self._shape.moe_layers[0], self._counts_e.device
        first_of = {tiles(self._shape, num * top_k): num for num in reversed(WARM_TOKENS)}
        for done, num_tokens in enumerate(sorted(first_of.values())):
            yield Progress(done, len(first_of), "kernels", f"{num_tokens} tokens")
            x_TD = torch.zeros(num_tokens, self._shape.hidden, dtype=torch.bfloat16, device=device)
            nobody_TK = torch.full((num_tokens, top_k), -1, dtype=torch.int32, device=device)
            w_TK = torch.zeros(num_tokens, top_k, device=device)
            self.forward(layer, x_TD, nobody_TK, w_TK, out_TD=torch.empty_like(x_TD))
        yield Progress(len(first_of), len(first_of), "kernels")


def tiles(shape: MoEShape, num_pairs: int) -> tuple[Tiles, Tiles]:
    """Return the tiles of gate_up and of down for this number of pairs, absent experts included; measured on an H200.

    Both have blocks of the same number of rows: the fewer pairs an expert has on average, the fewer rows.
    """
    pairs = num_pairs / shape.num_experts
    if pairs <= 6:
        gate_up, down = Tiles(64, 8, 128, 4, 4), Tiles(64, 8, 128, 4, 3)
    elif pairs <= 12:
        gate_up, down = Tiles(128, 16, 128, 4, 3), Tiles(128, 16, 64, 4, 3)
    elif pairs <= 24:
        gate_up = down = Tiles(128, 32, 64, 4, 3)
    elif pairs <= 128:
        gate_up = down = Tiles(128, 64, 64, 4, 2)
    else:
        gate_up = down = Tiles(128, 128, 64, 4, 2)
    return _fit(gate_up, 2 * shape.intermediate, shape.hidden), _fit(down, shape.hidden, shape.intermediate)


def why_not(shape: MoEShape, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return one sentence that says why the kernels cannot compute this here, or None if they can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return f"backend triton needs a CUDA GPU of SM80 or newer, which {device} is not"
    if dtype != torch.bfloat16:
        return f"backend triton computes in bfloat16, not in {str(dtype).removeprefix('torch.')}; backend torch does"
    if shape.hidden % MULTIPLE or shape.intermediate % MULTIPLE:
        sizes = f"{shape.hidden} x {shape.intermediate}"
        return f"backend triton needs experts whose sizes are multiples of {MULTIPLE}, these are {sizes}; backend torch does not"
    return None


class Matrix(NamedTuple):
    """A packed weight matrix of all slots.

    packed_eNJ: uint8, two codes a byte, see `pack`.
    scale_eNGh: e4m3 bits as uint8; the scales of inputs j and J + j stand side by side.
    """

    packed_eNJ: Tensor
    scale_eNGh: Tensor

    @classmethod
    def zeros(cls, num_slots: int, num_outputs: int, num_inputs: int, device: torch.device) -> "Matrix":
        half = num_inputs // 2
        sizes = (num_slots, num_outputs, half), (num_slots, num_outputs, half // GROUP, 2)
        return cls(*(torch.zeros(size, dtype=torch.uint8, device=device) for size in sizes))


class Layer:
    """The weights of one layer, as the kernels read them.

    gate_up: 8 rows of gate and 8 of up in turn, in the order in which `down` expects its inputs.
    scale_2_e3: float32, the scale_2 of gate, up and down, times the power of two that the kernels leave out.
    """

    def __init__(self, shape: MoEShape, num_slots: int, device: torch.device) -> None:
        self.gate_up = Matrix.zeros(num_slots, 2 * shape.intermediate, shape.hidden, device)
        self.down = Matrix.zeros(num_slots, shape.hidden, shape.intermediate, device)
        self.scale_2_e3 = torch.zeros(num_slots, 3, device=device)

    def write(self, slot: int, weights: ExpertWeights) -> None:
        """Pack an expert's weights into a slot, in place, on the device, for which the host does not wait."""
        gate, up, down = weights.gate, weights.up, weights.down
        rows_N = gate_up_rows(len(gate.packed), gate.packed.device)
        write_matrix(
            torch.cat((gate.packed, up.packed)).index_select(0, rows_N),
            torch.cat((gate.scale.view(torch.uint8), up.scale.view(torch.uint8))).index_select(0, rows_N),
            into=self.gate_up,
            slot=slot,
        )
        write_matrix(down.packed, down.scale.view(torch.uint8), into=self.down, slot=slot)
        scale_2 = torch.stack([w.scale_2.float() for w in (gate, up, down)])
        self.scale_2_e3[slot].copy_(scale_2 * 2.0**kernels.SCALE_SHIFT)


@cache
def gate_up_rows(num_outputs: int, device: torch.device) -> Tensor:
    """Return int64 [2N]: the row of [gate; up] that stands at each row of Layer.gate_up. num_outputs: of gate."""
    order_N = order_of(num_outputs).reshape(-1, 8)
    return torch.stack((order_N, num_outputs + order_N), dim=1).flatten().to(device)


@cache  # a model has two sizes of matrices, and thousands of each
def order_of(num_inputs: int) -> Tensor:
    """Return int64 [K]: the input that stands at each position. Both halves are permuted in the same way.

    In an operand of a tensor core a thread holds 4 of every 16 positions. In a square of 4 groups of 16 inputs (2 groups
    where J is no multiple of 64) everything that one thread holds is of one group, so it converts one scale, once.
    """
    half = num_inputs // 2
    side = 4 if half % 64 == 0 else 2
    sizes = (-1, side, 4 // side, side, 4)  # square, group, word // side, word % side, byte
    at = torch.arange(half).reshape(sizes)
    order_J = at.permute(0, 3, 1, 2, 4).flatten()
    return torch.cat([order_J, half + order_J])


def pack(low_NJ: Tensor, high_NJ: Tensor) -> Tensor:
    """Return uint8 [N, J]: 32-bit words of four low and four high codes, each at the bits where the kernels want it.

    A word holds pairs of codes: the first of a pair in its lower 16 bits, the second in its upper ones. Pairs a and b are
    low codes, c and d high ones. The bits of either half, from the highest: a3 d3 d2 b3 d1 d0 c3 a2 a1 a0 b2 b1 b0 c2 c1 c0.
    """
    (a, b), (c, d) = (codes.int().unflatten(-1, (-1, 2, 2)).unbind(-2) for codes in (low_NJ, high_NJ))
    signs = a >> 3 << 15 | d >> 3 << 14 | b >> 3 << 12 | c >> 3 << 9
    pairs = signs | (d >> 2 & 1) << 13 | (d & 3) << 10 | (a & 7) << 6 | (b & 7) << 3 | c & 7
    return (pairs[..., 0] | pairs[..., 1] << 16).view(torch.uint8)


@cache
def word_table(device: torch.device) -> Tensor:
    """Return int32 [4 * 256]: what each of the four bytes of a word's codes adds to the word of `pack`.

    The first two bytes are of the low codes, the others of the high ones. A byte has its first code in its low nibble.
    """
    byte = torch.arange(256, dtype=torch.uint8)
    codes = torch.stack((byte & 0xF, byte >> 4), dim=-1)
    none = torch.zeros_like(codes)
    first, second, nothing = (
        torch.cat(pair, dim=-1) for pair in ((codes, none), (none, codes), (none, none))
    )
    words = pack(first, nothing), pack(second, nothing), pack(nothing, first), pack(nothing, second)
    return torch.cat([word.view(torch.int32).flatten() for word in words]).to(device)


@cache
def table_places(device: torch.device) -> Tensor:
    """Return int32 [2, 1, 2]: where in word_table the bytes of low and high codes begin."""
    return torch.arange(0, 4 * 256, 256, dtype=torch.int32).reshape(2, 1, 2).to(device)


@cache
def byte_pairs(num_inputs: int, device: torch.device) -> Tensor:
    """Return int64 [K / 4]: the pair of a row's packed bytes that stands at each place; order_of moves four inputs together."""
    return (order_of(num_inputs)[::4] // 4).to(device)


def write_matrix(packed_NB: Tensor, scale_NG: Tensor, *, into: Matrix, slot: int) -> None:
    """Write a matrix whose rows are in their order already. packed: as in a checkpoint, two inputs a byte; scale: uint8.

    This is `pack` after order_of, in few operations, because a host needs longer to start one than a GPU to do it.
    """
    num_outputs, num_bytes = packed_NB.shape
    device = packed_NB.device
    pairs = packed_NB.unflatten(1, (-1, 2)).index_select(1, byte_pairs(2 * num_bytes, device))
    places = pairs.view(num_outputs, 2, -1, 2) + table_places(device)  # low and high, word, byte
    parts = word_table(device).index_select(0, places.flatten()).view_as(places)
    words = parts.sum(dim=(1, 3), dtype=torch.int32)  # no two parts of a word have a bit in common
    into.packed_eNJ[slot].copy_(words.view(torch.uint8))
    into.scale_eNGh[slot].copy_(scale_NG.unflatten(1, (2, -1)).mT)


def _fit(tiles: Tiles, num_outputs: int, num_inputs: int) -> Tiles:
    """Return the largest tiles, no larger than these, that divide the matrix."""
    outputs, inputs = tiles.outputs, tiles.inputs
    while num_outputs % outputs:
        outputs //= 2
    while num_inputs // 2 % inputs:
        inputs //= 2
    return tiles._replace(outputs=outputs, inputs=inputs)
