"""The sampler against one slow row at a time, against transformers' logits processors, and against its own
promises."""

import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from router.request import SamplingParams
from router.sampling.sampler import LogitsError, SamplingRow, prompt_logprobs, sample, uniform

GREEDY = SamplingParams(temperature=0)


VOCABULARY = 40


def row(
    params: SamplingParams,
    *,
    seed: int = 0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
    banned: frozenset[int] = frozenset(),
    allowed: frozenset[int] | None = None,
) -> SamplingRow:
    return SamplingRow(
        params,
        seed=seed,
        tokens=[*prompt, *output],
        num_prompt=len(prompt),
        banned=banned,
        allowed=None if allowed is None else as_bits(allowed),
    )


def as_bits(tokens: frozenset[int]) -> np.ndarray:
    """Return allowed tokens as bits, as llguidance has them."""
    words = np.zeros(-(-VOCABULARY // 32), np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1 << token % 32)
    return words.view(np.int32)


def token_of(logits_V: torch.Tensor, one: SamplingRow) -> int:
    return sample(logits_V[None], [one])[0].token


def logits(num_rows: int, vocabulary: int, *, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(num_rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def kept_tokens(
    logits_V: torch.Tensor,
    params: SamplingParams,
    *,
    draws: int = 400,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> set[int]:
    """Return every token that any noise gives."""
    rows = [row(params, seed=seed, prompt=prompt, output=output) for seed in range(draws)]
    return {sampled.token for sampled in sample(logits_V.expand(draws, -1), rows)}


# The reference: float64, one row, one rule after the other.


def ruled(logits_V: np.ndarray, one: SamplingRow) -> np.ndarray:
    changed = logits_V.astype(np.float64)
    for token, bias in one.params.logit_bias:
        changed[token] += bias
    for token in range(VOCABULARY):
        forbidden = one.allowed is not None and not one.allowed[token // 32] >> token % 32 & 1
        if forbidden or token in one.banned:
            changed[token] = -np.inf
    return changed


def penalised(logits_V: np.ndarray, one: SamplingRow) -> np.ndarray:
    changed = ruled(logits_V, one)
    for token in set(one.tokens):
        penalty = one.params.repetition_penalty
        changed[token] = changed[token] / penalty if changed[token] > 0 else changed[token] * penalty
    for token, count in Counter(one.tokens[one.num_prompt :]).items():
        changed[token] -= count * one.params.frequency_penalty + one.params.presence_penalty
    return changed


def distribution(logits_V: np.ndarray, one: SamplingRow) -> np.ndarray:
    """Return the probabilities that the token is drawn from."""
    params = one.params
    scaled = penalised(logits_V, one) / params.temperature
    p_V = np.exp(scaled - scaled.max())
    p_V[p_V < params.min_p] = 0  # the likeliest has 1
    if params.top_k:
        p_V[p_V < np.sort(p_V)[::-1][min(params.top_k, len(p_V)) - 1]] = 0
    before = 0.0
    total = p_V.sum()
    for token in np.argsort(-p_V, kind="stable"):
        keep = before < params.top_p * total
        before += p_V[token]
        p_V[token] *= keep
    return p_V / p_V.sum()


def reference(logits_V: np.ndarray, one: SamplingRow) -> int:
    if one.params.temperature < 1e-5:
        return int(np.argmax(penalised(logits_V, one)))
    cumulated = np.cumsum(distribution(logits_V, one))
    return int(np.argmax(cumulated > uniform(one.seed, len(one.tokens) - one.num_prompt) * cumulated[-1]))


tokens = st.lists(st.integers(0, VOCABULARY - 1), max_size=12)
some_tokens = st.frozensets(st.integers(0, VOCABULARY - 1), max_size=VOCABULARY // 2)
biases = st.dictionaries(
    st.integers(0, VOCABULARY - 1), st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=3
)
sampling_params = st.builds(
    SamplingParams,
    logit_bias=biases.map(lambda bias: tuple(bias.items())),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    top_k=st.sampled_from([0, 1, 5, VOCABULARY, 1000]),
    min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.9, -1.1]),
    frequency_penalty=st.sampled_from([0.0, 0.7, -0.6]),
    logprobs=st.sampled_from([None, 0, 3]),
)
sampling_rows = st.builds(
    row,
    sampling_params,
    seed=st.integers(-(2**63) + 1, 2**63 - 1),
    prompt=tokens,
    output=tokens,
    banned=some_tokens,
    allowed=st.none() | some_tokens.map(lambda tokens: frozenset(range(VOCABULARY)) - tokens),
).filter(lambda one: (ruled(np.zeros(VOCABULARY), one) > -np.inf).any())


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(sampling_rows, min_size=1, max_size=6), seed=st.integers(0, 1000))
def test_equals_the_reference_row_by_row(rows: list[SamplingRow], seed: int) -> None:
    logits_NV = logits(len(rows), VOCABULARY, seed=seed)
    given_NV = logits_NV.clone()
    sampled = sample(logits_NV, rows)
    expected = [reference(row_V.numpy(), one) for row_V, one in zip(logits_NV, rows, strict=True)]
    assert [each.token for each in sampled] == expected
    assert torch.equal(logits_NV, given_NV), "the caller's logits changed"


@settings(max_examples=50, deadline=None)
@given(rows=st.lists(sampling_rows, min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_a_row_gives_the_same_alone_and_in_any_batch(rows: list[SamplingRow], seed: int) -> None:
    logits_NV = logits(len(rows), VOCABULARY, seed=seed)
    together = sample(logits_NV, rows)
    reversed_ = sample(logits_NV.flip(0), rows[::-1])[::-1]
    alone = [sample(logits_NV[n : n + 1], [one])[0] for n, one in enumerate(rows)]
    assert [each.token for each in together] == [each.token for each in reversed_]
    assert [each.token for each in together] == [each.token for each in alone]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(
            temperature=1.3, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.2, presence_penalty=0.5
        ),
    ],
    ids=["temperature", "top_k", "top_p", "min_p", "all"],
)
def test_frequencies_follow_the_probabilities(params: SamplingParams) -> None:
    draws, logits_V = 20_000, logits(1, 16, seed=4)[0]
    rows = [row(params, seed=seed, prompt=[1, 2], output=[3, 3]) for seed in range(draws)]
    drawn = sample(logits_V.expand(draws, -1), rows)
    observed = np.bincount([each.token for each in drawn], minlength=16)
    p_V = distribution(logits_V.numpy(), rows[0])
    assert not observed[p_V == 0].any()
    expected = draws * p_V[p_V > 0]
    chi_square = float(((observed[p_V > 0] - expected) ** 2 / expected).sum())
    freedom = max(len(expected) - 1, 1)
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom), (chi_square, freedom)


@pytest.mark.parametrize(
    ("params", "processors"),
    [
        (SamplingParams(top_k=4), [TopKLogitsWarper(4)]),
        (SamplingParams(top_p=0.7), [TopPLogitsWarper(0.7)]),
        (SamplingParams(min_p=0.1), [MinPLogitsWarper(0.1)]),
        (SamplingParams(temperature=2.0, top_p=0.7), [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.7)]),
        (SamplingParams(top_k=6, top_p=0.8), [TopKLogitsWarper(6), TopPLogitsWarper(0.8)]),
        (SamplingParams(min_p=0.05, top_p=0.9), [MinPLogitsWarper(0.05), TopPLogitsWarper(0.9)]),
        (
            SamplingParams(repetition_penalty=1.5, top_k=3),
            [RepetitionPenaltyLogitsProcessor(1.5), TopKLogitsWarper(3)],
        ),
    ],
    ids=["top_k", "top_p", "min_p", "temperature", "top_k+top_p", "min_p+top_p", "repetition"],
)
@pytest.mark.parametrize("seed", range(3))
def test_keeps_what_transformers_keeps(
    params: SamplingParams, processors: list[LogitsProcessor], seed: int
) -> None:
    logits_V = logits(1, 12, seed=seed)[0] / 2  # flat enough that every kept token is drawn
    prompt, output = [0, 1, 2], [3, 4]
    scores = logits_V[None].clone()
    for processor in processors:
        scores = processor(torch.LongTensor([prompt + output]), scores)
    expected = set(scores[0].isfinite().nonzero().flatten().tolist())
    assert kept_tokens(logits_V, params, draws=3000, prompt=prompt, output=output) == expected


def test_repetition_penalty_is_that_of_transformers() -> None:
    logits_V = logits(1, VOCABULARY, seed=1)[0]
    one = row(SamplingParams(repetition_penalty=1.7), prompt=[3, 5, 5], output=[7, 3])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(
        torch.LongTensor([[3, 5, 5, 7, 3]]), logits_V[None].clone()
    )[0]
    np.testing.assert_allclose(penalised(logits_V.numpy(), one), expected.numpy(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_ties_pick_the_lowest_id(dtype: torch.dtype) -> None:
    logits_NV = torch.zeros(3, 5000, dtype=dtype)
    logits_NV[1, [4000, 17, 300]] = 1
    logits_NV[2, 4999] = 1
    assert [each.token for each in sample(logits_NV, [row(GREEDY)] * 3)] == [0, 17, 4999]
    penalised = SamplingParams(temperature=0, repetition_penalty=2)
    assert token_of(logits_NV[1], row(penalised, output=[17])) == 300


def test_a_tiny_temperature_is_greedy() -> None:
    logits_V = logits(1, VOCABULARY)[0]
    assert kept_tokens(logits_V, SamplingParams(temperature=1e-40)) == {int(logits_V.argmax())}


def test_top_p_takes_the_lowest_ids_of_equal_tokens() -> None:
    assert kept_tokens(torch.zeros(10), SamplingParams(top_p=0.25)) == {0, 1, 2}


def test_top_p_counts_the_tokens_that_tie_with_the_kth() -> None:
    assert kept_tokens(torch.zeros(10), SamplingParams(top_k=3, top_p=0.75)) == set(range(8))


def test_top_k_keeps_ties() -> None:
    assert kept_tokens(torch.tensor([1.0, 0, 1, 1]), SamplingParams(top_k=1)) == {0, 2, 3}


@pytest.mark.parametrize("noise", [0.0, 1 - 2.0**-53], ids=["least", "greatest"])
def test_a_forbidden_token_is_never_drawn(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("router.sampling.sampler.uniform", lambda seed, position: noise)
    logits_V = torch.full((1000,), -torch.inf)
    logits_V[[300, 301, 700]] = torch.tensor([1.0, 9.0, 2.0])
    assert token_of(logits_V, row(SamplingParams())) == (300 if noise == 0 else 700)


def test_noise_is_a_function_of_seed_and_position() -> None:
    noise = [uniform(seed, position) for seed in range(-50, 50) for position in range(50)]
    assert len(set(noise)) == len(noise)
    assert 0 <= min(noise) < 0.01
    assert 0.99 < max(noise) < 1
    assert abs(np.mean(noise) - 0.5) < 0.02
    assert uniform(7, 3) == 0.1846062188940475  # a change would break every stored seed


def test_position_is_the_number_of_generated_tokens() -> None:
    logits_V, params = torch.zeros(1000), SamplingParams()
    drawn = [token_of(logits_V, row(params, seed=5, output=[9] * n)) for n in range(20)]
    assert len(set(drawn)) > 15
    assert drawn[8] == token_of(logits_V, row(params, seed=5, prompt=[1, 2], output=[4] * 8))


def test_logprobs_are_of_the_raw_logits() -> None:
    logits_NV = logits(3, VOCABULARY)
    params = SamplingParams(temperature=0, repetition_penalty=5, logprobs=4)
    rows = [row(params, output=[int(logits_NV[0].argmax())]), row(GREEDY), row(SamplingParams(logprobs=0))]
    first, second, third = sample(logits_NV, rows)
    expected_NV = torch.log_softmax(logits_NV, dim=-1)

    assert second.logprob is None
    assert third.logprob is not None
    assert third.logprob.top == ()
    assert first.logprob is not None
    assert first.token != first.logprob.top[0][0], "the penalty changes the choice, not the report"
    assert first.logprob.token == first.token
    assert first.logprob.logprob == pytest.approx(float(expected_NV[0, first.token]), abs=1e-5)
    top = expected_NV[0].topk(4)
    assert [id_ for id_, _ in first.logprob.top] == top.indices.tolist()
    assert [logprob for _, logprob in first.logprob.top] == pytest.approx(top.values.tolist(), abs=1e-5)


def test_all_logprobs_sum_to_one() -> None:
    (sampled,) = sample(logits(1, 20).bfloat16(), [row(SamplingParams(logprobs=20))])
    assert sampled.logprob is not None
    assert sum(math.exp(logprob) for _, logprob in sampled.logprob.top) == pytest.approx(1, abs=1e-5)


def test_more_logprobs_than_tokens() -> None:
    (sampled,) = sample(logits(1, 3), [row(SamplingParams(logprobs=20))])
    assert sampled.logprob is not None
    assert len(sampled.logprob.top) == 3


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(top_p=0.9, top_k=3, logprobs=2)], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
def test_bad_logits_name_their_rows(params: SamplingParams, value: float) -> None:
    logits_NV = logits(4, VOCABULARY)
    logits_NV[1, 7] = value
    logits_NV[3] = -math.inf
    with pytest.raises(LogitsError, match=r"rows \[1, 3\]") as caught:
        sample(logits_NV, [row(params)] * 4)
    assert caught.value.rows == (1, 3)


@pytest.mark.parametrize("num_top", [0, 3])
def test_prompt_logprobs(num_top: int) -> None:
    logits_TV, next_tokens = logits(6, VOCABULARY).bfloat16(), [0, 3, 39, 8, 8, 1]
    expected_TV = torch.log_softmax(logits_TV.float(), dim=-1)
    scores = prompt_logprobs(logits_TV, next_tokens, num_top=num_top)
    assert [score.token for score in scores] == next_tokens
    for score, expected_V in zip(scores, expected_TV, strict=True):
        assert score.logprob == pytest.approx(expected_V[score.token].item())
        best = expected_V.topk(num_top)
        assert [token for token, _ in score.top] == best.indices.tolist()
        assert [logprob for _, logprob in score.top] == pytest.approx(best.values.tolist())


def test_no_rows() -> None:
    assert sample(torch.zeros(0, VOCABULARY), []) == []


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(top_p=0.5, top_k=3, logprobs=2)], ids=["greedy", "drawn"]
)
def test_one_transfer_to_the_host(params: SamplingParams, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counter[str]()
    for name in ("tolist", "item", "cpu", "__bool__", "__int__", "__float__", "nonzero"):
        original = getattr(torch.Tensor, name)

        def count(*args: object, name: str = name, original: Callable = original) -> object:
            counted[name] += 1
            return original(*args)

        monkeypatch.setattr(torch.Tensor, name, count)
    sample(logits(4, VOCABULARY), [row(params)] * 4)
    assert counted == {"tolist": 1}
