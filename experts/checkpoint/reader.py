"""Reading checkpoints: ExpertCheckpoint reads routed experts one at a time, trunk_tensors() all other tensors."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from experts.checkpoint.hf_config import read_config
from experts.checkpoint.index import CheckpointIndex
from experts.checkpoint.layouts import PARTS, ExpertTensor, count_layers, layer_of, parse_expert
from experts.checkpoint.tensor_files import TensorFiles
from experts.checkpoint.tensor_stream import read_tensors
from experts.nvfp4 import GROUP, dequantize
from experts.progress import Report, each, silent
from experts.weights import ExpertWeights, Nvfp4Weight


class ExpertCheckpoint(CheckpointIndex):
    """A reader of single experts of a checkpoint, for one thread. The tensors that it returns own their memory.

    Raises ValueError, naming file, tensor or expert, for a checkpoint that is broken or not supported.
    """

    _framework = "pt"

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """Read an NVFP4 expert. gate and up keep a scale_2 each; of their input scales the larger is taken.

        This is the slow and obvious way; see ExpertStream for many experts.
        """
        values = {tensor: self._read(tensor) for tensor in self.tensors_of(layer, expert)}
        return self.assemble(layer, expert, values)

    def tensors_of(self, layer: int, expert: int) -> tuple[ExpertTensor, ...]:
        """Return the tensors that an NVFP4 expert is made of."""
        if self.format == "dense":
            raise ValueError(
                f"{self.path}: experts are not quantised; run `sparkmoe quantize {self.path} DST`"
            )
        parts = PARTS[self.format]
        wanted = (
            parts.packed,
            parts.scale,
            parts.scale_2,
            *(() if self.weights_only else (parts.input_scale,)),
        )
        return tuple(
            matrix._replace(part=part) for matrix in self._matrices(layer, expert) for part in wanted
        )

    def assemble(self, layer: int, expert: int, values: Mapping[ExpertTensor, Tensor]) -> ExpertWeights:
        """Return the expert that these tensors make, on their device, for whose answers nobody waits.

        values: as they are stored, for each of tensors_of(). Where experts are stacked K-first, matrices are [in, out].
        """
        gate, up, down = self._matrices(layer, expert)
        input_scale = down_input_scale = None
        if not self.weights_only:
            of_gate, of_up, down_input_scale = (
                self._multiplier(matrix, PARTS[self.format].input_scale, values)
                for matrix in (gate, up, down)
            )
            input_scale = torch.maximum(of_gate, of_up)
        return ExpertWeights(
            self._nvfp4(gate, values),
            self._nvfp4(up, values),
            self._nvfp4(down, values),
            input_scale,
            down_input_scale,
        )

    def read_dense(self, layer: int, expert: int) -> tuple[Tensor, Tensor, Tensor]:
        """Read gate [I, D], up [I, D] and down [D, I] of an expert that is not quantised, in the checkpoint's dtype."""
        if self.format != "dense":
            raise ValueError(f"{self.path}: experts are already quantised ({self.format})")
        gate, up, down = (
            self._checked(m, self._read(m), m.size(self.shape), _FLOATS)
            for m in self._matrices(layer, expert)
        )
        return gate, up, down

    def _read(self, tensor: ExpertTensor) -> Tensor:
        name, index = self.locate(tensor)
        return self.files.read(name, *index)

    def _nvfp4(self, matrix: ExpertTensor, values: Mapping[ExpertTensor, Tensor]) -> Nvfp4Weight:
        parts = PARTS[self.format]
        num_rows, num_cols = matrix.size(self.shape)
        packed, scale = matrix._replace(part=parts.packed), matrix._replace(part=parts.scale)
        return Nvfp4Weight(
            self._checked(packed, values[packed], (num_rows, num_cols // 2), (torch.uint8,)),
            self._checked(scale, values[scale], (num_rows, num_cols // GROUP), (torch.float8_e4m3fn,)),
            self._multiplier(matrix, parts.scale_2, values),
        )

    def _multiplier(self, matrix: ExpertTensor, part: str, values: Mapping[ExpertTensor, Tensor]) -> Tensor:
        """Return a multiplier, float32 [], not inverted."""
        tensor = matrix._replace(part=part)
        value = self._checked(tensor, values[tensor], (), (torch.float32,))
        return value.reciprocal() if PARTS[self.format].inverse else value

    def _checked(
        self, tensor: ExpertTensor, value: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> Tensor:
        """Return a tensor as stored in the order [out, in].

        Raises ValueError if it has another shape or dtype; a scalar may be stored as [1].
        """
        value = value.T.contiguous() if self._k_first and value.ndim == 2 else value
        value = value.reshape(()) if value.numel() == 1 and not shape else value
        if tuple(value.shape) != shape or value.dtype not in dtypes:
            name, _ = self.locate(tensor)
            raise ValueError(
                f"{self.path}: {name} gives layer {tensor.layer}, expert {tensor.expert} a {value.dtype} tensor of "
                f"shape {list(value.shape)}, but {list(shape)} of {dtypes[0]} was expected"
            )
        return value


_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def trunk_tensors(
    path: Path, *, dtype: torch.dtype = torch.bfloat16, report: Report = silent
) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the model but the routed experts', with the name that it has in the unquantised model.

    NVFP4 and FP8 weights are dequantised to `dtype`; others come as they are stored. Scales are consumed, and
    layers of multi-token prediction left out. Raises ValueError for a weight quantised in another way.
    """
    with TensorFiles(path) as files:
        num_layers = count_layers(files, stated=read_config(path).num_layers)
        names = [
            name
            for name in files
            if not parse_expert(name) and (layer_of(name) or 0) < num_layers and not name.endswith(_CONSUMED)
        ]
        spans = [files.span(name)[0] for name in names]
        values = read_tensors(spans)
        for name in each(names, "tensors", report, sizes=[span.size for span in spans]):
            yield name.replace(".weight_packed", ".weight"), _dequantize(files, name, next(values), dtype)


_CONSUMED = (
    ".weight_scale",
    ".weight_scale_2",
    ".weight_scale_inv",
    ".weight_global_scale",
    ".input_scale",
    ".input_global_scale",
    ".output_scale",
    ".q_scale",
    ".k_scale",
    ".v_scale",
)
"""The names of scales: those of weights, and those of activations and a KV cache, which the trunk does not quantise."""


def _dequantize(files: TensorFiles, name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of the trunk as it is in the unquantised model. value: as it is stored."""
    stem = name.rpartition(".")[0]
    if name.endswith(".weight_packed") and f"{stem}.weight_global_scale" in files:
        scale_2 = files.read(f"{stem}.weight_global_scale").reciprocal().reshape(())
        return dequantize(Nvfp4Weight(value, files.read(f"{stem}.weight_scale"), scale_2), dtype)
    if value.dtype == torch.uint8 and f"{stem}.weight_scale_2" in files:
        scale_2 = files.read(f"{stem}.weight_scale_2").reshape(())
        return dequantize(Nvfp4Weight(value, files.read(f"{stem}.weight_scale"), scale_2), dtype)
    if value.dtype == torch.float8_e4m3fn and f"{stem}.weight_scale" in files:
        return _dequantize_fp8(value, files.read(f"{stem}.weight_scale"), name=f"{files.path}: {name}").to(
            dtype
        )
    if value.is_floating_point() and value.element_size() > 1 and not name.endswith(".pre_quant_scale"):
        return value
    raise ValueError(f"{files.path}: {name} ({value.dtype}) is quantised in a way that is not supported")


def _dequantize_fp8(value_NK: Tensor, scale: Tensor, *, name: str) -> Tensor:
    """Return the matrix in float32. scale: one for the whole matrix, or one for each row."""
    if tuple(scale.shape) not in ((), (1,), (len(value_NK),), (len(value_NK), 1)):
        raise ValueError(
            f"{name} has FP8 scales of shape {list(scale.shape)}; per tensor and per row are supported"
        )
    return value_NK.float() * scale.float().reshape(-1, 1)
