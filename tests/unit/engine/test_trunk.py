"""Trunk: which models are refused, in which words, and how quantised trunk tensors are loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.checkpoint.index import CheckpointIndex
from experts.nvfp4 import dequantize, quantize
from router.model.trunk import Trunk
from tests.support.checkpoints import Tensors, edit_json, rewrite
from tests.support.families import write_dense

CPU = torch.device("cpu")
Q_PROJ = "model.layers.2.self_attn.q_proj"
O_PROJ = "model.layers.2.self_attn.o_proj"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("models")

    def write(family: str) -> Path:
        path = directory / family
        return path if path.exists() else write_dense(family, path)

    return write


def load(path: Path) -> Trunk:
    return Trunk.load(path, dtype=torch.float32, device=CPU)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **more}}


def test_refuses_experts_that_the_gates_do_not_know(tmp_path: Path) -> None:
    path = write_dense("qwen3_moe", tmp_path / "model")
    last = max(index.shape.num_experts for index in [CheckpointIndex(path)]) - 1
    rewrite(
        path,
        tmp_path / "c",
        lambda tensors: {n: t for n, t in tensors.items() if f"experts.{last}." not in n},
    )
    with pytest.raises(
        ValueError, match=rf"has {last} experts on disk, but its gate chooses among {last + 1}"
    ):
        load(tmp_path / "c")


@pytest.mark.parametrize(
    ("family", "changes", "why"),
    [
        (
            "mixtral",
            {"model_type": "llama"},
            "model_type 'llama' is not supported; supported are qwen3_moe, ",
        ),
        ("mixtral", {"model_type": None}, "model_type None is not supported"),
        ("mixtral", {"sliding_window": 4096}, r"sliding-window attention \(4096 tokens\) is not supported"),
        (
            "qwen3_moe",
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
            r"sliding-window attention \(64 tokens\) is not supported",
        ),
        (
            "glm4_moe",
            {"hidden_act": "gelu"},
            r"hidden_act 'gelu' is not supported, only silu \(SwiGLU experts\)",
        ),
        ("qwen3_moe", rope("dynamic", factor=2.0), "rope scaling 'dynamic' depends on a request's length"),
        (
            "qwen3_moe",
            rope(
                "longrope",
                factor=2.0,
                short_factor=[1.0] * 8,
                long_factor=[1.0] * 8,
                original_max_position_embeddings=256,
            ),
            "rope scaling 'longrope' depends on a request's length and is not supported",
        ),
    ],
)
def test_refuses_a_model_that_we_do_not_compute(
    family: str, changes: dict[str, Any], why: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    path = rewrite(models(family), tmp_path / "changed", dict)
    edit_json(path / "config.json", **changes)
    with pytest.raises(ValueError, match=why):
        load(path)


def test_refuses_what_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no config.json, so this is not a checkpoint directory"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            lambda tensors: tensors | {"model.layers.2.surprise.weight": torch.zeros(2)},
            "the model does not have",
        ),
        (
            lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(Q_PROJ)},
            rf"missing keys: \['{Q_PROJ}.weight'\]",
        ),
        (lambda tensors: tensors | {f"{Q_PROJ}.weight": torch.zeros(8, 64)}, "mismatched keys"),
    ],
    ids=["unexpected", "missing", "mismatched"],
)
def test_refuses_tensors_that_do_not_fit(
    change: Callable[[Tensors], Tensors], why: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=why):
        load(rewrite(models("qwen3_moe"), tmp_path / "changed", change))


def test_leaves_out_what_predicts_further_tokens(models: Callable[[str], Path], tmp_path: Path) -> None:
    extra = {"model.layers.3.eh_proj.weight": torch.zeros(2), "mtp.fc.weight": torch.zeros(2)}
    load(rewrite(models("glm4_moe"), tmp_path / "changed", lambda tensors: tensors | extra))


def test_quantised_tensors_are_dequantised(models: Callable[[str], Path], tmp_path: Path) -> None:
    """One matrix in ModelOpt's NVFP4 and one in FP8, beside BF16 ones; with scales that the trunk has no use
    for."""
    expected: Tensors = {}

    def quantise_two(tensors: Tensors) -> Tensors:
        nvfp4 = quantize(tensors[f"{Q_PROJ}.weight"])
        fp8 = (tensors[f"{O_PROJ}.weight"].float() / 0.01).to(torch.float8_e4m3fn)
        expected[Q_PROJ] = dequantize(nvfp4, torch.float32)
        expected[O_PROJ] = fp8.float() * 0.01
        return tensors | {
            f"{Q_PROJ}.weight": nvfp4.packed,
            f"{Q_PROJ}.weight_scale": nvfp4.scale,
            f"{Q_PROJ}.weight_scale_2": nvfp4.scale_2,
            f"{Q_PROJ}.input_scale": torch.tensor(0.5),
            f"{O_PROJ}.weight": fp8,
            f"{O_PROJ}.weight_scale": torch.tensor(0.01),
            f"{O_PROJ}.input_scale": torch.tensor(0.5),
            "model.layers.2.self_attn.k_proj.k_scale": torch.tensor(1.0),
        }

    trunk = load(rewrite(models("qwen3_moe"), tmp_path / "quantised", quantise_two))
    loaded = dict(trunk._model.named_parameters())
    for module, weight in expected.items():
        torch.testing.assert_close(loaded[f"{module}.weight"].data, weight, rtol=0, atol=1e-7)


def test_shape_is_read_from_the_config(models: Callable[[str], Path]) -> None:
    shape = load(models("hy_v3")).shape
    config = json.loads((models("hy_v3") / "config.json").read_text())
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.hidden) == (3, 2, 16, 64)
    assert (shape.vocab_size, shape.max_model_len) == (config["vocab_size"], 512)


def test_no_memory_is_spent_on_experts(models: Callable[[str], Path]) -> None:
    names = [name for name, _ in load(models("minimax_m2"))._model.named_parameters()]
    assert names
    assert not any(".experts." in name for name in names)
