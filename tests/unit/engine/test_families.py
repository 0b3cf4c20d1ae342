"""Every supported family, in every layout, on any number of shards: the tokens of transformers' `generate`."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from experts.checkpoint.reader import trunk_tensors
from router.model_config import FAMILIES
from tests.support.checkpoints import write_compressed_tensors, write_modelopt_3d, write_simple_scales
from tests.support.families import VOCAB_SIZE, write_nvfp4
from tests.support.in_process import greedy, in_process
from tests.support.oracle import Continuation, Oracle, assert_same_tokens

NUM_TOKENS = 40
PROMPTS = [
    torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (1, 2, 17, 45)
]
LAYOUTS = ("modelopt", "compressed-tensors", "3-D", "3-D K-first")
STACKED = (
    "qwen3_moe",
    "glm4_moe",
    "ernie4_5_moe",
    "hy_v3",
)  # nobody stacks the experts that Mixtral calls w1, w3, w2
DIAGONAL = {
    ("qwen3_moe", "modelopt", 3),
    ("minimax_m2", "compressed-tensors", 4),
    ("glm4_moe", "3-D", 3),
    ("mixtral", "modelopt", 2),
    ("ernie4_5_moe", "3-D K-first", 3),
    ("hy_v3", "compressed-tensors", 1),
}
MATRIX = [
    (family, layout, num_shards)
    for family in FAMILIES
    for layout in LAYOUTS
    for num_shards in (1, 2, 3, 4)
    if family in STACKED or not layout.startswith("3-D")
]

WriteFamily = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> WriteFamily:
    """Return the checkpoint of a family in a layout. All layouts of a family hold the same weights."""

    @cache
    def write(family: str, layout: str) -> Path:
        directory = tmp_path_factory.mktemp(family)
        if layout == "modelopt":
            return write_simple_scales(write_nvfp4(family, directory / "quantised"), directory / "simple")
        source, target = write(family, "modelopt"), directory / "converted"
        if layout == "compressed-tensors":
            return write_compressed_tensors(source, target)
        return write_modelopt_3d(source, target, k_first=layout == "3-D K-first")

    return write


@pytest.fixture(scope="module")
def expected(written: WriteFamily) -> Callable[[str], list[Continuation]]:
    return cache(lambda family: Oracle(written(family, "modelopt")).generate(PROMPTS, NUM_TOKENS))


@pytest.mark.parametrize(
    ("family", "layout", "num_shards"),
    [pytest.param(*case, marks=() if case in DIAGONAL else pytest.mark.slow) for case in MATRIX],
)
def test_same_tokens(
    family: str,
    layout: str,
    num_shards: int,
    written: WriteFamily,
    expected: Callable[[str], list[Continuation]],
) -> None:
    requests = [greedy(str(n), prompt, num_tokens=NUM_TOKENS) for n, prompt in enumerate(PROMPTS)]
    with in_process(written(family, layout), num_shards=num_shards) as server:
        answers = server.run(requests)
    for n, theirs in enumerate(expected(family)):
        assert len(answers[str(n)].tokens) == NUM_TOKENS
        assert_same_tokens(answers[str(n)].tokens, theirs, what=f"prompt {n}")


@pytest.mark.parametrize(
    ("family", "feature"),
    [
        ("qwen3_moe", "q_norm"),
        ("qwen3_moe", "layers.1.mlp.down_proj"),  # a dense layer between two of experts
        ("minimax_m2", "k_norm"),
        ("minimax_m2", "e_score_correction_bias"),
        ("glm4_moe", "layers.0.mlp.down_proj"),
        ("glm4_moe", "shared_experts"),
        ("glm4_moe", "e_score_correction_bias"),
        ("glm4_moe", "q_proj.bias"),
        ("ernie4_5_moe", "shared_experts"),
        ("ernie4_5_moe", "e_score_correction_bias"),
        ("hy_v3", "shared_mlp"),
        ("hy_v3", "expert_bias"),
    ],
)
def test_the_tiny_models_depend_on_what_their_families_have(
    family: str, feature: str, written: WriteFamily, expected: Callable[[str], list[Continuation]]
) -> None:
    """Else the test above would show nothing about it."""
    path = written(family, "modelopt")
    without = {name: torch.zeros_like(tensor) for name, tensor in trunk_tensors(path) if feature in name}
    assert without
    changed = Oracle(path, replaced=without).generate(PROMPTS, num_tokens=8)
    assert any(one.tokens != other.tokens[:8] for one, other in zip(changed, expected(family), strict=True))
