"""quantize_checkpoint(): the same checkpoint as ModelOpt writes, or none."""

import json
import logging
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

import experts.checkpoint.quantize
from experts import progress
from experts.checkpoint.quantize import quantize_checkpoint
from experts.checkpoint.reader import ExpertCheckpoint
from experts.checkpoint.tensor_files import INDEX
from experts.weights import Nvfp4Weight
from tests.support.checkpoints import (
    DENSE,
    EXPERTS_ONLY,
    FIXTURES,
    Tensors,
    edit_json,
    read_tensors,
    rewrite,
    write_dense_3d,
)

AMAX = {int(layer): tuple(pair) for layer, pair in json.loads((FIXTURES / "amax.json").read_text()).items()}
NAN_EXPERT = "model.layers.2.mlp.experts.1.up_proj"


def assert_same_bytes(a: Path, b: Path) -> None:
    """Assert that every tensor of two checkpoints is the same, whichever files they are in."""
    ours, theirs = read_tensors(a), read_tensors(b)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype, name
        assert ours[name].shape == theirs[name].shape, name
        assert torch.equal(
            ours[name].reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8)
        ), name


def test_writes_the_checkpoint_that_modelopt_exports(tmp_path: Path) -> None:
    quantize_checkpoint(DENSE, tmp_path / "out", amax=AMAX, progress=False)
    assert_same_bytes(tmp_path / "out", EXPERTS_ONLY)
    with ExpertCheckpoint(tmp_path / "out") as ours, ExpertCheckpoint(EXPERTS_ONLY) as theirs:
        assert (ours.format, ours.shape) == (theirs.format, theirs.shape)


def test_stacked_experts_become_the_same_checkpoint(tmp_path: Path) -> None:
    stacked = write_dense_3d(DENSE, tmp_path / "stacked")
    quantize_checkpoint(stacked, tmp_path / "out", amax=AMAX, progress=False)
    assert_same_bytes(tmp_path / "out", EXPERTS_ONLY)


def test_says_what_is_quantised_as_modelopt_does(tmp_path: Path) -> None:
    quantize_checkpoint(DENSE, tmp_path / "out", amax=AMAX, progress=False)
    ours, theirs = (
        json.loads((path / "hf_quant_config.json").read_text()) for path in (tmp_path / "out", EXPERTS_ONLY)
    )
    our_exclusions, their_exclusions = (
        config["quantization"].pop("exclude_modules") for config in (ours, theirs)
    )
    assert ours == theirs
    for module in {
        name.rpartition(".")[0] for name, tensor in read_tensors(DENSE).items() if tensor.ndim > 1
    }:
        assert any(fnmatch(module, pattern) for pattern in our_exclusions) == any(
            fnmatch(module, pattern) for pattern in their_exclusions
        ), module


def test_splits_large_checkpoints_into_numbered_files(tmp_path: Path) -> None:
    quantize_checkpoint(DENSE, tmp_path / "out", amax=AMAX, progress=False, file_bytes=2000)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"].values()) == {file.name for file in files}
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for tensor in read_tensors(EXPERTS_ONLY).values()
    )
    assert_same_bytes(tmp_path / "out", EXPERTS_ONLY)


def test_whoever_may_read_the_directory_may_read_the_weights(tmp_path: Path) -> None:
    quantize_checkpoint(DENSE, tmp_path / "out", amax=AMAX, progress=False)
    readers = (tmp_path / "out").stat().st_mode & 0o444
    assert (tmp_path / "out" / "model.safetensors").stat().st_mode & 0o444 == readers


def test_copies_config_and_tokenizer_but_no_index(tmp_path: Path) -> None:
    src = rewrite(DENSE, tmp_path / "src", dict)
    kept = {"tokenizer.json", "merges.txt", "chat_template.jinja", "tokenizer.model"}
    for name in kept | {"README.md", "train.py"}:
        (src / name).write_text(name)
    names = dict.fromkeys(read_tensors(DENSE), "model.safetensors")
    (src / INDEX).write_text(json.dumps({"weight_map": names}))
    quantize_checkpoint(src, tmp_path / "out", amax=AMAX, progress=False)
    written = {file.name for file in (tmp_path / "out").iterdir()}
    ours = {"config.json", "generation_config.json", "hf_quant_config.json", "model.safetensors"}
    assert written == kept | ours
    assert (tmp_path / "out" / "config.json").read_text() == (DENSE / "config.json").read_text()


