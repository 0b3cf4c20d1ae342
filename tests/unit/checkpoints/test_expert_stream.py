"""Streams of experts are what ExpertCheckpoint.read reads, bit by bit, from every layout; and what is refused."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.checkpoint import expert_stream
from experts.checkpoint.expert_stream import ExpertStream
from experts.checkpoint.reader import ExpertCheckpoint
from experts.weights import ExpertWeights
from tests.support.checkpoints import DENSE, EXPERTS_ONLY, rewrite, write_modelopt
from tests.unit.checkpoints.test_checkpoint import (
    BROKEN,
    LAYOUTS,
    Change,
    assert_same_expert,
    replaced,
    split,
    w4a16_by_algorithm,
    without,
)

CPU = torch.device("cpu")
MULTIPLES_OF_16 = st.integers(1, 6).map(lambda n: 16 * n)


def read_all(path: Path, experts: Sequence[tuple[int, int]]) -> list[ExpertWeights]:
    with ExpertCheckpoint(path) as checkpoint, ExpertStream(checkpoint, experts, device=CPU) as stream:
        return list(stream)


def assert_same(path: Path, experts: Sequence[tuple[int, int]]) -> None:
    """As in test_checkpoint, this compares bits: weights, block scales and multipliers."""
    streamed = read_all(path, experts)
    with ExpertCheckpoint(path) as checkpoint:
        for at, weights in zip(experts, streamed, strict=True):
            assert_same_expert(weights, checkpoint.read(*at))


@settings(max_examples=60)
@given(st.data())
def test_experts_are_those_that_are_read_one_at_a_time(data: st.DataObject) -> None:
    num_layers, num_experts = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 5))
    at = st.tuples(st.integers(0, num_layers - 1), st.integers(0, num_experts - 1))
    with tempfile.TemporaryDirectory() as folder:
        path = write_modelopt(
            Path(folder) / "modelopt",
            num_layers=num_layers,
            num_experts=num_experts,
            hidden=data.draw(MULTIPLES_OF_16, "hidden"),
            intermediate=data.draw(MULTIPLES_OF_16, "intermediate"),
        )
        layout = data.draw(st.sampled_from([None, *LAYOUTS]))
        if layout is not None:
            path = LAYOUTS[layout](with_configs(path), Path(folder) / "other")
        if data.draw(st.booleans(), "several files"):
            path = split(path, Path(folder) / "split")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                expert_stream, "AHEAD_BYTES", data.draw(st.sampled_from([1, 2**16, 2**26]), "ahead")
            )
            assert_same(path, data.draw(st.lists(at, max_size=12), "experts"))


def with_configs(path: Path) -> Path:
    """The files that the writers of other layouts expect to find."""
    for name in ("config.json", "hf_quant_config.json"):
        (path / name).write_text("{}")
    return path


@pytest.mark.parametrize("change", [dict, without("input_scale")], ids=["W4A4", "W4A16"])
def test_multipliers_of_each_expert_are_its_own(tmp_path: Path, change: Change) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", change)
    if change is not dict:
        w4a16_by_algorithm(path)
    assert_same(path, [(layer, expert) for layer in (2, 1) for expert in (1, 0)])


def test_tensors_may_stand_askew_in_a_file(tmp_path: Path) -> None:
    """The format does not say that data begins at a multiple of the dtype's size."""
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", dict)
    file = path / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length])).encode()
    header += b" " * (1 - len(header) % 2)  # to an odd number of bytes
    file.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert len(header) % 2 == 1
    for ours, theirs in zip(read_all(path, [(1, 0)]), read_all(EXPERTS_ONLY, [(1, 0)]), strict=True):
        assert_same_expert(ours, theirs)


def test_sizes_are_those_of_every_layout_but_for_multipliers(tmp_path: Path) -> None:
    plain = write_modelopt(tmp_path / "a", num_layers=1, num_experts=3, hidden=64, intermediate=32)
    for n, write in enumerate(LAYOUTS.values()):
        path = write(with_configs(plain), tmp_path / str(n))
        with (
            ExpertCheckpoint(path) as checkpoint,
            ExpertStream(checkpoint, [(0, 2)], device=CPU) as stream,
        ):
            assert 0 < stream.sizes[0] - 3 * 64 * 32 * 9 // 16 <= 3 * 2 * 4


