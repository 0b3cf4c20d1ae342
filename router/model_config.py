"""A checkpoint's config.json: whether we serve that model, and the sizes of its dense part."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = ("qwen3_moe", "minimax_m2", "glm4_moe", "mixtral", "ernie4_5_moe", "hy_v3")
"""Model types that are tested against transformers' own `generate`."""


@dataclass(frozen=True)
class TrunkShape:
    """max_model_len: tokens of prompt and answer together."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    vocab_size: int
    max_model_len: int


def check_family(path: Path) -> None:
    """ValueError for a directory that is no checkpoint, or one of a model type that we do not serve. Reads JSON only."""
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: no config.json, so this is not a checkpoint directory")
    try:
        model_type = json.loads(file.read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if model_type not in FAMILIES:
        raise ValueError(
            f"{path}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )


def read_config(path: Path) -> "PreTrainedConfig":
    """The model's config, checked: ValueError says what is not supported."""
    from transformers import AutoConfig  # seconds, which a check of the family need not wait for

    check_family(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if config.hidden_act != "silu":
        raise ValueError(
            f"{path}: hidden_act {config.hidden_act!r} is not supported, only silu (SwiGLU experts)"
        )
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise ValueError(
            f"{path}: sliding-window attention ({config.sliding_window} tokens) is not supported"
        )
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"{path}: rope scaling {rope_type!r} depends on a request's length and is not supported"
        )
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # transformers has no quantiser for it; our reader dequantises
    return config


def shape_of(config: "PreTrainedConfig") -> TrunkShape:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return TrunkShape(
        num_layers=config.num_hidden_layers,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden=config.hidden_size,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
    )
