"""Models of real shapes with random weights: in memory on a GPU, for benchmarks, or on disk, for a whole server.

    python -m tests.bench.random_model --shape qwen3-235b-a22b --layers 4 --write DIR

Experts are random NVFP4 codes, in ModelOpt's layout on disk, all else is random bfloat16; activations stay near 1. The
tokenizer knows a text for every id.
"""

import argparse
import itertools
import json
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast, Qwen3MoeConfig

from experts.backends.triton.kernels import SCALE_SHIFT
from experts.checkpoint.tensor_writer import write_tensors
from experts.fabric.local import LocalFabric, local_membership
from experts.nvfp4 import GROUP
from experts.placement import place_evenly
from experts.shard import ExpertShard
from experts.weights import MoEShape
from router.config import RouterConfig
from router.engine import Engine
from router.model.trunk import Trunk
from router.request import RequestOutput
from router.text.tokenizer import Tokenizer

_qwen3: Any = partial(
    cast(Any, Qwen3MoeConfig),
    vocab_size=151936,
    head_dim=128,
    num_key_value_heads=4,
    num_experts=128,
    num_experts_per_tok=8,
    norm_topk_prob=True,
    max_position_embeddings=40960,
    rope_theta=1e6,
    tie_word_embeddings=False,
)
SHAPES: dict[str, PreTrainedConfig] = {
    "qwen3-30b-a3b": _qwen3(
        hidden_size=2048, moe_intermediate_size=768, num_hidden_layers=48, num_attention_heads=32
    ),
    "qwen3-235b-a22b": _qwen3(
        hidden_size=4096, moe_intermediate_size=1536, num_hidden_layers=94, num_attention_heads=64
    ),
}

SCALES = (0x28, 0x40)
"""The range of e4m3 bits of block scales, from 1/4 to below 2: their products with E2M1 values have a root
mean square of 2.6."""

