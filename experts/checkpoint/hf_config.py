"""The facts in a checkpoint's JSON files that its tensors do not show."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experts.checkpoint.tensor_files import read_json

_TOP_K = ("num_experts_per_tok", "moe_k")
_SUPPORTED = (None, "NVFP4", "W4A16_NVFP4")


@dataclass(frozen=True)
class CheckpointConfig:
    """The facts that config.json and hf_quant_config.json state.

    num_layers: decoder layers, None where config.json is missing; layers beyond are multi-token prediction.
    quantised: some tensors are quantised, in whatever way.
    weights_only: W4A16, that is, the kernel takes 16-bit activations and there are no input scales.
    top_k: experts per token, None where config.json does not say.
    """

    num_layers: int | None
    quantised: bool
    weights_only: bool
    top_k: int | None


def read_config(path: Path) -> CheckpointConfig:
    """Read a checkpoint's JSON files. Raises ValueError for experts quantised with an unsupported algorithm.

    hf_quant_config.json takes precedence over config.json's quantization_config, which older exports lack.
    """
    config = _read(path / "config.json")
    stated: dict[str, Any] = config.get("quantization_config") or {}
    of_text: dict[str, Any] = config.get("text_config", config)
    modelopt: dict[str, Any] = _read(path / "hf_quant_config.json").get("quantization") or stated
    algorithm = _expert_algorithm(modelopt)
    if algorithm not in _SUPPORTED:
        raise ValueError(
            f"{path}: experts quantised as {algorithm} are not supported; NVFP4 and W4A16_NVFP4 are"
        )
    return CheckpointConfig(
        num_layers=of_text.get("num_hidden_layers"),
        quantised=bool(modelopt),
        weights_only=algorithm == "W4A16_NVFP4" or _without_input_scales(stated),
        top_k=next((of_text[name] for name in _TOP_K if name in of_text), None),
    )


def _read(file: Path) -> dict[str, Any]:
    """Return a file's JSON object, empty if there is no such file."""
    return read_json(file) if file.is_file() else {}


def _expert_algorithm(quantization: dict[str, Any]) -> str | None:
    """Return ModelOpt's quant_algo, that of the routed experts where layers differ; None if it is not stated."""
    algorithm = quantization.get("quant_algo")
    if algorithm != "MIXED_PRECISION":
        return algorithm
    layers: dict[str, dict[str, Any]] = quantization.get("quantized_layers") or {}
    of_experts = {str(layer.get("quant_algo")) for name, layer in layers.items() if ".experts" in name}
    return " and ".join(sorted(of_experts)) or None


def _without_input_scales(quantization: dict[str, Any]) -> bool:
    """Return whether every group of 4-bit weights leaves activations alone, whatever quant_algo says."""
    groups = [
        group
        for group in (quantization.get("config_groups") or {}).values()
        if (group.get("weights") or {}).get("num_bits") == 4
    ]
    return bool(groups) and all(group.get("input_activations") is None for group in groups)
