"""A tiny random model of every supported family, with all that its family has: dense layers, shared experts,
biases."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from experts.checkpoint.quantize import quantize_checkpoint
from experts.checkpoint.reader import ExpertCheckpoint
from router.model_config import FAMILIES

VOCAB_SIZE = 256
NUM_EXPERTS = 8

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 2,
}
_OF_FAMILY: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": NUM_EXPERTS,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
    "minimax_m2": {"intermediate_size": 32, "num_local_experts": NUM_EXPERTS, "rotary_dim": 8},
    "glm4_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "n_routed_experts": NUM_EXPERTS,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "first_k_dense_replace": 1,
        "attention_bias": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 0,
    },
    "mixtral": {"intermediate_size": 32, "num_local_experts": NUM_EXPERTS},
    "ernie4_5_moe": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": 3,
        "moe_num_shared_experts": 2,
        "moe_layer_start_index": 1,
        "tie_word_embeddings": True,
    },
    "hy_v3": {
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_experts": NUM_EXPERTS,
        "num_shared_experts": 1,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
}
assert _OF_FAMILY.keys() == set(FAMILIES)


def config_of(family: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[family](**(_COMMON | _OF_FAMILY[family]))


def write_dense(family: str, path: Path) -> Path:
    """Write a BF16 checkpoint as transformers saves it. Its tokens are bytes."""
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        tensor.copy_(_random(name, tensor, generator))
    model.save_pretrained(path)
    _byte_tokenizer().save_pretrained(path)
    return path


def write_nvfp4(family: str, path: Path) -> Path:
    """Write the checkpoint of write_dense with its experts quantised, in ModelOpt's layout."""
    dense = write_dense(family, path.with_name(f"{path.name}-dense"))
    with ExpertCheckpoint(dense) as checkpoint:
        amax = dict.fromkeys(checkpoint.shape.moe_layers, (6.0, 6.0))
    quantize_checkpoint(dense, path, amax=amax, progress=False)
    return path


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: n for n, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def _random(name: str, tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Draw weights that keep activations near 1, so that logits differ by much more than rounding does."""
    noise = torch.randn(tensor.shape, generator=generator)
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.2 * noise
    return noise if "embed" in name else 1.5 * noise / tensor.shape[-1] ** 0.5