INPUT_SCALE = 2.0**-8
"""The input scale: blocks of activations keep their full precision up to 10 and beyond."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--layers", type=int, help="the model's first ones; all of them if not given")
    parser.add_argument("--write", type=Path, required=True, metavar="DIR")
    arguments = parser.parse_args()
    config = SHAPES[arguments.shape]
    config.num_hidden_layers = arguments.layers or config.num_hidden_layers
    write_checkpoint(config, arguments.write)


def expert_shape(config: Any) -> MoEShape:
    layers = tuple(range(config.num_hidden_layers))
    sizes = config.num_experts, config.hidden_size, config.moe_intermediate_size
    return MoEShape(len(layers), layers, *sizes)


def layers_that_fit(config: Any, num_bytes: int, *, num_tokens: int, free: int) -> int:
    """Return how many of the config's layers fit with keys and values of so many tokens; `free` bytes are
    left to activations and graphs."""
    expert = 3 * config.hidden_size * config.moe_intermediate_size * 9 // 16
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * heads * config.head_dim * 2
    cached = num_tokens * config.num_key_value_heads * config.head_dim * 2 * 2
    embeddings = 2 * config.vocab_size * config.hidden_size * 2
    return min(
        config.num_hidden_layers,
        (num_bytes - free - embeddings) // (config.num_experts * expert + attention + cached),
    )


class RandomEngine(Engine):
    """An engine over one shard in its own process, on backend triton."""

    def __init__(self, config: Any, *, router: RouterConfig, num_tokens: int, device: torch.device) -> None:
        """Build the engine. num_tokens: how many the KV cache holds."""
        trunk = Trunk.random(config, dtype=torch.bfloat16, device=device)
        self.shard = random_shard(config, device)
        bytes_a_token = 2 * trunk.shape.num_layers * trunk.shape.num_kv_heads * trunk.shape.head_dim * 2
        with tempfile.TemporaryDirectory() as folder:
            random_tokenizer(config.vocab_size).save_pretrained(folder)
            tokenizer = Tokenizer(Path(folder))
        super().__init__(
            trunk,
            LocalFabric([self.shard]),
            tokenizer,
            config=router,
            kv_bytes=num_tokens * bytes_a_token,
            eos=frozenset(),
            on_outputs=_check,
            on_lost=_fail,
        )
        self.adopt(local_membership(place_evenly(self.shard.shape, num_ranks=1)))


def _check(outputs: Sequence[RequestOutput]) -> None:
    """Raise what a request failed with: an engine goes on without the requests that fail, a benchmark must
    not."""
    for output in outputs:
        assert output.error is None, output.error


def _fail(loss: Exception) -> None:
    raise loss


def random_shard(config: Any, device: torch.device) -> ExpertShard:
    """Return a shard whose weights are drawn where the kernels read them: the scales and codes of no
    checkpoint, but as many bytes."""
    shape = expert_shape(config)
    shard = ExpertShard(
        shape,
        rank=0,
        slots_per_rank=shape.num_experts,
        backend="triton",
        dtype=torch.bfloat16,
        device=device,
    )
    scale_2_3 = torch.tensor([scale_2(shape.hidden), scale_2(shape.hidden), scale_2(shape.intermediate)])
    backend: Any = shard._backend
    for layer in backend._layers.values():
        for packed_eNJ, scale_eNGh in (layer.gate_up, layer.down):
            packed_eNJ.random_(0, 256)
            scale_eNGh.random_(*SCALES)
        layer.scale_2_e3.copy_(scale_2_3 * 2.0**SCALE_SHIFT)
    return shard


def scale_2(num_inputs: int) -> float:
    """Return the multiplier with which a product of inputs near 1 is near 1."""
    return num_inputs**-0.5 / 2.6


def write_checkpoint(config: Any, path: Path, *, file_bytes: int = 4 * 10**9) -> None:
    """Write an NVFP4 checkpoint, of files of about that size, in a new directory."""
    path.mkdir(parents=True)
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(path)
    random_tokenizer(config.vocab_size).save_pretrained(path)
    trunk = Trunk.random(config, dtype=torch.bfloat16, device=torch.device("cpu"))
    dense: dict[str, Tensor] = trunk._model.state_dict()
    matrices = sorted(name.removesuffix(".weight") for name, tensor in dense.items() if tensor.ndim > 1)
    quantization = {"quant_algo": "NVFP4", "group_size": GROUP, "exclude_modules": matrices}
    (path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "random"}, "quantization": quantization}, indent=4)
    )
    tensors = itertools.chain(dense.items(), _expert_tensors(expert_shape(config)))
    write_tensors(path, tensors, file_bytes=file_bytes)


def _expert_tensors(shape: MoEShape) -> Iterator[tuple[str, Tensor]]:
    for layer, expert in itertools.product(shape.moe_layers, range(shape.num_experts)):
        for matrix, rows, cols in (
            ("gate_proj", shape.intermediate, shape.hidden),
            ("up_proj", shape.intermediate, shape.hidden),
            ("down_proj", shape.hidden, shape.intermediate),
        ):
            stem = f"model.layers.{layer}.mlp.experts.{expert}.{matrix}"
            scale = torch.randint(*SCALES, (rows, cols // GROUP), dtype=torch.uint8)
            yield f"{stem}.weight", torch.randint(256, (rows, cols // 2), dtype=torch.uint8)
            yield f"{stem}.weight_scale", scale.view(torch.float8_e4m3fn)
            yield f"{stem}.weight_scale_2", torch.tensor(scale_2(cols))
            yield f"{stem}.input_scale", torch.tensor(INPUT_SCALE)


def random_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with ids of all bytes first, then of pairs of bytes, then of three; none of the
    latter come from text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = itertools.chain.from_iterable(itertools.product(alphabet, repeat=n) for n in (1, 2, 3))
    vocab = {"".join(word): n for n, word in enumerate(itertools.islice(words, vocab_size))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


if __name__ == "__main__":
    main()
