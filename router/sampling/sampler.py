"""Sampler: from logits to tokens. Pure: a token depends only on its row's logits, parameters, history and seed.

N rows (one per sampled request), R of them that some rule applies to, V vocabulary. Names, order and meaning are vLLM's
(V1): bias and bans, penalties, temperature, min_p, top_k, top_p. Log-probabilities are of the logits before all of these.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from router.request import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5  # a lower temperature is greedy (vLLM's bound): dividing by it would overflow float32


@dataclass(frozen=True)
class SamplingRow:
    """Everything that the sampler must know of one request, besides its logits.

    seed: params.seed or, where that is None, the one that was drawn for the request's whole life.
    tokens: num_prompt of the prompt, then those generated so far; their number and the seed determine the noise.
    banned: tokens that may not come next. allowed: the mask of those that may, see Guide.allowed; None allows all.
    """

    params: SamplingParams
    seed: int
    tokens: Sequence[int]
    num_prompt: int
    banned: frozenset[int] = frozenset()
    allowed: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Sampled:
    """The token sampled from one row. logprob: None unless params.logprobs asked for it."""

    token: int
    logprob: TokenLogprob | None = None


class LogitsError(ArithmeticError):
    """The largest logit of these rows is NaN or infinite: there is nothing to choose from."""

    def __init__(self, rows: tuple[int, ...]) -> None:
        super().__init__(f"logits of rows {list(rows)} have no finite maximum")
        self.rows = rows


def sample(logits_NV: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
    """Return one token per row. The logits, of any floating dtype and device, are not changed; -inf forbids a token.

    Waits for the device once. Raises LogitsError, which names every bad row; the other rows may be sampled again.
    """
    assert len(logits_NV) == len(rows), (logits_NV.shape, len(rows))
    peak_N, token_N = logits_NV.max(dim=-1)  # NaN wins; the lowest id wins a tie
    if not all(_is_argmax(row) for row in rows):
        token_N = _choose(logits_NV.float(), rows)
    columns = [token_N[:, None], peak_N[:, None]]
    num_top = max((row.params.logprobs for row in rows if row.params.logprobs is not None), default=None)
    if num_top is not None:
        columns += _logprobs(logits_NV.float(), token_N, num_top=num_top)
    table = torch.cat([column.double() for column in columns], dim=1).tolist()  # float64 holds every token id
    bad = tuple(n for n, (_, peak, *_) in enumerate(table) if not math.isfinite(peak))
    if bad:
        raise LogitsError(bad)
    return [_sampled(row.params, values) for row, values in zip(rows, table, strict=True)]


def prompt_logprobs(logits_TV: Tensor, next_tokens: Sequence[int], *, num_top: int) -> list[TokenLogprob]:
    """Return the logprob that row t gives to next_tokens[t], with its num_top likeliest tokens. A NaN logit gives NaN."""
    token_T = _tensor(next_tokens, logits_TV)
    table = torch.cat(
        [column.double() for column in _logprobs(logits_TV.float(), token_T, num_top=num_top)], dim=1
    )
    return [_logprob(token, values) for token, values in zip(next_tokens, table.tolist(), strict=True)]


def uniform(seed: int, position: int) -> float:
    """Return the noise of one token: a multiple of 2^-53 in [0, 1), the same on every machine."""
    key = (seed % 2**64).to_bytes(8, "little") + position.to_bytes(8, "little")
    return (int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 11) * 2.0**-53


def _is_greedy(params: SamplingParams) -> bool:
    return params.temperature < GREEDY_BELOW


def _is_argmax(row: SamplingRow) -> bool:
    """Return whether the row's token is simply that of the largest logit."""
    return _is_greedy(row.params) and not _has_penalty(row.params) and not _has_rules(row)


def _has_rules(row: SamplingRow) -> bool:
    return bool(row.params.logit_bias or row.banned) or row.allowed is not None


def _has_penalty(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1, 0, 0)


