"""A checkpoint's config.json as the router reads it: whether we serve the model, and the sizes of its dense part."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES = ("qwen3_moe", "minimax_m2", "glm4_moe", "mixtral", "ernie4_5_moe", "hy_v3")
"""Model types that are tested against transformers' own `generate`."""


ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Kinds of rope scaling that are the same for every request."""


@dataclass(frozen=True)
class TrunkShape:
    """The sizes of a model's dense part. max_model_len: the most tokens of a prompt and its answer together."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    hidden: int
    vocab_size: int
    max_model_len: int


def check_family(path: Path) -> None:
    """Raise ValueError, which says what is not supported, unless the directory is a checkpoint that we serve.

    Reads config.json alone, in the spellings of old and new releases of transformers.
    """
    config = _read(path)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(
            f"{path}: model_type {family!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
    if config.get("text_config") is not None:
        raise ValueError(
            f"{path}: a text_config inside config.json is not supported; transformers ignores it"
        )
    if (activation := config.get("hidden_act", "silu")) != "silu":
        raise ValueError(f"{path}: hidden_act {activation!r} is not supported, only silu (SwiGLU experts)")
    if window := _sliding_window(config):
        raise ValueError(f"{path}: sliding-window attention ({window} tokens) is not supported")
    rope_type = _rope_type(config)
    if rope_type in ("dynamic", "longrope"):
        raise ValueError(
            f"{path}: rope scaling {rope_type!r} depends on a request's length and is not supported"
        )
    if rope_type not in ROPE_TYPES:
        raise ValueError(
            f"{path}: rope scaling {rope_type!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )


def read_config(path: Path) -> "PreTrainedConfig":
    """Return the model's config, checked as check_family does."""
    from transformers import AutoConfig  # seconds, which a check of the family need not wait for

    check_family(path)
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    if hasattr(config, "quantization_config"):
        delattr(config, "quantization_config")  # transformers has no quantiser for it; our reader dequantises
    return config


def shape_of(config: "PreTrainedConfig") -> TrunkShape:
    """Return the sizes that a config says."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return TrunkShape(
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        hidden=config.hidden_size,
        vocab_size=config.vocab_size,
        max_model_len=config.max_position_embeddings,
    )


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: no config.json, so this is not a checkpoint directory")
    try:
        config = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file}: must hold a mapping, not a {type(config).__name__}")
    return config


def _sliding_window(config: dict[str, Any]) -> int | None:
    """Return the sliding window in tokens, 0 or None if there is none. Only qwen3_moe has a switch for it, and a default window."""
    if config["model_type"] == "qwen3_moe":
        return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    return config.get("sliding_window")


def _rope_type(config: dict[str, Any]) -> Any:
    """rope_scaling, and `type` in it, are older than rope_parameters and rope_type; transformers takes all of them."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
