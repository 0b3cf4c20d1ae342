"""CheckpointIndex says where a checkpoint directory keeps each routed expert, and how large the experts are."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal, Self

from experts.checkpoint.hf_config import read_config
from experts.checkpoint.layouts import (
    PARTS,
    ExpertTensor,
    Format,
    check_supported,
    count_layers,
    detect_format,
    parse_expert,
    stacked_sizes,
)
from experts.checkpoint.tensor_files import TensorFiles
from experts.weights import MoEShape


class CheckpointIndex:
    """An index of the routed experts, made from JSON and the files' headers: it reads no tensors and imports no torch.

    shape: sizes of the routed experts. format: "dense" experts are not quantised, the others are NVFP4.
    weights_only: the checkpoint says that it is W4A16, or has no input scale of any expert.
    top_k: experts per token, None where config.json does not say.
    Raises ValueError, naming file, tensor or expert, for a checkpoint that is broken or not supported.
    """

    _framework: ClassVar[Literal["pt", "numpy"]] = "numpy"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = TensorFiles(path, framework=self._framework)
        config = read_config(path)
        num_layers = count_layers(self.files, stated=config.num_layers)
        parsed = ((parse_expert(name), name) for name in self.files)
        self._names = {tensor: name for tensor, name in parsed if tensor and tensor.layer < num_layers}
        check_supported(path, self._names)
        self.format: Format = detect_format(self.files, self._names)
        self.weights_only = config.weights_only or self._has_no_input_scales()
        self.top_k = config.top_k
        self._stacked = any(tensor.expert is None for tensor in self._names)
        self._k_first, self.shape = self._read_shape(num_layers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Unmap the files."""
        self.files.close()

    def module_names(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Return the names of an expert's gate, up and down; where experts are stacked, the names that they would have."""
        if self._stacked:
            stem = self._name(ExpertTensor(layer, None, "down", "weight")).removesuffix("down_proj")
            return f"{stem}{expert}.gate_proj", f"{stem}{expert}.up_proj", f"{stem}{expert}.down_proj"
        gate, up, down = (
            self._name(matrix).removesuffix(".weight") for matrix in self._matrices(layer, expert)
        )
        return gate, up, down

    def locate(self, tensor: ExpertTensor) -> tuple[str, tuple[int | slice, ...]]:
        """Return the name of the tensor on disk that has this one, and the index of it there."""
        if not self._stacked:
            return self._name(tensor), ()
        name = self._name(tensor.stacked())
        if len(self.files.shape(name)) < 3:
            return name, ()  # it is one multiplier for the whole layer
        size = self.shape.intermediate
        rows = {"gate": slice(0, size), "up": slice(size, 2 * size)}.get(tensor.matrix, slice(None))
        assert tensor.expert is not None
        return name, (tensor.expert, slice(None), rows) if self._k_first else (tensor.expert, rows)

    def other_names(self) -> Iterator[str]:
        """Yield the name of every tensor that read() does not read, file by file."""
        experts = set(self._names.values())
        return (name for name in self.files if name not in experts)

    def _has_no_input_scales(self) -> bool:
        return self.format != "dense" and not any(
            tensor.part == PARTS[self.format].input_scale for tensor in self._names
        )

    def _read_shape(self, num_layers: int) -> tuple[bool, MoEShape]:
        """Return whether stacked experts are K-first, that is [E, in, out], and the shape."""
        layers = tuple(sorted({tensor.layer for tensor in self._names}))
        packing, weight = (1, "weight") if self.format == "dense" else (2, PARTS[self.format].packed)
        if not self._stacked:
            gate = next(name for t, name in self._names.items() if t.matrix == "gate" and t.part == weight)
            intermediate, entries = self.files.shape(gate)
            num_experts = 1 + max(tensor.expert or 0 for tensor in self._names)
            self._check_complete(layers, num_experts, weight)
            return False, MoEShape(num_layers, layers, num_experts, entries * packing, intermediate)
        gate_up = self.files.shape(self._name(ExpertTensor(layers[0], None, "gate_up", weight)))
        down = self.files.shape(self._name(ExpertTensor(layers[0], None, "down", weight)))
        sizes = stacked_sizes(gate_up, down, packing=packing)
        if sizes is None:
            raise ValueError(f"{self.path}: shapes of gate_up_proj {gate_up} and down_proj {down} do not fit")
        k_first, hidden, intermediate = sizes
        return k_first, MoEShape(num_layers, layers, down[0], hidden, intermediate)

    def _check_complete(self, layers: tuple[int, ...], num_experts: int, weight: str) -> None:
        """Raise ValueError if an expert lacks a matrix: a file is missing, and there is no index that names it."""
        for layer, expert in itertools.product(layers, range(num_experts)):
            for matrix in ("gate", "up", "down"):
                self._name(ExpertTensor(layer, expert, matrix, weight))

    def _matrices(self, layer: int, expert: int) -> tuple[ExpertTensor, ExpertTensor, ExpertTensor]:
        """Return the weights of gate, up and down. Raises ValueError if there is no such expert."""
        if layer not in self.shape.moe_layers or not 0 <= expert < self.shape.num_experts:
            raise ValueError(
                f"{self.path}: has no expert {expert} in layer {layer}, only {self.shape.num_experts} in each of "
                f"the layers {list(self.shape.moe_layers)}"
            )
        gate, up, down = (ExpertTensor(layer, expert, matrix, "weight") for matrix in ("gate", "up", "down"))
        return gate, up, down

    def _name(self, tensor: ExpertTensor) -> str:
        if tensor not in self._names:
            which = "" if tensor.expert is None else f", expert {tensor.expert}"
            raise ValueError(
                f"{self.path}: no {tensor.part} for {tensor.matrix} of layer {tensor.layer}{which}; "
                "the checkpoint is incomplete, download it again"
            )
        return self._names[tensor]
