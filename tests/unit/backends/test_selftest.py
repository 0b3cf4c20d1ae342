"""`sparkmoe selftest` finds wrong kernels, and says so of right ones. T tokens, D hidden, K top-k."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from deploy.cli.main import app
from experts import selftest
from experts.backends import DEFAULTS, ExpertBackend
from experts.backends.b12x.library import VERSIONS, Machine
from experts.backends.grouped_mm import GroupedMmBackend
from experts.backends.registry import BACKENDS
from experts.placement import EMPTY
from experts.selftest import Layer, Result, results_of
from experts.weights import ExpertWeights

CPU = torch.device("cpu")
LAYER = Layer("small", 128, 64, num_slots=4, top_k=3)
EXPERTS = selftest.random_experts(LAYER, CPU)
SPARK = Machine(capability=(12, 1), cuda=13, installed=dict(VERSIONS))

Answer = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


class Tampered(GroupedMmBackend):
    """A backend with one mistake."""

    def __init__(self, mistake: str, *sizes: object) -> None:
        super().__init__(*sizes[:4])  # type: ignore[arg-type]
        self._mistake = mistake

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        if self._mistake == "gate and up swapped":
            weights = replace(weights, gate=weights.up, up=weights.gate)
        super().write_slot(layer, slot, weights)

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        if self._mistake == "raises":
            raise RuntimeError("an illegal\n  instruction")
        if self._mistake == "another expert":
            ids_TK = torch.where(ids_TK == EMPTY, EMPTY, (ids_TK + 1) % LAYER.num_slots)
        if self._mistake == "absent is expert 0":
            ids_TK = ids_TK.clamp(min=0)
        super().forward(layer, x_TD, ids_TK, w_TK, out_TD=out_TD)
        if self._mistake == "a multiplier":
            out_TD *= 1.05
        if self._mistake == "the last row not written":
            out_TD[-1] = float("nan")


def results(name: str, *tokens: int) -> list[Result]:
    return list(results_of(name, LAYER, EXPERTS, tokens, CPU))


@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_right_backends_pass(backend: str) -> None:
    found = results(backend, 1, 9)
    assert [result.trouble for result in found] == [""] * 4
    assert all(result.us > 0 for result in found)


@pytest.mark.parametrize("dtype", selftest.LIMITS)
@pytest.mark.parametrize(
    "mistake",
    [
        "gate and up swapped",
        "another expert",
        "absent is expert 0",
        "a multiplier",
        "the last row not written",
    ],
)
def test_mistakes_are_found_in_either_dtype(
    monkeypatch: pytest.MonkeyPatch, mistake: str, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(selftest, "resolve_dtype", lambda name, device: dtype)
    monkeypatch.setitem(BACKENDS, "tampered", lambda *sizes: Tampered("", *sizes))
    assert [result.trouble for result in results("tampered", 16)] == ["", ""]
    monkeypatch.setitem(BACKENDS, "tampered", lambda *sizes: Tampered(mistake, *sizes))
    assert "wrong" in [result.trouble for result in results("tampered", 16)]


def test_a_backend_that_raises_is_a_result_and_the_next_call_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "tampered", lambda *sizes: Tampered("raises", *sizes))
    found = results("tampered", 1, 9)
    assert [result.trouble for result in found] == ["RuntimeError: an illegal instruction"] * 4


def test_a_backend_that_cannot_be_made_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*sizes: object) -> ExpertBackend:
        raise ValueError("not this size")

    monkeypatch.setitem(BACKENDS, "tampered", refuse)
    assert [result.trouble for result in results("tampered", 1)] == ["ValueError: not this size"]


@pytest.mark.parametrize(("scales", "trouble"), [("exact", set()), ("baked", {"wrong"})])
def test_b12x_is_held_to_its_emulation(monkeypatch: pytest.MonkeyPatch, scales: str, trouble: set) -> None:
    """Baked scales are as far from the truth as another rounding of all weights."""
    emulation = BACKENDS["b12x-emulated"]
    settings = replace(DEFAULTS, scales=scales)
    monkeypatch.setattr(selftest, "resolve_dtype", lambda name, device: torch.bfloat16)
    monkeypatch.setitem(
        BACKENDS,
        "b12x",
        lambda shape, slots, dtype, device, _: emulation(shape, slots, dtype, device, settings),
    )
    assert {result.trouble for result in results("b12x", 16, 400)} - {""} == trouble


def test_b12x_must_give_the_same_bits_twice_on_its_static_path(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wavers(GroupedMmBackend):
        def forward(self, *args: Tensor, out_TD: Tensor) -> None:  # type: ignore[override]
            super().forward(*args, out_TD=out_TD)  # type: ignore[arg-type]
            out_TD += (
                1 + torch.rand(())
            ) * 1e-3  # in rows without an expert, too: never 10 times the other run's

    def make(*sizes: object) -> ExpertBackend:
        return Wavers(*sizes[:4])  # type: ignore[arg-type]

    monkeypatch.setitem(BACKENDS, "b12x", make)
    monkeypatch.setitem(BACKENDS, "b12x-emulated", make)
    monkeypatch.setattr(selftest, "LIMITS", {torch.float32: 10.0})
    assert results("b12x", 16)[0].trouble == "two runs of one call differ"
    assert results("b12x", 400)[0].trouble == "", "the dynamic path promises nothing"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest, "LAYERS", (LAYER,))
    monkeypatch.setattr(selftest, "TOKENS", {"cpu": (3,)})


@pytest.mark.usefixtures("small")
def test_the_command_prints_every_call_and_what_it_did_not_test() -> None:
    done = CliRunner().invoke(app, ["selftest"])
    assert done.exit_code == 0, done.output
    assert "not tested: backend b12x needs an SM120 or SM121 GPU" in done.output
    lines = [line.split() for line in done.output.splitlines() if line.startswith(("cpu ", "torch "))]
    assert [(line[0], line[-1]) for line in lines] == [("cpu", "ok")] * 2 + [("torch", "ok")] * 2
    assert done.output.rstrip().endswith("all 4 calls are right")


@pytest.mark.usefixtures("small")
def test_the_command_fails_with_one_wrong_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "torch", lambda *sizes: Tampered("a multiplier", *sizes))
    done = CliRunner().invoke(app, ["selftest"])
    assert done.exit_code == 1
    assert done.output.rstrip().endswith("2 of 4 calls failed: please report all of this")


@pytest.mark.usefixtures("small")
def test_a_spark_without_flashinfer_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(SPARK, installed={**SPARK.installed, "flashinfer-python": None})
    monkeypatch.setattr(selftest, "machine_of", lambda device: bare)
    done = CliRunner().invoke(app, ["selftest"])
    assert done.exit_code == 1
    assert "backend b12x needs flashinfer-python 0.7.2.post1, and none is installed" in done.output


def test_what_is_tested_follows_from_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    monkeypatch.setattr(
        selftest,
        "machine_of",
        lambda device: replace(SPARK, installed={**SPARK.installed, "triton": "3.6"}),
    )
    assert selftest.backends_of(gpu) == (("b12x", "b12x-w4a16", "triton", "torch"), "")
    monkeypatch.setattr(selftest, "machine_of", lambda device: replace(SPARK, capability=(9, 0)))
    names, reason = selftest.backends_of(gpu)
    assert names == ("triton", "torch")
    assert "this one is SM90" in reason
    assert selftest.passed(gpu, reason, [])
