"""Trunk: the dense part of the model. transformers' modelling code with our attention and our experts hooked in.

T rows of a step, N rows whose logits are wanted, D hidden, K top-k, V vocabulary.
"""

import json
import re
import threading
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from experts.checkpoint import trunk_tensors
from router.attention import ATTENTION, AttentionPlan, PagedAttention, set_attention
from router.shape import shape_of

FAMILIES = ("qwen3_moe", "minimax_m2", "glm4_moe", "mixtral", "ernie4_5_moe", "hy_v3")
"""Model types that are tested against transformers' own `generate`."""


class RoutedExperts(Protocol):
    """What computes the routed experts of a layer: the Dispatcher, or a calibration's recorder."""

    def moe(self, layer: int, x_TD: Tensor, logical_TK: Tensor, w_TK: Tensor) -> Tensor: ...


class Trunk:
    """Embedding, attention, gate, shared experts and head. Used by one thread at a time."""

    def __init__(self, path: Path, *, dtype: torch.dtype, device: torch.device) -> None:
        """Raises ValueError, in a sentence, for a checkpoint that we do not serve."""
        config = read_config(path)
        self.shape = shape_of(config)
        self.dtype = dtype
        self.device = device
        self._model = _load(path, config, dtype=dtype, device=device)

    @torch.inference_mode()
    def forward(
        self,
        input_T: Tensor,
        position_T: Tensor,
        *,
        keep_N: Tensor,
        attention: PagedAttention,
        plan: AttentionPlan,
        experts: RoutedExperts,
    ) -> Tensor:
        """Logits [N, V] of the rows keep_N, in the trunk's dtype."""
        attention.plan = plan
        set_attention(attention)
        _current.experts = experts
        output = self._model(
            input_ids=input_T[None], position_ids=position_T[None], use_cache=False, logits_to_keep=keep_N
        )
        return output.logits[0]


def read_config(path: Path) -> PreTrainedConfig:
    """The model's config, checked: ValueError says what is not supported."""
    if not (path / "config.json").is_file():
        raise ValueError(f"{path}: no config.json, so this is not a checkpoint directory")
    try:
        model_type = json.loads((path / "config.json").read_text()).get("model_type")
    except json.JSONDecodeError as error:
        raise ValueError(f"{path / 'config.json'}: not valid JSON: {error}") from error
    if model_type not in FAMILIES:
        raise ValueError(
            f"{path}: model_type {model_type!r} is not supported; supported are {', '.join(FAMILIES)}"
        )
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


def _load(path: Path, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device) -> Any:
    family: Any = _without_experts(config)
    model, info = family.from_pretrained(
        None,
        config=config,
        state_dict=dict(trunk_tensors(path, dtype=dtype)),
        dtype=dtype,
        attn_implementation=ATTENTION,
        experts_implementation=_EXPERTS,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(
                f"{path}: trunk tensors with {kind.replace('_', ' ')}: {sorted(map(str, info[kind]))[:3]}"
            )
    unexpected = [name for name in info["unexpected_keys"] if not _EXTRA.search(name)]
    if unexpected:
        raise ValueError(f"{path}: trunk tensors that the model does not have: {sorted(unexpected)[:3]}")
    return model.to(device).eval()


_EXTRA = re.compile(
    r"(^|\.)(mtp|eh_proj|enorm|hnorm|shared_head)\.|rotary_emb\.inv_freq$|layers\.\d+\.embed_tokens"
)
"""Tensors that checkpoints carry and a causal language model does not: multi-token prediction, derived buffers."""


def _without_experts(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The family's model class, whose expert modules are built without parameters and know their layer."""
    family = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])

    def __init__(self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        family.__init__(self, config, *args, **kwargs)
        for name, module in self.named_modules():
            if hasattr(module, "_is_expert_parallel"):  # every module that @use_experts_implementation marks
                layer = re.search(r"layers\.(\d+)\.", name)
                assert layer, name
                module.__dict__["layer_idx"] = int(layer[1])
                for parameter in list(module._parameters):
                    del module._parameters[parameter]
                module._is_hf_initialized = True  # else transformers initialises the deleted parameters

    return type(f"{family.__name__}Trunk", (family,), {"__init__": __init__, "__module__": family.__module__})


_current = threading.local()


def _routed(module: torch.nn.Module, x_TD: Tensor, logical_TK: Tensor, w_TK: Tensor) -> Tensor:
    """transformers' experts interface."""
    return _current.experts.moe(module.layer_idx, x_TD, logical_TK, w_TK)


_EXPERTS = "sparkmoe"
ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _routed)
