"""Trunk: the dense part of the model, transformers' modelling code with our attention and our experts hooked in.

T rows of a step, N rows whose logits are wanted, D hidden, K top-k, V vocabulary.
"""

import re
import threading
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.logging import disable_progress_bar

from experts.checkpoint.index import CheckpointIndex
from experts.checkpoint.reader import trunk_tensors
from experts.progress import Report, silent
from router.kernels import our_kernels_run
from router.model.attention import ATTENTION, AttentionPlan, PagedAttention, set_attention
from router.model.fuse_cpu import fuse_norms, fuse_rope
from router.model_config import read_config, shape_of


class RoutedExperts(Protocol):
    """Whoever computes the routed experts of a layer: the Dispatcher, or a calibration's recorder."""

    def moe(self, layer: int, x_TD: Tensor, logical_TK: Tensor, w_TK: Tensor) -> Tensor:
        """Return the routed experts' output [T, D], given the gate's top-k experts and their weights."""
        ...


class Trunk:
    """Embedding, attention, gate, shared experts and head. Used by one thread at a time."""

    def __init__(
        self, model: Any, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Take over a model of a class that `_without_experts` made, and move it to the device."""
        self.shape = shape_of(config)
        self.dtype = dtype
        self.device = device
        self._model = model.to(device).eval()
        fuse_norms(model)
        if our_kernels_run(dtype, device):
            fuse_rope(model)
            if device.type == "cuda":
                from router.model.fuse_gpu import fuse_attention, fuse_gates, fuse_layers, fuse_products

                fuse_attention(model)
                fuse_products(model)
                fuse_gates(model)
                fuse_layers(model)

    @classmethod
    def load(
        cls, path: Path, *, dtype: torch.dtype, device: torch.device, report: Report = silent
    ) -> "Trunk":
        """Read the dense part of a checkpoint. Raises ValueError, in a sentence, for one that we do not serve."""
        config = read_config(path)
        shape_of(config)  # refuses what we do not serve before anything large is read
        model = _load(path, config, dtype=dtype, report=report)
        with CheckpointIndex(path) as index:
            _check_experts(model, index)
        return cls(model, config, dtype=dtype, device=device)

    @classmethod
    def random(cls, config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device) -> "Trunk":
        """Return a trunk whose weights are drawn anew, for benchmarks."""
        family: Any = _without_experts(config)
        with torch.device("meta"):  # which the experts, larger than any memory, never leave
            model = family._from_config(
                config, dtype=dtype, attn_implementation=ATTENTION, experts_implementation=_EXPERTS
            )
        model.to_empty(device=device).init_weights()
        return cls(model, config, dtype=dtype, device=device)

    @torch.inference_mode()
    def forward(
        self,
        input_T: Tensor,
        position_T: Tensor,
        *,
        keep_N: Tensor | None,
        attention: PagedAttention,
        plan: AttentionPlan,
        experts: RoutedExperts,
    ) -> Tensor:
        """Compute a step: return the logits [N, V] of the rows keep_N, or of all, in the trunk's dtype.

        input_T, position_T: int64, the token and its position of each row. plan: the attention's, for these rows.
        """
        attention.plan = plan
        set_attention(attention)
        _current.experts = experts
        output = self._model(
            input_ids=input_T[None],
            position_ids=position_T[None],
            use_cache=False,
            logits_to_keep=0 if keep_N is None else keep_N,
        )
        return output.logits[0]


def _load(path: Path, config: PreTrainedConfig, *, dtype: torch.dtype, report: Report) -> Any:
    disable_progress_bar()  # theirs: it writes into logs, and ours tells how far it is
    family: Any = _without_experts(config)
    model, info = family.from_pretrained(
        None,
        config=config,
        state_dict=dict(trunk_tensors(path, dtype=dtype, report=report)),
        dtype=dtype,
        attn_implementation=ATTENTION,
        experts_implementation=_EXPERTS,
        ignore_mismatched_sizes=True,  # so that it reports them, and we refuse them with a sentence
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
    return model


def _check_experts(model: torch.nn.Module, index: CheckpointIndex) -> None:
    """Raise ValueError unless the checkpoint has experts for exactly the gates that the model has."""
    experts: Any = (module for module in model.modules() if hasattr(module, "_is_expert_parallel"))
    wanted = {module.layer_idx: module.num_experts for module in experts}
    found = dict.fromkeys(index.shape.moe_layers, index.shape.num_experts)
    if wrong := sorted(layer for layer in wanted | found if wanted.get(layer) != found.get(layer)):
        raise ValueError(
            f"{index.path}: layer {wrong[0]} has {found.get(wrong[0], 0)} experts on disk, "
            f"but its gate chooses among {wanted.get(wrong[0], 0)}; download the checkpoint again"
        )


_EXTRA = re.compile(
    r"(^|\.)(mtp|eh_proj|enorm|hnorm|shared_head)\.|rotary_emb\.inv_freq$|layers\.\d+\.embed_tokens"
)
"""Tensors that checkpoints carry and a causal language model does not: multi-token prediction, derived buffers."""


def _without_experts(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the family's model class, changed so that expert modules are built without parameters and know their layer."""
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
    """Implement transformers' experts interface."""
    return _current.experts.moe(module.layer_idx, x_TD, logical_TK, w_TK)


_EXPERTS = "sparkmoe"
ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, _routed)