def test_sizes_are_those_on_disk() -> None:
    with (
        ExpertCheckpoint(EXPERTS_ONLY) as checkpoint,
        ExpertStream(checkpoint, [(1, 0)], device=CPU) as stream,
    ):
        matrices = 3 * (16 * 32 // 2 + 16 * 32 // 16)
        assert stream.sizes == [matrices + 3 * 2 * 4]


def test_experts_outlive_the_stream_and_the_file(tmp_path: Path) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", dict)
    (weights,) = read_all(path, [(1, 0)])
    with (path / "model.safetensors").open("r+b") as file:
        file.write(bytes((path / "model.safetensors").stat().st_size))
    with ExpertCheckpoint(EXPERTS_ONLY) as checkpoint:
        assert_same_expert(weights, checkpoint.read(1, 0))


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN)
def test_refuses_a_broken_expert(tmp_path: Path, change: Change, message: str) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", change)
    with pytest.raises(ValueError, match=message):
        read_all(path, [(2, 1), (1, 0)])
    read_all(path, [(2, 1)])


def test_refuses_a_layer_that_stacks_fewer_experts_than_others(tmp_path: Path) -> None:
    LAYOUTS["3-D, N first"](
        with_configs(write_modelopt(tmp_path / "a", num_layers=2, num_experts=3, hidden=16, intermediate=32)),
        tmp_path / "b",
    )
    name = "model.layers.1.mlp.experts.down_proj"
    rewrite(tmp_path / "b", tmp_path / "c", replaced(name, torch.zeros(2, 16, 16, dtype=torch.uint8)))
    with pytest.raises(ValueError, match=rf"{name} \[2, 16, 16\] has no part \(2, .*; download"):
        read_all(tmp_path / "c", [(1, 2)])


def test_refuses_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    path = rewrite(EXPERTS_ONLY, tmp_path / "c", dict)
    with ExpertCheckpoint(path) as checkpoint, ExpertStream(checkpoint, [(2, 1)], device=CPU) as stream:
        (path / "model.safetensors").write_bytes(b"")
        with pytest.raises(ValueError, match=r"model.safetensors: broken or cut short"):
            next(iter(stream))


@pytest.mark.parametrize(("layer", "expert"), [(0, 0), (1, 2), (1, -1), (3, 0)])
def test_refuses_an_expert_that_does_not_exist(layer: int, expert: int) -> None:
    with pytest.raises(ValueError, match=rf"no expert {expert} in layer {layer}, only 2 in each"):
        read_all(EXPERTS_ONLY, [(1, 0), (layer, expert)])


def test_refuses_experts_that_are_not_quantised() -> None:
    with pytest.raises(ValueError, match=r"not quantised; run `sparkmoe quantize .*source DST`"):
        read_all(DENSE, [(1, 0)])


_PEAK_GROWTH = """
import sys, pathlib, torch
from experts.checkpoint.expert_stream import ExpertStream
from experts.checkpoint.reader import ExpertCheckpoint
def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
with ExpertCheckpoint(pathlib.Path(sys.argv[1])) as checkpoint:
    experts = [(0, n % 16) for n in range(int(sys.argv[2]))]
    with ExpertStream(checkpoint, experts, device=torch.device("cpu")) as stream:
        before = peak_kib()
        for _ in stream: pass
print(peak_kib() - before)
"""


def test_memory_does_not_grow_with_the_number_of_experts(tmp_path: Path) -> None:
    path = write_modelopt(tmp_path / "c", num_layers=1, num_experts=16, hidden=1024, intermediate=768)

    def peak_growth(num_experts: int) -> int:
        command = [sys.executable, "-c", _PEAK_GROWTH, str(path), str(num_experts)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert peak_growth(400) < 160 * 1024, "536 MB were read, through 128 MiB"
