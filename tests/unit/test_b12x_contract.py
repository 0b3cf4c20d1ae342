"""FlashInfer's host code and its compiled kernels accept what backend b12x passes; no GPU is needed.

A process per case: see tests/b12x_contract.py. `make test` runs a case of each kernel, `make test-all` those of all shapes.
"""

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.unit.test_house import ROOT

MODELS = {
    "demo": (32, 256, 128, 4),
    "Qwen3-30B-A3B": (128, 2048, 768, 8),
    "Qwen3-235B-A22B": (128, 4096, 1536, 8),
    "MiniMax-M2": (256, 3072, 1536, 8),
    "GLM-4.6": (160, 5120, 1536, 8),
    "Qwen3-Coder-480B": (160, 6144, 2560, 8),
    "Qwen3-Next-80B": (512, 2048, 512, 10),
}
"""experts, hidden, intermediate, top-k. The last is known to crash in other servers."""

SMALL, LARGE = 16, 300
"""Tokens of a call: the static kernel's, and the dynamic one's."""


def contract(model: str, *, ranks: int, num_tokens: int, arch: str = "sm_121a") -> dict[str, Any]:
    experts, hidden, intermediate, top_k = MODELS[model]
    sizes = {
        "experts": experts,
        "hidden": hidden,
        "intermediate": intermediate,
        "top-k": top_k,
        "ranks": ranks,
        "tokens": num_tokens,
    }
    command = [sys.executable, "-m", "tests.b12x_contract", "--arch", arch]
    for name, value in sizes.items():
        command += [f"--{name}", str(value)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def check(found: dict[str, Any], *, kernel: str, arch: str = "sm_121a") -> None:
    assert found["verdict"] == "accepted", found
    assert found["kernel"].startswith(kernel), found
    assert found["target"] == arch, found
    assert found["mma"] > 0, "no block-scaled FP4 tensor-core instructions"
    assert 0 < found["registers"] <= 255, found


@pytest.mark.parametrize("num_tokens", [SMALL, LARGE], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "model",
    [name if name == "demo" else pytest.param(name, marks=pytest.mark.slow) for name in MODELS],
)
def test_the_kernel_accepts_the_call(model: str, num_tokens: int) -> None:
    check(
        contract(model, ranks=2, num_tokens=num_tokens), kernel="static" if num_tokens == SMALL else "dynamic"
    )


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [1, 2048])
@pytest.mark.parametrize("ranks", [3, 8])
@pytest.mark.parametrize("model", ["demo", "Qwen3-235B-A22B", "Qwen3-Next-80B"])
def test_the_kernel_accepts_every_share_and_bucket(model: str, ranks: int, num_tokens: int) -> None:
    kernel = "static" if num_tokens < LARGE else "dynamic"
    check(contract(model, ranks=ranks, num_tokens=num_tokens), kernel=kernel)


@pytest.mark.slow
@pytest.mark.parametrize("num_tokens", [SMALL, LARGE], ids=["static", "dynamic"])
@pytest.mark.parametrize("model", ["demo", "Qwen3-Next-80B"])
def test_the_kernels_compile_for_sm_120a(model: str, num_tokens: int) -> None:
    kernel = "static" if num_tokens == SMALL else "dynamic"
    check(contract(model, ranks=2, num_tokens=num_tokens, arch="sm_120a"), kernel=kernel, arch="sm_120a")
