"""A checkpoint of random weights is one that we serve."""

from pathlib import Path
from typing import Any, cast

import torch
from transformers import Qwen3MoeConfig

from experts.checkpoint.reader import ExpertCheckpoint
from router.text.tokenizer import Tokenizer
from tests.bench.random_model import SHAPES, layers_that_fit, write_checkpoint
from tests.support.in_process import greedy, in_process
from tests.support.oracle import Oracle, assert_same_tokens

TINY: Any = cast(Any, Qwen3MoeConfig)(
    vocab_size=300,
    hidden_size=64,
    moe_intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=3,
    norm_topk_prob=True,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)


def test_a_written_checkpoint_is_served(tmp_path: Path) -> None:
    path = tmp_path / "random"
    torch.manual_seed(0)
    write_checkpoint(TINY, path, file_bytes=100_000)
    assert len(list(path.glob("*.safetensors"))) > 1
    with ExpertCheckpoint(path) as checkpoint:
        assert (checkpoint.weights_only, checkpoint.top_k) == (False, 3)
    prompts = [[1, 2, 3], [299, *range(40)]]
    requests = [greedy(str(n), prompt, num_tokens=12) for n, prompt in enumerate(prompts)]
    with in_process(path, num_shards=2) as server:
        answers = server.run(requests)
    for n, continuation in enumerate(Oracle(path).generate(prompts, 12)):
        assert_same_tokens(answers[str(n)].tokens, continuation, what=f"prompt {n}")


def test_every_id_has_a_text(tmp_path: Path) -> None:
    write_checkpoint(TINY, tmp_path / "random")
    tokenizer = Tokenizer(tmp_path / "random")
    text = "Größe 5 µm\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert all(tokenizer.decode([id_]) for id_ in range(300))


def test_as_many_layers_as_fit() -> None:
    gib = 2**30
    large, small = SHAPES["qwen3-235b-a22b"], SHAPES["qwen3-30b-a3b"]
    assert layers_that_fit(small, 139 * gib, num_tokens=70_000, free=6 * gib) == 48
    assert 70 < layers_that_fit(large, 139 * gib, num_tokens=70_000, free=6 * gib) < 94
    assert layers_that_fit(large, 300 * gib, num_tokens=70_000, free=6 * gib) == 94
