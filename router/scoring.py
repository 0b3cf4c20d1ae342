"""What a step's logits say of its requests: the next token of each, and how likely their prompts were. V vocabulary."""

from collections.abc import Sequence

import torch
from torch import Tensor

from router.request import TokenLogprob
from router.sampler import Sampled, SamplingRow, prompt_logprobs, sample
from router.scheduler import PlannedChunk, RunningRequest


def sample_next(running: Sequence[RunningRequest], logits_NV: Tensor) -> list[Sampled]:
    """One token for each request, from its row of logits. Raises LogitsError."""
    if not running:
        return []
    rows = [
        SamplingRow(
            one.request.params,
            one.seed,
            prompt=one.request.prompt,
            output=one.tokens[len(one.request.prompt) :],
        )
        for one in running
    ]
    return sample(logits_NV, rows)


def score_prompt(part: PlannedChunk, part_NV: Tensor) -> None:
    """Row i of a chunk gives the probability of the token after it; the last row of a prompt gives the answer's."""
    prompt = part.running.request.prompt
    next_tokens = prompt[part.chunk.start + 1 : part.chunk.start + part.chunk.count + 1]
    logprob_T = prompt_logprobs(part_NV[: len(next_tokens)], torch.tensor(next_tokens, device=part_NV.device))
    part.running.answer.score_prompt(
        part.chunk.start,
        [
            TokenLogprob(token, logprob)
            for token, logprob in zip(next_tokens, logprob_T.tolist(), strict=True)
        ],
    )
