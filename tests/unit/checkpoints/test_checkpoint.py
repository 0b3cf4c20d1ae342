"""Reading experts and trunk from every layout, and what is refused."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from experts.checkpoint.reader import ExpertCheckpoint, trunk_tensors
from experts.checkpoint.tensor_files import INDEX
from experts.checkpoint.tensor_writer import write_tensors
from experts.nvfp4 import dequantize
from experts.weights import ExpertWeights, MoEShape, Nvfp4Weight
from tests.support.checkpoints import (
    DENSE,
    EXPERTS_ONLY,
    FIXTURES,
    WHOLE,
    Tensors,
    edit_json,
    read_tensors,
    rewrite,
    write_compressed_tensors,
    write_dense_3d,
    write_mixtral_names,
    write_modelopt,
    write_modelopt_3d,
    write_simple_scales,
)

EXPERT = "model.layers.1.mlp.experts.0"
Q_PROJ = "model.layers.1.self_attn.q_proj"

Change = Callable[[Tensors], Tensors]


def replaced(name: str, tensor: Tensor) -> Change:
    return lambda tensors: tensors | {name: tensor}


def without(*parts: str) -> Change:
    """Return a change that leaves out every tensor whose name has one of these parts."""
    return lambda tensors: {name: t for name, t in tensors.items() if not any(part in name for part in parts)}


def split(src: Path, dst: Path) -> Path:
    """Write the same checkpoint in files of a few kilobytes."""
    rewrite(src, dst, dict)
    (dst / "model.safetensors").unlink()
    write_tensors(dst, read_tensors(src).items(), file_bytes=4000)
    return dst


def assert_same_weight(a: Nvfp4Weight, b: Nvfp4Weight) -> None:
    for x, y in (
        (a.packed, b.packed),
        (a.scale.view(torch.uint8), b.scale.view(torch.uint8)),
        (a.scale_2, b.scale_2),
    ):
        torch.testing.assert_close(x, y, rtol=0, atol=0)
    assert a.packed.is_contiguous()
    assert a.scale.is_contiguous()


def assert_same_expert(a: ExpertWeights, b: ExpertWeights) -> None:
    for x, y in ((a.gate, b.gate), (a.up, b.up), (a.down, b.down)):
        assert_same_weight(x, y)
    assert a.input_scale == b.input_scale
    assert a.down_input_scale == b.down_input_scale


def read(path: Path, layer: int = 1, expert: int = 0) -> ExpertWeights:
    with ExpertCheckpoint(path) as checkpoint:
        return checkpoint.read(layer, expert)


# What is read


@pytest.mark.parametrize("path", [DENSE, EXPERTS_ONLY, WHOLE], ids=lambda path: path.name)
def test_sizes_come_from_the_tensors_and_dense_layers_count(path: Path) -> None:
    with ExpertCheckpoint(path) as checkpoint:
        assert checkpoint.shape == MoEShape(
            num_layers=3, moe_layers=(1, 2), num_experts=2, hidden=16, intermediate=32
        )


def test_reads_what_modelopt_wrote() -> None:
    tensors = read_tensors(EXPERTS_ONLY)
    weights = read(EXPERTS_ONLY, layer=2, expert=1)
    for matrix, weight in (("gate", weights.gate), ("up", weights.up), ("down", weights.down)):
        stem = f"model.layers.2.mlp.experts.1.{matrix}_proj.weight"
        assert_same_weight(
            weight, Nvfp4Weight(tensors[stem], tensors[f"{stem}_scale"], tensors[f"{stem}_scale_2"])
        )
    assert weights.input_scale == tensors["model.layers.2.mlp.experts.1.gate_proj.input_scale"]
    assert weights.down_input_scale == tensors["model.layers.2.mlp.experts.1.down_proj.input_scale"]


def test_what_is_read_is_close_to_what_was_quantised() -> None:
    with ExpertCheckpoint(DENSE) as dense:
        gate, up, down = dense.read_dense(1, 1)
    weights = read(EXPERTS_ONLY, layer=1, expert=1)
    for quantised, source in ((weights.gate, gate), (weights.up, up), (weights.down, down)):
        similarity = torch.cosine_similarity(
            dequantize(quantised, torch.float32).flatten(), source.float().flatten(), 0
        )
        assert similarity > 0.99


LAYOUTS: dict[str, Callable[[Path, Path], Path]] = {
    "mixtral names": write_mixtral_names,
    "compressed-tensors": write_compressed_tensors,
    "3-D, K first": lambda src, dst: write_modelopt_3d(src, dst, k_first=True),
    "3-D, N first": lambda src, dst: write_modelopt_3d(src, dst, k_first=False),
}


@pytest.mark.parametrize("write", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_experts(tmp_path: Path, write: Callable[[Path, Path], Path]) -> None:
    plain = write_simple_scales(EXPERTS_ONLY, tmp_path / "plain")
    other = write(plain, tmp_path / "other")
    with ExpertCheckpoint(plain) as a, ExpertCheckpoint(other) as b:
        assert a.shape == b.shape
        for layer in a.shape.moe_layers:
            for expert in range(a.shape.num_experts):
                assert_same_expert(a.read(layer, expert), b.read(layer, expert))


def test_stacked_dense_experts_are_the_separate_ones(tmp_path: Path) -> None:
    stacked = write_dense_3d(DENSE, tmp_path / "stacked")
    with ExpertCheckpoint(DENSE) as a, ExpertCheckpoint(stacked) as b:
        assert a.shape == b.shape
        for x, y in zip(a.read_dense(2, 1), b.read_dense(2, 1), strict=True):
            torch.testing.assert_close(x, y, rtol=0, atol=0)
        assert a.module_names(2, 1) == b.module_names(2, 1)


def test_gate_and_up_keep_their_own_scale_2_and_share_the_larger_input_scale(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        scales = {f"{EXPERT}.gate_proj.weight_scale_2": 2.0, f"{EXPERT}.up_proj.weight_scale_2": 3.0}
        scales |= {f"{EXPERT}.gate_proj.input_scale": 5.0, f"{EXPERT}.up_proj.input_scale": 7.0}
        return tensors | {name: torch.tensor(value) for name, value in scales.items()}

    weights = read(rewrite(EXPERTS_ONLY, tmp_path / "c", change))
    assert (weights.gate.scale_2, weights.up.scale_2, weights.input_scale) == (2.0, 3.0, 7.0)


def w4a16_by_algorithm(path: Path) -> None:
    edit_json(path / "hf_quant_config.json", quantization={"quant_algo": "W4A16_NVFP4"})


def w4a16_by_mixed_precision(path: Path) -> None:
    layers = {f"{EXPERT}.gate_proj": {"quant_algo": "W4A16_NVFP4"}, "lm_head": {"quant_algo": "FP8"}}
    quantization = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    edit_json(path / "hf_quant_config.json", quantization=quantization)


def w4a16_by_groups(path: Path) -> None:
    group = {"weights": {"num_bits": 4}, "input_activations": None}
    edit_json(path / "config.json", quantization_config={"config_groups": {"group_0": group}})


@pytest.mark.parametrize("edit", [w4a16_by_algorithm, w4a16_by_mixed_precision, w4a16_by_groups])
def test_w4a16_experts_have_no_input_scale(tmp_path: Path, edit: Callable[[Path], None]) -> None:
    edit(rewrite(EXPERTS_ONLY, tmp_path / "c", without("input_scale")))
    weights = read(tmp_path / "c")
    assert weights.input_scale is None
    assert weights.down_input_scale is None


def test_a_checkpoint_without_any_input_scale_is_w4a16(tmp_path: Path) -> None:
    path = rewrite(WHOLE, tmp_path / "c", without("input_scale"))
    with ExpertCheckpoint(path) as checkpoint:
        assert checkpoint.weights_only
        assert checkpoint.read(1, 0).input_scale is None


def test_layers_beyond_the_configured_number_are_not_of_the_model(tmp_path: Path) -> None:
    edit_json(rewrite(EXPERTS_ONLY, tmp_path / "c", dict) / "config.json", num_hidden_layers=2)
    with ExpertCheckpoint(tmp_path / "c") as checkpoint:
        assert checkpoint.shape.num_layers == 2
        assert checkpoint.shape.moe_layers == (1,)
    assert not any(name.startswith("model.layers.2.") for name, _ in trunk_tensors(tmp_path / "c"))


def test_several_files_read_like_one(tmp_path: Path) -> None:
    split(EXPERTS_ONLY, tmp_path / "c")
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 2
    assert_same_expert(read(EXPERTS_ONLY), read(tmp_path / "c"))
    (tmp_path / "c" / INDEX).unlink()
    assert_same_expert(read(EXPERTS_ONLY), read(tmp_path / "c"))


def test_weights_outlive_the_file(tmp_path: Path) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", dict)
    weights = read(path)
    with (path / "model.safetensors").open("r+b") as file:
        file.write(bytes((path / "model.safetensors").stat().st_size))
    assert_same_expert(weights, read(EXPERTS_ONLY))


_PEAK_GROWTH = """
import sys, pathlib, torch
from experts.checkpoint.reader import ExpertCheckpoint
from experts.placement import place_evenly
from experts.shard import load_shard
def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
before = peak_kib()
with ExpertCheckpoint(pathlib.Path(sys.argv[1])) as checkpoint:
    placement = place_evenly(checkpoint.shape, num_ranks=int(sys.argv[2]))
    cpu = torch.device("cpu")
    shard = load_shard(checkpoint, placement, rank=0, backend="torch", dtype=torch.bfloat16, device=cpu)
