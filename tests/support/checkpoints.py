"""Tiny checkpoints for tests: ModelOpt's own (tests/data/modelopt), and the same weights in every other
layout."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from experts.checkpoint.layouts import parse_expert
from experts.checkpoint.tensor_files import INDEX, TensorFiles
from tests.support.places import ROOT

FIXTURES = ROOT / "tests" / "data" / "modelopt"
DENSE = FIXTURES / "source"
"""A Qwen3-MoE in BF16: layer 0 is dense, 1 and 2 have 2 experts; hidden 16, intermediate 32."""
EXPERTS_ONLY = FIXTURES / "experts-only"
"""The checkpoint DENSE with its experts quantised by ModelOpt."""
WHOLE = FIXTURES / "whole"
"""The checkpoint DENSE with experts and attention quantised by ModelOpt, and scales for an FP8 KV cache."""

Tensors = dict[str, Tensor]


def read_tensors(path: Path) -> Tensors:
    with TensorFiles(path) as files:
        return {name: files.read(name) for name in files}


def rewrite(src: Path, dst: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Write a copy of a checkpoint with changed tensors; config and tokenizer files stay as they are."""
    dst.mkdir(parents=True)
    for file in src.iterdir():
        if file.suffix != ".safetensors" and file.name != INDEX:
            shutil.copyfile(file, dst / file.name)
    save_file(
        {name: tensor.contiguous() for name, tensor in change(read_tensors(src)).items()},
        dst / "model.safetensors",
    )
    return dst


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    values = json.loads(file.read_text()) if file.exists() else {}
    values |= changes
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def write_modelopt(path: Path, *, num_layers: int, num_experts: int, hidden: int, intermediate: int) -> Path:
    """Write a checkpoint in ModelOpt's layout that has experts of random bytes, and nothing else."""
    path.mkdir(parents=True)
    random = torch.Generator().manual_seed(0)
    tensors: Tensors = {}
    for layer in range(num_layers):
        for expert in range(num_experts):
            for matrix, rows, cols in (
                ("gate_proj", intermediate, hidden),
                ("up_proj", intermediate, hidden),
                ("down_proj", hidden, intermediate),
            ):
                stem = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}"
                scale = torch.randint(0x30, 0x40, (rows, cols // 16), dtype=torch.uint8, generator=random)
                tensors[f"{stem}.weight"] = torch.randint(
                    256, (rows, cols // 2), dtype=torch.uint8, generator=random
                )
                tensors[f"{stem}.weight_scale"] = scale.view(torch.float8_e4m3fn)
                tensors[f"{stem}.weight_scale_2"] = torch.tensor(2.0**-10)
                tensors[f"{stem}.input_scale"] = torch.tensor(2.0**-8)
    save_file(tensors, path / "model.safetensors")
    return path


def write_simple_scales(src: Path, dst: Path) -> Path:
    """Write ModelOpt's per-expert layout again, but with multipliers that every layout can store exactly.

    That is, one power of two per layer and matrix: 3-D layouts have one per layer, and the reciprocal is exact.
    """

    def simple(tensors: Tensors) -> Tensors:
        for name, tensor in tensors.items():
            if name.endswith((".weight_scale_2", ".input_scale")):
                matrix = -13 if "down_proj" in name else -12
                tensor.fill_(2.0 ** (matrix if name.endswith("_2") else matrix + 4))
        return tensors

    return rewrite(src, dst, simple)


def write_mixtral_names(src: Path, dst: Path) -> Path:
    """Write ModelOpt's per-expert layout with the names that Mixtral and MiniMax give their experts."""
    words = {
        ".mlp.experts.": ".block_sparse_moe.experts.",
        "gate_proj": "w1",
        "up_proj": "w3",
        "down_proj": "w2",
    }

    def renamed(name: str) -> str:
        if parse_expert(name):
            for qwen, mixtral in words.items():
                name = name.replace(qwen, mixtral)
        return name

    return rewrite(src, dst, lambda tensors: {renamed(name): tensor for name, tensor in tensors.items()})


def write_compressed_tensors(src: Path, dst: Path) -> Path:
    """Convert ModelOpt's per-expert layout to nvfp4-pack-quantized, as llm-compressor writes it."""

    def converted(tensors: Tensors) -> Tensors:
        out: Tensors = {}
        for name, tensor in tensors.items():
            if name.endswith(".weight_scale_2"):
                out[name.replace("weight_scale_2", "weight_global_scale")] = tensor.reciprocal().reshape(1)
            elif name.endswith(".input_scale"):
                out[name.replace("input_scale", "input_global_scale")] = tensor.reciprocal().reshape(1)
            elif tensor.dtype == torch.uint8:
                out[f"{name}_packed"] = tensor
            else:
                out[name] = tensor
        return out

    rewrite(src, dst, converted)
    (dst / "hf_quant_config.json").unlink()
    four_bits = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    group = {"weights": four_bits, "input_activations": four_bits, "targets": ["Linear"]}
    edit_json(
        dst / "config.json",
        quantization_config={
            "quant_method": "compressed-tensors",
            "format": "nvfp4-pack-quantized",
            "config_groups": {"group_0": group},
        },
    )
    return dst


def write_modelopt_3d(src: Path, dst: Path, *, k_first: bool) -> Path:
    """Convert ModelOpt's per-expert layout to stacked experts, [E, in, out] if K-first, else [E, out, in].

    The experts of a layer must share their multipliers (write_simple_scales).
    """

    def joined(of_expert: list[Tensor]) -> Tensor:
        if of_expert[0].ndim == 0:
            return torch.stack(of_expert).unique().reshape(())  # one value, or this fails
        as_bytes = torch.stack([tensor.view(torch.uint8) for tensor in of_expert])
        return (as_bytes.mT.contiguous() if k_first else as_bytes).view(of_expert[0].dtype)

    return rewrite(src, dst, lambda tensors: _stack(tensors, joined))


def write_dense_3d(src: Path, dst: Path) -> Path:
    """Convert BF16 experts to the stacked ones of transformers 5: [E, 2I, H] with gate first, and [E, H, I]."""
    return rewrite(src, dst, lambda tensors: _stack(tensors, torch.stack))


def _stack(tensors: Tensors, joined: Callable[[list[Tensor]], Tensor]) -> Tensors:
    """Replace the experts' tensors by one of all experts for each layer, matrix and part."""
    out: Tensors = {}
    groups: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        at = parse_expert(name)
        if at is None:
            out[name] = tensor
        elif at.matrix != "up":
            if at.matrix == "gate" and tensor.ndim:
                both = (tensor, tensors[name.replace("gate_proj", "up_proj")])
                tensor = torch.cat([half.view(torch.uint8) for half in both]).view(tensor.dtype)
            stacked = "down_proj" if at.matrix == "down" else "gate_up_proj"
            suffix = "" if at.part == "weight" else f"_{at.part}"
            key = f"{name.partition('.experts.')[0]}.experts.{stacked}{suffix}"
            assert at.expert is not None
            groups.setdefault(key, {})[at.expert] = tensor
    return out | {key: joined([of[expert] for expert in sorted(of)]) for key, of in groups.items()}
