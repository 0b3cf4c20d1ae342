"""The ways in which checkpoints name and store routed experts.

modelopt            experts.7.gate_proj.weight (U8), .weight_scale, .weight_scale_2, .input_scale
compressed-tensors  experts.7.gate_proj.weight_packed (U8), .weight_scale, .weight_global_scale (inverse), ...
dense               experts.7.gate_proj.weight (BF16, F16 or F32)

Mixtral and MiniMax write w1, w3, w2 for gate, up, down. Instead of one tensor per expert, a layer may have 3-D
ones for all of them, experts.gate_up_proj (gate first) and experts.down_proj, with _weight_scale etc. appended.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from experts.checkpoint.tensor_files import TensorFiles
from experts.weights import MoEShape

Matrix = Literal["gate", "up", "down", "gate_up"]
Format = Literal["modelopt", "compressed-tensors", "dense"]

_MATRICES: dict[str, Matrix] = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "w1": "gate",
    "w3": "up",
    "w2": "down",
    "gate_up_proj": "gate_up",
}
_LAYER = re.compile(r"(?:model\.|backbone\.)?(?:language_model\.)?(?:model\.)?layers\.(\d+)\.(.+)")
_EXPERT = re.compile(rf"(?:.+\.)?experts\.(?:(\d+)\.)?({'|'.join(_MATRICES)})(?:[._](.+))?")


class ExpertTensor(NamedTuple):
    """The identity of a tensor: a part of a matrix of an expert.

    expert: None if it stacks all experts of the layer.
    """

    layer: int
    expert: int | None
    matrix: Matrix
    part: str

    def size(self, shape: MoEShape) -> tuple[int, int]:
        """Return (out, in) of the matrix."""
        return (
            (shape.hidden, shape.intermediate)
            if self.matrix == "down"
            else (shape.intermediate, shape.hidden)
        )

    def stacked(self) -> "ExpertTensor":
        """Return the tensor that holds this one where experts are stacked."""
        return self._replace(expert=None, matrix="down" if self.matrix == "down" else "gate_up")


class Parts(NamedTuple):
    """The names that a format gives the tensors of a quantised matrix.

    inverse: scale_2, input_scale are reciprocals.
    """

    packed: str
    scale: str
    scale_2: str
    input_scale: str
    inverse: bool


PARTS: dict[Format, Parts] = {
    "modelopt": Parts("weight", "weight_scale", "weight_scale_2", "input_scale", inverse=False),
    "compressed-tensors": Parts(
        "weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", inverse=True
    ),
}


def layer_of(name: str) -> int | None:
    """Return the decoder layer that a tensor belongs to, None if it belongs to none."""
    match = _LAYER.fullmatch(name)
    return int(match[1]) if match else None


def parse_expert(name: str) -> ExpertTensor | None:
    """Return the part of a routed expert that this name stands for, None for the trunk (shared experts are trunk)."""
    layer = _LAYER.fullmatch(name)
    expert = _EXPERT.fullmatch(layer[2]) if layer else None
    if layer is None or expert is None:
        return None
    number, matrix, part = expert.groups()
    return ExpertTensor(int(layer[1]), int(number) if number else None, _MATRICES[matrix], part or "weight")


def count_layers(names: Iterable[str], *, stated: int | None) -> int:
    """Return the number of decoder layers that have tensors, but no more than config.json states.

    Layers beyond predict further tokens (MTP); the model does not have them.
    """
    layers = [layer for name in names if (layer := layer_of(name)) is not None]
    found = max(layers, default=-1) + 1
    return found if stated is None else min(found, stated)


def check_supported(path: Path, tensors: Collection[ExpertTensor]) -> None:
    """Raise ValueError if there are no experts, or they compute more or less than SwiGLU."""
    matrices = {tensor.matrix for tensor in tensors}
    parts = {tensor.part for tensor in tensors}
    if not matrices:
        raise ValueError(f"{path}: has no routed experts (no tensors named layers.N.*.experts.*)")
    if not ({"gate", "up", "down"} <= matrices or {"gate_up", "down"} <= matrices):
        found = " and ".join(sorted(matrices))
        raise ValueError(
            f"{path}: experts that have only {found} are not supported; SwiGLU has gate, up and down"
        )
    if any("bias" in part for part in parts):
        raise ValueError(f"{path}: experts with a bias are not supported")
    if any("pre_quant_scale" in part for part in parts):
        raise ValueError(f"{path}: experts with pre_quant_scale (NVFP4_AWQ, NVFP4_SVD) are not supported")


def detect_format(files: TensorFiles, tensors: Mapping[ExpertTensor, str]) -> Format:
    """Return the format, judged by one expert, a quantised one if there is any.

    Raises ValueError if unsupported.
    """
    down = (tensor for tensor in tensors if tensor.matrix == "down")
    sample = max(down, key=lambda tensor: tensor.part in ("weight_scale_2", "weight_global_scale"))
    parts = {tensor.part: files.dtype(name) for tensor, name in tensors.items() if tensor[:3] == sample[:3]}
    weight = parts.get("weight")
    if weight in ("BF16", "F16", "F32"):
        return "dense"
    if weight == "U8" and "weight_scale_2" in parts:
        return "modelopt"
    if "weight_packed" in parts and "weight_global_scale" in parts:
        return "compressed-tensors"
    is_mxfp4 = "blocks" in parts or parts.get("weight_scale") == "U8"
    kind = "MXFP4" if is_mxfp4 else "FP8" if weight == "F8_E4M3" else f"unknown ({', '.join(sorted(parts))})"
    raise ValueError(
        f"{files.path}: {kind} experts are not supported; NVFP4 ones are, ModelOpt's or compressed-tensors' "
        "nvfp4-pack-quantized"
    )


def stacked_sizes(
    gate_up: tuple[int, ...], down: tuple[int, ...], *, packing: int
) -> tuple[bool, int, int] | None:
    """Return (K-first, hidden, intermediate) of 3-D experts, or None for shapes that do not fit each other.

    K-first tensors are [E, in, out], the others [E, out, in]; `in` counts entries of `packing` elements. The
    two are never ambiguous: no sizes satisfy both.
    """
    _, a, b = gate_up
    _, c, d = down
    if c == packing * b and a == 2 * packing * d:
        return False, c, a // 2
    if d == packing * a and b == 2 * packing * c:
        return True, d, b // 2
    return None