print(peak_kib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_shard_of_a_quarter_takes_a_quarter_of_the_memory(tmp_path: Path) -> None:
    path = write_modelopt(tmp_path / "c", num_layers=1, num_experts=64, hidden=1024, intermediate=768)

    def peak_growth(num_ranks: int) -> int:
        command = [sys.executable, "-c", _PEAK_GROWTH, str(path), str(num_ranks)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    whole_kib, quarter_kib = peak_growth(1), peak_growth(4)
    assert whole_kib * 1024 > (path / "model.safetensors").stat().st_size
    assert quarter_kib < 0.35 * whole_kib


# The trunk


def test_the_trunk_is_everything_but_routed_experts() -> None:
    expected = {name for name in read_tensors(DENSE) if ".experts." not in name}
    for path in (DENSE, EXPERTS_ONLY, WHOLE):
        assert {name for name, _ in trunk_tensors(path)} == expected
    trunk = dict(trunk_tensors(EXPERTS_ONLY))
    for name, tensor in read_tensors(DENSE).items():
        if name in trunk:
            torch.testing.assert_close(trunk[name], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("write", [dict, write_compressed_tensors], ids=["modelopt", "compressed-tensors"])
def test_attention_is_dequantised_as_modelopt_does(tmp_path: Path, write: Callable) -> None:
    path = WHOLE if write is dict else write(WHOLE, tmp_path / "c")
    trunk = dict(trunk_tensors(path))
    theirs = load_file(FIXTURES / "whole-trunk.safetensors")
    assert theirs
    for name, tensor in theirs.items():
        torch.testing.assert_close(trunk[name], tensor, rtol=0 if write is dict else 2**-7, atol=0)


def test_the_trunk_can_be_dequantised_to_float32() -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    exact = dict(trunk_tensors(WHOLE, dtype=torch.float32))[name]
    assert exact.dtype == torch.float32
    torch.testing.assert_close(dict(trunk_tensors(WHOLE))[name], exact.bfloat16(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "scale",
    [torch.tensor(0.5), torch.tensor([0.5]), torch.full((48, 1), 0.5)],
    ids=["scalar", "[1]", "per row"],
)
def test_fp8_trunk_weights_are_dequantised(tmp_path: Path, scale: Tensor) -> None:
    fp8 = {
        f"{Q_PROJ}.weight": torch.full((48, 16), 3.0).to(torch.float8_e4m3fn),
        f"{Q_PROJ}.weight_scale": scale,
    }
    rewrite(EXPERTS_ONLY, tmp_path / "c", lambda tensors: tensors | fp8)
    trunk = dict(trunk_tensors(tmp_path / "c"))
    torch.testing.assert_close(trunk[f"{Q_PROJ}.weight"], torch.full((48, 16), 1.5, dtype=torch.bfloat16))
    assert f"{Q_PROJ}.weight_scale" not in trunk


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {f"{Q_PROJ}.weight_scale": torch.ones(4, 12)},
            r"has FP8 scales of shape \[4, 12\]",
            id="FP8 blocks",
        ),
        pytest.param({f"{Q_PROJ}.weight": torch.ones(48, 2, dtype=torch.int32)}, "int32", id="INT4"),
    ],
)
def test_refuses_a_trunk_quantised_in_another_way(tmp_path: Path, changes: Tensors, message: str) -> None:
    fp8 = {f"{Q_PROJ}.weight": torch.ones(48, 16).to(torch.float8_e4m3fn)}
    rewrite(EXPERTS_ONLY, tmp_path / "c", lambda tensors: tensors | fp8 | changes)
    with pytest.raises(ValueError, match=message):
        dict(trunk_tensors(tmp_path / "c"))


def test_shared_experts_are_trunk(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.shared_experts.gate_proj.weight"
    rewrite(EXPERTS_ONLY, tmp_path / "c", replaced(name, torch.ones(2, 2)))
    assert name in dict(trunk_tensors(tmp_path / "c"))
    with ExpertCheckpoint(tmp_path / "c") as checkpoint:
        assert checkpoint.shape.num_experts == 2


# What is refused: files


def test_refuses_a_directory_that_is_missing_or_has_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such checkpoint directory"):
        ExpertCheckpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no \*.safetensors files"):
        ExpertCheckpoint(tmp_path)


def test_refuses_an_index_that_names_a_missing_file(tmp_path: Path) -> None:
    path = split(EXPERTS_ONLY, tmp_path / "c")
    next(path.glob("model-00002-*")).unlink()
    with pytest.raises(ValueError, match=f"model-00002-of-.*: missing, though {INDEX} names it; download"):
        ExpertCheckpoint(path)


def test_refuses_an_index_that_promises_a_tensor_which_its_file_lacks(tmp_path: Path) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", without(f"{EXPERT}.up_proj.weight_scale_2"))
    names = read_tensors(EXPERTS_ONLY)
    (path / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    with pytest.raises(ValueError, match=rf"model.safetensors: lacks {EXPERT}.up_proj.weight_scale_2"):
        read(path)


def test_refuses_a_file_that_is_cut_short(tmp_path: Path) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", dict)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"model.safetensors: broken or cut short .*; download"):
        ExpertCheckpoint(path)


def test_refuses_experts_that_lack_a_matrix(tmp_path: Path) -> None:
    """As when a file is missing, and there is no index that names it."""
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", without("layers.2.mlp.experts.1.up_proj"))
    with pytest.raises(
        ValueError, match="no weight for up of layer 2, expert 1; the checkpoint is incomplete"
    ):
        ExpertCheckpoint(path)


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", INDEX])
@pytest.mark.parametrize("text", ["[]", "null", "3"])
def test_refuses_json_that_is_no_object(tmp_path: Path, name: str, text: str) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", dict)
    (path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}: holds no JSON object"):
        ExpertCheckpoint(path)


def test_refuses_an_index_without_names(tmp_path: Path) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", dict)
    (path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match=f"{INDEX}: has no weight_map"):
        ExpertCheckpoint(path)


@pytest.mark.parametrize("name", ["config.json", "hf_quant_config.json", INDEX])
def test_refuses_json_that_is_cut_short(tmp_path: Path, name: str) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", dict)
    (path / name).write_text('{"cut": ')
    with pytest.raises(ValueError, match=f"{name}: not valid JSON"):
        ExpertCheckpoint(path)


# What is refused: kinds of experts


def as_fp8(tensors: Tensors) -> Tensors:
    out = without("weight_scale_2")(tensors)
    return {n: t.to(torch.float8_e4m3fn) if t.dtype == torch.uint8 else t for n, t in out.items()}


def as_mxfp4(tensors: Tensors) -> Tensors:
    out = without("weight_scale_2")(tensors)
    return {n: t.view(torch.uint8) if n.endswith("weight_scale") else t for n, t in out.items()}


UNSUPPORTED: dict[str, tuple[Change, str]] = {
    "no experts": (without(".experts."), "has no routed experts"),
    "no gate": (without(".gate_proj."), "experts that have only down and up are not supported"),
    "bias": (replaced(f"{EXPERT}.up_proj.bias", torch.ones(32)), "experts with a bias are not supported"),
    "AWQ": (
        replaced(f"{EXPERT}.up_proj.pre_quant_scale", torch.ones(16)),
        "experts with pre_quant_scale .NVFP4_AWQ, NVFP4_SVD. are not supported",
    ),
    "FP8": (as_fp8, "FP8 experts are not supported; NVFP4 ones are"),
    "MXFP4": (as_mxfp4, "MXFP4 experts are not supported"),
    "int4": (
        lambda tensors: {
            n.replace("weight", "qweight") if ".experts." in n else n: t for n, t in tensors.items()
        },
        r"unknown \(input_scale, qweight, qweight_scale, qweight_scale_2\) experts are not supported",
    ),
}


@pytest.mark.parametrize(("change", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_refuses_experts_that_it_cannot_compute(tmp_path: Path, change: Change, message: str) -> None:
    rewrite(EXPERTS_ONLY, tmp_path / "c", change)
    with pytest.raises(ValueError, match=message):
        ExpertCheckpoint(tmp_path / "c")


@pytest.mark.parametrize("algorithm", ["NVFP4_AWQ", "NVFP4_SVD", "FP8", "W4A8_NVFP4_FP8"])
@pytest.mark.parametrize("file", ["hf_quant_config.json", "config.json"])
def test_refuses_other_algorithms_by_name(tmp_path: Path, algorithm: str, file: str) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", dict)
    (path / "hf_quant_config.json").unlink()
    key = "quantization" if file.startswith("hf") else "quantization_config"
    edit_json(path / file, **{key: {"quant_algo": algorithm}})
    with pytest.raises(
        ValueError, match=f"experts quantised as {algorithm} are not supported; NVFP4 and W4A16"
    ):
        ExpertCheckpoint(path)


def test_refuses_stacked_experts_whose_shapes_do_not_fit(tmp_path: Path) -> None:
    plain = write_simple_scales(EXPERTS_ONLY, tmp_path / "plain")
    stacked = write_modelopt_3d(plain, tmp_path / "stacked", k_first=True)
    wrong = torch.zeros(2, 5, 7, dtype=torch.uint8)
    rewrite(stacked, tmp_path / "c", replaced("model.layers.1.mlp.experts.down_proj", wrong))
    with pytest.raises(ValueError, match=r"gate_up_proj \(2, 8, 64\) and down_proj \(2, 5, 7\) do not fit"):
        ExpertCheckpoint(tmp_path / "c")


# What is refused: single experts

BROKEN: dict[str, tuple[Change, str]] = {
    "missing scale": (
        without(f"{EXPERT}.down_proj.weight_scale"),
        "no weight_scale for down of layer 1, expert 0; the checkpoint is incomplete",
    ),
    "missing input scale": (
        without(f"{EXPERT}.up_proj.input_scale"),
        "no input_scale for up of layer 1, expert 0",
    ),
    "wrong dtype": (
        replaced(f"{EXPERT}.gate_proj.weight_scale", torch.ones(32, 1)),
        r"weight_scale gives layer 1, expert 0 a torch.float32 tensor of shape \[32, 1\], "
        r"but \[32, 1\] of torch.float8_e4m3fn was expected",
    ),
    "wrong shape": (
        replaced(f"{EXPERT}.down_proj.weight", torch.zeros(16, 15, dtype=torch.uint8)),
        r"down_proj.weight gives layer 1, expert 0 a torch.uint8 tensor of shape \[16, 15\], but \[16, 16\]",
    ),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_refuses_a_broken_expert_when_it_is_read(tmp_path: Path, change: Change, message: str) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", change)
    with pytest.raises(ValueError, match=message):
        read(path)
    read(path, layer=2)  # the others are fine


@pytest.mark.parametrize(("layer", "expert"), [(0, 0), (1, 2), (1, -1), (3, 0)])
def test_refuses_an_expert_that_does_not_exist(layer: int, expert: int) -> None:
    with pytest.raises(
        ValueError, match=rf"no expert {expert} in layer {layer}, only 2 in each of the layers \[1, 2\]"
    ):
        read(EXPERTS_ONLY, layer, expert)


def test_refuses_to_read_dense_experts_as_nvfp4_and_the_reverse() -> None:
    with pytest.raises(ValueError, match=r"not quantised; run `sparkmoe quantize .*source DST`"):
        read(DENSE)
    with (
        ExpertCheckpoint(EXPERTS_ONLY) as checkpoint,
        pytest.raises(ValueError, match=r"already quantised \(modelopt\)"),
    ):
        checkpoint.read_dense(1, 0)


# What is refused: trunks

TRUNKS: dict[str, tuple[Change, str]] = {
    "FP8 without scale": (
        replaced(f"{Q_PROJ}.weight", torch.ones(16, 16).to(torch.float8_e4m3fn)),
        r"q_proj.weight \(torch.float8_e4m3fn\) is quantised in a way that is not supported",
    ),
    "bytes without scale": (
        replaced(f"{Q_PROJ}.weight", torch.ones(16, 16, dtype=torch.uint8)),
        r"q_proj.weight \(torch.uint8\) is quantised in a way that is not supported",
    ),
    "NVFP4 without block scales": (
        lambda tensors: (
            tensors
            | {f"{Q_PROJ}.weight": torch.ones(16, 8, dtype=torch.uint8)}
            | {f"{Q_PROJ}.weight_scale_2": torch.tensor(1.0)}
        ),
        f"has no tensor {Q_PROJ}.weight_scale; download",
    ),
    "AWQ": (
        replaced(f"{Q_PROJ}.pre_quant_scale", torch.ones(16)),
        "pre_quant_scale .* is quantised in a way",
    ),
    "FP8 in blocks": (
        lambda tensors: (
            tensors
            | {f"{Q_PROJ}.weight": torch.ones(16, 16).to(torch.float8_e4m3fn)}
            | {f"{Q_PROJ}.weight_scale": torch.ones(2, 2)}
        ),
        r"q_proj.weight has FP8 scales of shape \[2, 2\]; per tensor and per row are supported",
    ),
}


@pytest.mark.parametrize(("change", "message"), TRUNKS.values(), ids=TRUNKS)
def test_refuses_a_trunk_that_it_cannot_dequantise(tmp_path: Path, change: Change, message: str) -> None:
    rewrite(EXPERTS_ONLY, tmp_path / "c", change)
    with pytest.raises(ValueError, match=message):
        dict(trunk_tensors(tmp_path / "c"))
