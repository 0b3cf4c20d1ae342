"""The sampler on a GPU: the tokens of the CPU, and one wait for the device."""

import warnings

import pytest
import torch

from router.request import SamplingParams
from router.sampling.sampler import SamplingRow, sample

pytestmark = pytest.mark.gpu

PARAMS = [
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.7, top_k=20, top_p=0.8),
    SamplingParams(top_p=0.9, min_p=0.01, logprobs=5),
    SamplingParams(temperature=0, repetition_penalty=1.2, presence_penalty=1.0, logprobs=0),
]


def rows(num_rows: int) -> list[SamplingRow]:
    return [
        SamplingRow(PARAMS[n % len(PARAMS)], seed=n, tokens=[*range(100), *range(50, 50 + n)], num_prompt=100)
        for n in range(num_rows)
    ]


def test_gives_the_tokens_of_the_cpu() -> None:
    logits_NV = 3 * torch.randn(64, 151_936, generator=torch.Generator().manual_seed(0))
    on_cpu, on_gpu = sample(logits_NV, rows(64)), sample(logits_NV.cuda(), rows(64))
    assert [each.token for each in on_gpu] == [each.token for each in on_cpu]


def test_a_row_gives_the_same_alone() -> None:
    logits_NV = 3 * torch.randn(16, 151_936, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    together = sample(logits_NV, rows(16))
    alone = [sample(logits_NV[n : n + 1], [row])[0] for n, row in enumerate(rows(16))]
    assert [each.token for each in together] == [each.token for each in alone]


def test_greedy_ties_pick_the_lowest_id() -> None:
    logits_NV = torch.zeros(8, 151_936, device="cuda", dtype=torch.bfloat16)
    logits_NV[:, [150_000, 7_777, 70_000]] = 1
    assert {each.token for each in sample(logits_NV, rows(1) * 8)} == {7_777}


def test_waits_once() -> None:
    logits_NV = torch.randn(8, 4096, device="cuda")
    sample(logits_NV, rows(8))
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            sample(logits_NV, rows(8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1, [str(wait.message) for wait in waits]
