"""Quantising a BF16 checkpoint to an NVFP4 one as ModelOpt exports it: only the routed experts are quantised."""

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from experts.checkpoint.hf_config import read_config
from experts.checkpoint.reader import ExpertCheckpoint
from experts.checkpoint.tensor_files import INDEX
from experts.checkpoint.tensor_writer import write_tensors
from experts.nvfp4 import GROUP, input_scale, quantize, scale_2_of
from experts.progress import each, show, silent

_COPIED = ("*.json", "*.jinja", "*.txt", "*.model")  # config, tokenizer, chat template

LayerAmax = tuple[float, float]
"""The largest magnitudes, in calibration, of the inputs of gate and up, and of the inputs of down."""


def quantize_checkpoint(
    src: Path, dst: Path, *, amax: Mapping[int, LayerAmax], progress: bool, file_bytes: int = 2 * 10**9
) -> None:
    """Quantise the checkpoint `src` into `dst`, which appears only when it is complete.

    amax: for every MoE layer; all experts of a layer share the input scales that follow from it.
    file_bytes: the size of each output file, and about the memory that this takes.
    Raises ValueError for a dst that is not empty, or a src that is quantised or whose sizes NVFP4 does not fit.
    """
    check_destination(dst)
    dst = dst.resolve()  # "." has no name
    with ExpertCheckpoint(src) as checkpoint:
        _check_source(checkpoint)
        _check_amax(amax, checkpoint.shape.moe_layers)
        dst.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as scratch:
            partial = Path(scratch) / dst.name
            partial.mkdir()
            _copy_small_files(src, partial)
            (partial / "hf_quant_config.json").write_text(json.dumps(_hf_quant_config(checkpoint), indent=4))
            write_tensors(partial, _tensors(checkpoint, amax, progress=progress), file_bytes=file_bytes)
            partial.rename(dst)


def check_destination(dst: Path) -> None:
    """Raise ValueError unless quantize_checkpoint may write there: to be called before a long calibration."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst}: exists and is not an empty directory; remove it or choose another")


def _check_source(checkpoint: ExpertCheckpoint) -> None:
    if checkpoint.format != "dense" or read_config(checkpoint.path).quantised:
        raise ValueError(f"{checkpoint.path}: is already quantised; give the BF16 checkpoint")
    hidden, intermediate = checkpoint.shape.hidden, checkpoint.shape.intermediate
    if hidden % GROUP or intermediate % GROUP:
        raise ValueError(
            f"{checkpoint.path}: NVFP4 needs expert sizes that are multiples of {GROUP}, "
            f"these are hidden {hidden}, intermediate {intermediate}"
        )


def _check_amax(amax: Mapping[int, LayerAmax], moe_layers: tuple[int, ...]) -> None:
    for layer in moe_layers:
        if layer not in amax or not all(math.isfinite(value) and value > 0 for value in amax[layer]):
            raise ValueError(
                f"calibration gives layer {layer} the input magnitudes {amax.get(layer)}, "
                "but two positive numbers are needed; calibrate on more text"
            )


def _copy_small_files(src: Path, dst: Path) -> None:
    for pattern in _COPIED:
        for file in src.glob(pattern):
            if file.name != INDEX:
                shutil.copyfile(file, dst / file.name)


def _hf_quant_config(checkpoint: ExpertCheckpoint) -> dict[str, object]:
    """Return the config that ModelOpt 0.47 writes, whose name servers look for.

    Exclusions are full names where ModelOpt has wildcards.
    """
    excluded = {"lm_head"}  # it has no tensor of its own where embeddings are tied
    for name in checkpoint.other_names():
        if name.endswith(".weight") and len(checkpoint.files.shape(name)) > 1:
            excluded.add(name.removesuffix(".weight"))
    return {
        "producer": {"name": "modelopt", "version": "0.47.0"},
        "quantization": {
            "quant_algo": "NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": GROUP,
            "exclude_modules": sorted(excluded),
        },
    }


def _tensors(
    checkpoint: ExpertCheckpoint, amax: Mapping[int, LayerAmax], *, progress: bool
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the new checkpoint: copied ones first, then expert by expert, so that each lies in one place."""
    for name in checkpoint.other_names():
        yield name, checkpoint.files.read(name)
    shape = checkpoint.shape
    experts = [(layer, expert) for layer in shape.moe_layers for expert in range(shape.num_experts)]
    for layer, expert in each(experts, "experts", show("quantize") if progress else silent):
        yield from _quantize_expert(checkpoint, layer, expert, amax[layer])


def _quantize_expert(
    checkpoint: ExpertCheckpoint, layer: int, expert: int, amax: LayerAmax
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of one expert. gate and up share one scale_2, because kernels that fuse them have room for one."""
    weights = checkpoint.read_dense(layer, expert)
    gate_amax, up_amax, down_amax = (w_NK.abs().amax() for w_NK in weights)
    gate_up_scale_2 = scale_2_of(torch.maximum(gate_amax, up_amax))
    scales_2 = gate_up_scale_2, gate_up_scale_2, scale_2_of(down_amax)
    input_amaxes = amax[0], amax[0], amax[1]
    modules = checkpoint.module_names(layer, expert)
    for module, w_NK, scale_2, input_amax in zip(modules, weights, scales_2, input_amaxes, strict=True):
        if not w_NK.isfinite().all():
            raise ValueError(f"{checkpoint.path}: {module} has weights that are not finite")
        quantised = quantize(w_NK, scale_2=scale_2)
        yield f"{module}.weight", quantised.packed
        yield f"{module}.weight_scale", quantised.scale
        yield f"{module}.weight_scale_2", scale_2.clone()  # safetensors refuses tensors that share memory
        yield f"{module}.input_scale", input_scale(input_amax)
