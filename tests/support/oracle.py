"""Oracle: transformers' own full model, in float32, over the dequantised NVFP4 weights of a checkpoint.

Of ours it uses only the reader of checkpoints. T tokens, V vocabulary.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from experts.checkpoint.reader import ExpertCheckpoint, trunk_tensors
from experts.nvfp4 import dequantize

NEAR_TIE = 1e-4
"""Two float32 computations may differ in which of two tokens they choose if the logits are closer than this."""


@dataclass(frozen=True)
class Continuation:
    """The tokens that continue a prompt. margins: by how much each token's logit exceeds the runner-up's."""

    tokens: tuple[int, ...]
    margins: tuple[float, ...]


class Oracle:
    """A model that only tests load: all experts at once, in float32."""

    def __init__(self, path: Path, *, replaced: Mapping[str, Tensor] | None = None) -> None:
        """Load a checkpoint. replaced: tensors that stand in for the checkpoint's."""
        tensors = dict(trunk_tensors(path)) | dict(_dequantised_experts(path)) | dict(replaced or {})
        self.model: Any = load_model(path, tensors)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[Continuation]:
        """Continue prompts greedily by transformers' `generate`, in one batch padded on the left; end tokens
        do not end it."""
        longest = max(map(len, prompts))
        padding = [[0] * (longest - len(prompt)) for prompt in prompts]
        made = self.model.generate(
            torch.tensor([[*pad, *prompt] for pad, prompt in zip(padding, prompts, strict=True)]),
            attention_mask=torch.tensor([[0] * len(pad) + [1] * (longest - len(pad)) for pad in padding]),
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        tokens_BT = made.sequences[:, longest:].tolist()
        top_BT2 = torch.stack(made.logits, dim=1).topk(2).values
        margins_BT = (top_BT2[..., 0] - top_BT2[..., 1]).tolist()
        return [Continuation(tuple(t), tuple(m)) for t, m in zip(tokens_BT, margins_BT, strict=True)]

    @torch.inference_mode()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Return logits [T, V]: row t predicts the token after tokens[t]."""
        return self.model(torch.tensor([tokens]), use_cache=False).logits[0]


def load_model(path: Path, tensors: dict[str, Tensor]) -> PreTrainedModel:
    """Return transformers' model of a checkpoint's config, in float32, from tensors with their names on disk."""
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    config.__dict__.pop("quantization_config", None)
    family = cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])
    loaded: Any = family.from_pretrained(
        None,
        config=config,
        state_dict=tensors,
        dtype=torch.float32,
        experts_implementation="eager",
        output_loading_info=True,
    )
    model, info = loaded
    assert not any(info.values()), info
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    return model.eval()


def assert_same_tokens(ours: Sequence[int], theirs: Continuation, *, what: str) -> None:
    """Assert that our tokens are the oracle's, or differ only from one on which the oracle all but tosses a coin.

    The latter is a warning, which pytest prints.
    """
    for n, (one, other, margin) in enumerate(zip(ours, theirs.tokens, theirs.margins, strict=False)):
        if one != other:
            difference = f"{what}: token {n} is {one} instead of {other}, where the margin is {margin:.1e}"
            assert margin < NEAR_TIE, difference
            warnings.warn(difference, stacklevel=2)
            return


def _dequantised_experts(path: Path) -> Iterator[tuple[str, Tensor]]:
    with ExpertCheckpoint(path) as checkpoint:
        for layer in checkpoint.shape.moe_layers:
            for expert in range(checkpoint.shape.num_experts):
                weights = checkpoint.read(layer, expert)
                matrices = (weights.gate, weights.up, weights.down)
                for name, matrix in zip(checkpoint.module_names(layer, expert), matrices, strict=True):
                    yield f"{name}.weight", dequantize(matrix, torch.float32)
