"""Calibration records what hooks record in transformers' own full model."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from experts.checkpoint.quantize import quantize_checkpoint
from experts.checkpoint.reader import ExpertCheckpoint
from experts.nvfp4 import input_scale
from router.calibrate import DEFAULT_TEXT, SEQUENCE_TOKENS, calibrate
from router.text.tokenizer import Tokenizer
from tests.support.checkpoints import read_tensors
from tests.support.families import write_dense, write_nvfp4
from tests.support.oracle import load_model


class LinearInputs(TorchFunctionMode):
    """A record of the largest magnitude that enters each product with a weight; all experts of a layer count as one
    weight."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.amax: dict[str, float] = defaultdict(float)
        self._names = {_storage(parameter): name for name, parameter in model.named_parameters()}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            name = self._names[_storage(args[1])]
            self.amax[name] = max(self.amax[name], args[0].abs().max().item())
        return func(*args, **kwargs or {})


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@pytest.fixture(autouse=True)
def _on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Return a file of text that makes two whole sequences and a shorter one."""
    file = tmp_path / "text.txt"
    file.write_text(DEFAULT_TEXT.read_text(encoding="utf-8")[: 2 * SEQUENCE_TOKENS + 100], encoding="utf-8")
    return file


@pytest.mark.parametrize("family", ["qwen3_moe", "glm4_moe"])
def test_equals_what_hooks_record_in_the_full_model(family: str, text: Path, tmp_path: Path) -> None:
    path = write_dense(family, tmp_path / family)
    model: Any = load_model(path, read_tensors(path))
    tokens = torch.tensor(Tokenizer(path).encode(text.read_text(encoding="utf-8")))
    with LinearInputs(model) as inputs, torch.inference_mode():
        for sequence in tokens.split(SEQUENCE_TOKENS):
            model(sequence[None], use_cache=False)

    amax = calibrate(path, text, progress=False)

    assert list(amax) == [layer for layer in range(3) if layer != {"qwen3_moe": 1, "glm4_moe": 0}[family]]
    for layer, of_layer in amax.items():
        experts = f"model.layers.{layer}.mlp.experts"
        hooked = (inputs.amax[f"{experts}.gate_up_proj"], inputs.amax[f"{experts}.down_proj"])
        assert of_layer == pytest.approx(hooked, rel=1e-5)


def test_becomes_the_input_scales_of_the_quantised_checkpoint(text: Path, tmp_path: Path) -> None:
    path = write_dense("qwen3_moe", tmp_path / "dense")
    amax = calibrate(path, text, progress=False)
    quantize_checkpoint(path, tmp_path / "nvfp4", amax=amax, progress=False)
    with ExpertCheckpoint(tmp_path / "nvfp4") as checkpoint:
        for layer, (of_input, of_down_input) in amax.items():
            expert = checkpoint.read(layer, 0)
            assert expert.input_scale == input_scale(of_input)
            assert expert.down_input_scale == input_scale(of_down_input)


def test_refuses_what_it_cannot_use(text: Path, tmp_path: Path) -> None:
    dense, nvfp4 = tmp_path / "x-dense", write_nvfp4("mixtral", tmp_path / "x")
    with pytest.raises(ValueError, match="is already quantised"):
        calibrate(nvfp4, text, progress=False)
    with pytest.raises(ValueError, match="no such text file"):
        calibrate(dense, tmp_path / "missing.txt", progress=False)
    text.write_text("")
    with pytest.raises(ValueError, match="has no tokens"):
        calibrate(dense, text, progress=False)


def test_a_long_text_is_cut_with_a_warning(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_dense("mixtral", tmp_path / "mixtral")
    monkeypatch.setattr("router.calibrate.MAX_SEQUENCES", 1)
    cut = calibrate(path, text, progress=False)
    assert f"only the first {SEQUENCE_TOKENS} of" in caplog.text
    text.write_text(text.read_text(encoding="utf-8")[:SEQUENCE_TOKENS], encoding="utf-8")
    assert cut == calibrate(path, text, progress=False)