def _choose(logits_NV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return the token of each row, int64 [N]. logits_NV: float32."""
    ruled = [n for n, row in enumerate(rows) if _has_rules(row)]
    if ruled:
        index = _tensor(ruled, logits_NV)
        logits_NV = logits_NV.index_copy(0, index, _apply_rules(logits_NV[index], [rows[n] for n in ruled]))
    penalised = [n for n, row in enumerate(rows) if _has_penalty(row.params)]
    if penalised:
        index = _tensor(penalised, logits_NV)
        changed = _penalise(logits_NV[index], [rows[n] for n in penalised])
        logits_NV = logits_NV.index_copy(0, index, changed)
    token_N = logits_NV.argmax(dim=-1)
    random = [n for n, row in enumerate(rows) if not _is_greedy(row.params)]
    if random:
        index = _tensor(random, logits_NV)
        token_N[index] = _draw(logits_NV[index], [rows[n] for n in random])
    return token_N


def _apply_rules(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Add biases, and set banned tokens and all but the allowed ones to -inf."""
    cells = [(r, token, bias) for r, row in enumerate(rows) for token, bias in row.params.logit_bias]
    cells += [(r, token, -math.inf) for r, row in enumerate(rows) for token in row.banned]
    if cells:
        row_C, token_C, bias_C = zip(*cells, strict=True)
        place = (_tensor(row_C, logits_RV), _tensor(token_C, logits_RV))
        logits_RV = logits_RV.index_put(place, _column(bias_C, logits_RV)[:, 0], accumulate=True)
    for r, row in enumerate(rows):
        if row.allowed is not None:
            logits_RV[r].masked_fill_(~_bits(row.allowed, logits_RV), -torch.inf)
    return logits_RV


def _bits(words: np.ndarray, like_RV: Tensor) -> Tensor:
    """Return the mask bool [V] of a Guide's words."""
    words_W = torch.from_numpy(words.copy()).to(like_RV.device, non_blocking=True)
    bits_W32 = (words_W[:, None] >> torch.arange(32, dtype=torch.int32, device=like_RV.device)) & 1
    return bits_W32.flatten()[: like_RV.shape[1]].bool()


def _penalise(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Apply the penalties.

    repetition_penalty: logits of tokens of prompt and output are multiplied by it if negative, else divided. Then, for
    tokens of the output, frequency_penalty is subtracted once per occurrence and presence_penalty once.
    """
    params = [row.params for row in rows]
    repetition_R1 = _column([p.repetition_penalty for p in params], logits_RV)
    frequency_R1 = _column([p.frequency_penalty for p in params], logits_RV)
    presence_R1 = _column([p.presence_penalty for p in params], logits_RV)
    output_RV = _counts([row.tokens[row.num_prompt :] for row in rows], logits_RV)
    prompts = [row.tokens[: row.num_prompt] if row.params.repetition_penalty != 1 else () for row in rows]
    seen_RV = (_counts(prompts, logits_RV) + output_RV) > 0
    repeated_RV = torch.where(logits_RV > 0, logits_RV / repetition_R1, logits_RV * repetition_R1)
    logits_RV = torch.where(seen_RV, repeated_RV, logits_RV)
    return logits_RV - frequency_R1 * output_RV - presence_R1 * (output_RV > 0)


def _counts(tokens: Sequence[Sequence[int]], like_RV: Tensor) -> Tensor:
    """Return how often each token occurs in each row's sequence, int32 [R, V]."""
    vocabulary = like_RV.shape[1]
    # numpy reads a list of integers eight times faster than torch.
    cells = np.concatenate([np.array(ids, np.int64) + row * vocabulary for row, ids in enumerate(tokens)])
    cells = torch.from_numpy(cells).to(like_RV.device, non_blocking=True)
    counts = torch.zeros(like_RV.numel(), dtype=torch.int32, device=like_RV.device)
    return counts.index_add_(0, cells, torch.ones_like(cells, dtype=torch.int32)).view_as(like_RV)


def _draw(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Return, int64 [R], the first token at which the cumulated weight of the kept ones exceeds uniform() of the total.

    Weights are whole numbers, the likeliest token's 2^32: their float64 sums are exact below 2^21 tokens, so any
    order of summation gives the same token, and never one of weight 0 (a share under 2^-33 of the likeliest's).
    """
    params = [row.params for row in rows]
    logits_RV = logits_RV / _column([p.temperature for p in params], logits_RV)
    logits_RV = _keep_min_p(logits_RV, [p.min_p for p in params])
    logits_RV = _keep_top_k(logits_RV, [p.top_k for p in params])
    weights_RV = ((logits_RV - logits_RV.amax(dim=-1, keepdim=True)).exp() * 2.0**32).round()
    weights_RV = _keep_top_p(weights_RV, [p.top_p for p in params], [p.top_k for p in params])
    sums_RV = weights_RV.cumsum(dim=-1, dtype=torch.float64)
    noise_R1 = _column([uniform(row.seed, len(row.tokens) - row.num_prompt) for row in rows], sums_RV)
    drawn_R1 = torch.searchsorted(sums_RV, noise_R1 * sums_RV[:, -1:], right=True)
    return drawn_R1.squeeze(1).clamp(max=logits_RV.shape[1] - 1)  # a row of NaN, soon refused, gives V


def _keep_min_p(logits_RV: Tensor, min_p: Sequence[float]) -> Tensor:
    """Set tokens that are less likely than min_p times the likeliest to -inf."""
    if not any(min_p):
        return logits_RV
    bound_R1 = logits_RV.amax(dim=-1, keepdim=True) + _column(min_p, logits_RV).log()
    return logits_RV.masked_fill(logits_RV < bound_R1, -torch.inf)


def _keep_top_k(logits_RV: Tensor, top_k: Sequence[int]) -> Tensor:
    """Set all but the k likeliest tokens to -inf. Tokens that tie with the k-th stay; 0 keeps all."""
    largest = min(max(top_k), logits_RV.shape[1])
    if largest == 0:
        return logits_RV
    top_Rk = logits_RV.topk(largest).values
    k_R1 = _tensor(top_k, logits_RV)[:, None]
    kth_R1 = top_Rk.gather(1, k_R1.clamp(1, largest) - 1)
    return logits_RV.masked_fill((k_R1 > 0) & (logits_RV < kth_R1), -torch.inf)


def _keep_top_p(weights_RV: Tensor, top_p: Sequence[float], top_k: Sequence[int]) -> Tensor:
    """Keep a token if those before it weigh less than top_p of all, and set the others to 0.

    Tokens are ordered likeliest first, lower ids first among equals. top_k: already applied; where all rows with a top_p
    have one, no vocabulary is sorted.
    """
    nucleus = [r for r, p in enumerate(top_p) if p < 1]
    if not nucleus:
        return weights_RV
    index = _tensor(nucleus, weights_RV)
    asking_RV = weights_RV[index]
    vocabulary = asking_RV.shape[1]
    likeliest_Rk = asking_RV.topk(max(min(top_k[r] or vocabulary, vocabulary) for r in nucleus)).values
    sums_Rk = likeliest_Rk.cumsum(dim=-1, dtype=torch.float64)
    bound_R1 = asking_RV.sum(dim=-1, keepdim=True, dtype=torch.float64)
    bound_R1 *= _column([top_p[r] for r in nucleus], sums_Rk)
    num_kept_R1 = (sums_Rk - likeliest_Rk < bound_R1).sum(dim=-1, keepdim=True)
    least_R1 = likeliest_Rk.gather(1, (num_kept_R1 - 1).clamp(min=0))
    # More tokens than one may weigh as little as the least that is kept, also beyond the k-th.
    num_above_R1 = (likeliest_Rk > least_R1).sum(dim=-1, keepdim=True)
    above_R1 = sums_Rk.gather(1, (num_above_R1 - 1).clamp(min=0)).masked_fill(num_above_R1 == 0, 0)
    num_least_R1 = ((bound_R1 - above_R1) / least_R1).ceil()
    is_least_RV = asking_RV == least_R1
    kept_RV = (asking_RV > least_R1) | (is_least_RV & (is_least_RV.cumsum(dim=-1) <= num_least_R1))
    return weights_RV.index_copy(0, index, asking_RV.masked_fill(~kept_RV, 0))


def _logprobs(logits_NV: Tensor, token_N: Tensor, *, num_top: int) -> list[Tensor]:
    """Return logprobs [N, 1] of the chosen tokens, then id and logprob of each alternative, likeliest first, [N, 2 * num_top]."""
    ids_Nk = logits_NV.topk(min(num_top, logits_NV.shape[1])).indices
    logprob_Nk = _logprob_of(logits_NV, torch.cat([token_N[:, None], ids_Nk], dim=1))
    top_Nk2 = torch.stack([ids_Nk.double(), logprob_Nk[:, 1:].double()], dim=2)
    return [logprob_Nk[:, :1], top_Nk2.flatten(start_dim=1)]


def _logprob_of(logits_NV: Tensor, ids_Nk: Tensor) -> Tensor:
    """Return the logprobs of these tokens, [N, k], in the logits' dtype."""
    return logits_NV.gather(1, ids_Nk) - logits_NV.logsumexp(dim=-1, keepdim=True)


def _sampled(params: SamplingParams, values: Sequence[float]) -> Sampled:
    """Return one row's result. values: token, largest logit and, if any row asked for logprobs, the row of _logprobs."""
    token = int(values[0])
    if params.logprobs is None:
        return Sampled(token)
    return Sampled(token, _logprob(token, values[2 : 3 + 2 * params.logprobs]))


def _logprob(token: int, values: Sequence[float]) -> TokenLogprob:
    """Return a TokenLogprob. values: the token's logprob, then id and logprob of each alternative."""
    top = zip(values[1::2], values[2::2], strict=True)
    return TokenLogprob(token, values[0], tuple((int(other), logprob) for other, logprob in top))


def _tensor(values: Sequence[int], like: Tensor) -> Tensor:
    """Return an int64 tensor on like's device, without waiting for the device."""
    return torch.tensor(values, dtype=torch.int64).to(like.device, non_blocking=True)


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    """Return a tensor [R, 1] of like's dtype on its device, without waiting for the device."""
    return torch.tensor(values, dtype=like.dtype).to(like.device, non_blocking=True)[:, None]
