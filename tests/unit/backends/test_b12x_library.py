"""Tests of what b12x needs of a machine, and what `auto` stands for."""

from dataclasses import replace

import pytest

from experts.backends.b12x import library
from experts.backends.b12x.library import Machine

PACKAGES: dict[str, str | None] = {
    "flashinfer-python": "0.7.2.post1",
    "nvidia-cutlass-dsl": "4.7.1",
    "triton": "3.9.0",
}
SPARK = Machine((12, 1), 13, PACKAGES)


@pytest.mark.parametrize(
    ("machine", "reason"),
    [
        (replace(SPARK, capability=None), "needs an SM120 or SM121 GPU .* this process has no GPU"),
        (replace(SPARK, capability=(9, 0)), "needs an SM120 or SM121 GPU .* this one is SM90"),
        (replace(SPARK, cuda=12), "needs CUDA 13 or newer, but torch was built for CUDA 12"),
        (replace(SPARK, cuda=None), "needs CUDA 13 or newer"),
        (
            replace(SPARK, installed={}),
            "needs flashinfer-python 0.7.2.post1, and none is installed; run `pip",
        ),
        (
            replace(SPARK, installed=PACKAGES | {"flashinfer-python": "0.7.0"}),
            "needs flashinfer-python 0.7.2.post1, and 0.7.0 is installed",
        ),
        (
            replace(SPARK, installed=PACKAGES | {"nvidia-cutlass-dsl": "4.5.0"}),
            "needs nvidia-cutlass-dsl",
        ),
        (replace(SPARK, installed=PACKAGES | {"triton": None}), "needs triton, and none is installed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_one_sentence_says_what_is_missing(machine: Machine, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        library.require(machine)


def test_auto_goes_by_device_and_checkpoint() -> None:
    assert library.choose(SPARK, weights_only=False) == "b12x"
    assert library.choose(SPARK, weights_only=True) == "b12x-w4a16"
    assert library.choose(replace(SPARK, capability=(12, 0)), weights_only=False) == "b12x"
    assert library.choose(replace(SPARK, capability=(9, 0)), weights_only=False) == "torch"
    assert library.choose(Machine(None, None, {}), weights_only=True) == "cpu"
    with pytest.raises(ValueError, match="triton"):
        library.choose(replace(SPARK, installed=PACKAGES | {"triton": None}), weights_only=False)
