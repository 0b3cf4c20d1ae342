"""FlashInfer's host code and its compiled kernels accept what backend b12x passes; no GPU is needed.

`make test` compiles what one of two shards needs for two of the layer shapes, `make test-all` the rest: all shapes, 3 and
8 shards, W4A16, both GPUs.
"""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest

from experts.backends.b12x.numerics import STATIC_PAIRS, is_static
from tests.support.b12x_calls import MISTAKES
from tests.support.b12x_contract import ACCEPTED, MODELS, Case, Findings, examine, pool


def edges(model: str) -> tuple[int, int]:
    """Return the tokens of the static kernel's largest call, and of the dynamic one's smallest."""
    largest = STATIC_PAIRS // MODELS[model].top_k
    return largest, largest + 1


ARCHES = ("sm_121a", "sm_120a")
DEMO = Case("demo", tokens=edges("demo"), mistakes=True)
TWO_SHARDS = [Case(model) for model in ("Qwen3-235B-A22B", "MiniMax-M2")]
MORE = [
    *(Case(model) for model in MODELS if Case(model) not in TWO_SHARDS),
    *(Case(model, ranks) for model in MODELS for ranks in (3, 8)),
]
SM120 = [Case(model, arch="sm_120a") for model in MODELS]
W4A16 = [Case("demo", mode="w4a16", tokens=(1, 6))]
MORE_W4A16 = [Case(model, mode="w4a16", arch=arch) for model in MODELS for arch in ARCHES]
EVERY_CASE = [DEMO, *TWO_SHARDS, *W4A16, *MORE, *SM120, *MORE_W4A16]

FUSED, SUM = "moe.w4a16.fused_moe", "moe.w4a16.topk_sum"
TC_DECODE_TOKENS = 4

STATIC_ACCEPTS = {"int64 ids", "an id beyond the slots", "bfloat16 weights", "another top_k", "top_k 33"}
DYNAMIC_ACCEPTS = STATIC_ACCEPTS | {
    "float32 x",
    "float16 x",
    "strided x",
    "misaligned x",
    "fewer rows of x",
    "fewer weights",
    "float32 out",
    "short out",
    "strided out",
}
"""The MISTAKES that the dynamic kernel accepts; it passes bare pointers.

test_b12x.py shows that we refuse them all.
"""

DEADLINE_S = 240

Pending = dict[Case, Future[Findings]]


@pytest.fixture(scope="module")
def pending(request: pytest.FixtureRequest) -> Iterator[Pending]:
    """Yield the findings to come of all cases of this run, started at once, as many at a time as there are
    cores."""
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    cases = {spec.params["case"] for spec in chosen if spec and isinstance(spec.params.get("case"), Case)}
    with pool() as processes:
        yield {case: processes.submit(examine, case) for case in EVERY_CASE if case in cases}
        processes.shutdown(cancel_futures=True)


def slow(cases: list[Case]) -> list[object]:
    return [pytest.param(case, marks=pytest.mark.slow) for case in cases]


@pytest.mark.parametrize("case", [DEMO, *TWO_SHARDS, *slow(MORE + SM120)], ids=str)
def test_the_kernels_compile_and_accept_our_calls(case: Case, pending: Pending) -> None:
    found = pending[case].result(DEADLINE_S)
    assert found.verdicts == dict.fromkeys(case.tokens, ACCEPTED)
    for num_tokens, (kernel,) in found.launches.items():
        path = "static" if is_static(num_tokens, MODELS[case.model].top_k) else "dynamic"
        assert kernel.startswith(path), num_tokens
    check_kernels(found, case)


@pytest.mark.parametrize("case", [*W4A16, *slow(MORE_W4A16)], ids=str)
def test_the_kernels_of_w4a16_compile(case: Case, pending: Pending) -> None:
    found = pending[case].result(DEADLINE_S)
    for num_tokens, launched in found.launches.items():
        sums_in_the_same_kernel = num_tokens <= TC_DECODE_TOKENS
        expected = [FUSED] if sums_in_the_same_kernel else [FUSED, SUM]
        assert [name.rpartition("_")[0] for name in launched] == expected, num_tokens
    check_kernels(found, case)


@pytest.mark.parametrize("case", [DEMO], ids=str)
def test_what_the_library_accepts_that_we_refuse(case: Case, pending: Pending) -> None:
    accepted = {
        num_tokens: {mistake for mistake, verdict in said.items() if verdict == ACCEPTED}
        for num_tokens, said in pending[case].result(DEADLINE_S).mistakes.items()
    }
    assert accepted == dict(zip(case.tokens, (STATIC_ACCEPTS, DYNAMIC_ACCEPTS), strict=True))
    assert MISTAKES.keys() > DYNAMIC_ACCEPTS > STATIC_ACCEPTS


def check_kernels(found: Findings, case: Case) -> None:
    assert found.kernels
    for kernel in found.kernels:
        assert kernel.target == case.arch
        assert kernel.mma > 0 or kernel.name.startswith(SUM), (
            f"{kernel.name} has none of the tensor-core instructions"
        )
        assert 0 < kernel.registers <= 255, kernel