def test_layers_of_multi_token_prediction_are_copied(tmp_path: Path) -> None:
    src = rewrite(DENSE, tmp_path / "src", dict)
    edit_json(src / "config.json", num_hidden_layers=2)
    quantize_checkpoint(src, tmp_path / "out", amax={1: AMAX[1]}, progress=False)
    written = read_tensors(tmp_path / "out")
    assert written["model.layers.1.mlp.experts.0.up_proj.weight"].dtype == torch.uint8
    assert written["model.layers.2.mlp.experts.0.up_proj.weight"].dtype == torch.bfloat16


def test_fills_an_empty_directory_and_makes_parents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for dst in (tmp_path / "empty", tmp_path / "new" / "er"):
        quantize_checkpoint(DENSE, dst, amax=AMAX, progress=False)
        assert (dst / "model.safetensors").is_file()


def test_leaves_nothing_behind_when_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> Nvfp4Weight:
        raise KeyboardInterrupt

    monkeypatch.setattr(experts.checkpoint.quantize, "quantize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(DENSE, tmp_path / "out", amax=AMAX, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_shows_progress_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "LINE_S", 0)
    quantize_checkpoint(DENSE, tmp_path / "quiet", amax=AMAX, progress=False)
    assert not caplog.messages
    quantize_checkpoint(DENSE, tmp_path / "loud", amax=AMAX, progress=True)
    assert caplog.messages[-1] == "quantize: experts 4/4"


# What is refused


def test_refuses_a_destination_that_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for dst in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match=f"{dst.name}: exists and is not an empty directory"):
            quantize_checkpoint(DENSE, dst, amax=AMAX, progress=False)


def test_refuses_a_source_that_is_quantised(tmp_path: Path) -> None:
    fp8_trunk = rewrite(DENSE, tmp_path / "fp8", dict)
    edit_json(fp8_trunk / "config.json", quantization_config={"quant_method": "fp8"})
    for src in (EXPERTS_ONLY, fp8_trunk):
        with pytest.raises(ValueError, match=f"{src.name}: is already quantised; give the BF16 checkpoint"):
            quantize_checkpoint(src, tmp_path / "out", amax=AMAX, progress=False)


def test_refuses_sizes_that_are_not_whole_groups(tmp_path: Path) -> None:
    def narrower(tensors: Tensors) -> Tensors:
        """Return a checkpoint whose intermediate size is 24."""
        return {
            name: tensor[:, :24] if "down_proj" in name else tensor[:24] if ".experts." in name else tensor
            for name, tensor in tensors.items()
        }

    src = rewrite(DENSE, tmp_path / "src", narrower)
    with pytest.raises(ValueError, match="multiples of 16, these are hidden 16, intermediate 24"):
        quantize_checkpoint(src, tmp_path / "out", amax=AMAX, progress=False)


@pytest.mark.parametrize(
    ("amax", "shown"),
    [
        ({1: (1.0, 1.0)}, "None"),
        ({1: (1.0, 1.0), 2: (1.0, 0.0)}, r"\(1.0, 0.0\)"),
        ({1: (1.0, 1.0), 2: (float("inf"), 1.0)}, r"\(inf, 1.0\)"),
    ],
    ids=["missing", "zero", "infinite"],
)
def test_refuses_a_calibration_that_says_too_little(
    tmp_path: Path, amax: dict[int, tuple[float, float]], shown: str
) -> None:
    with pytest.raises(ValueError, match=f"calibration gives layer 2 the input magnitudes {shown}, but two"):
        quantize_checkpoint(DENSE, tmp_path / "out", amax=amax, progress=False)


def test_refuses_weights_that_are_not_finite_and_names_them(tmp_path: Path) -> None:
    def poisoned(tensors: Tensors) -> Tensors:
        tensors[f"{NAN_EXPERT}.weight"][3, 3] = torch.nan
        return tensors

    src = rewrite(DENSE, tmp_path / "src", poisoned)
    with pytest.raises(ValueError, match=f"{NAN_EXPERT} has weights that are not finite"):
        quantize_checkpoint(src, tmp_path / "out", amax=AMAX, progress=False)
    assert not (tmp_path / "out").exists()
