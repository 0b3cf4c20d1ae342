"""What a step's logits say of its requests: the next token of each, and how likely their prompts were. V vocabulary."""

from collections.abc import Sequence

from torch import Tensor

from router.sampling.sampler import Sampled, SamplingRow, prompt_logprobs, sample
from router.schedule.running import RunningRequest
from router.schedule.step_plan import PlannedChunk


def sample_next(running: Sequence[RunningRequest], logits_NV: Tensor) -> list[Sampled]:
    """One token for each request, from its row of logits. Raises LogitsError."""
    return sample(logits_NV, [_row(one) for one in running]) if running else []


def score_prompt(part: PlannedChunk, part_NV: Tensor) -> None:
    """Row i of a chunk gives the probability of the token after it; the last row of a prompt gives the answer's."""
    request = part.running.request
    assert request.params.prompt_logprobs is not None
    next_tokens = request.prompt[part.chunk.start + 1 : part.chunk.start + part.chunk.count + 1]
    if next_tokens:
        scores = prompt_logprobs(
            part_NV[: len(next_tokens)], next_tokens, num_top=request.params.prompt_logprobs
        )
        part.running.answer.score_prompt(part.chunk.start, scores)


def _row(one: RunningRequest) -> SamplingRow:
    """A grammar decides by itself when a text may end."""
    return SamplingRow(
        one.request.params,
        one.seed,
        tokens=one.tokens,
        num_prompt=len(one.request.prompt),
        banned=frozenset() if one.guide else one.answer.banned,
        allowed=one.guide.allowed() if one.guide else None,
    )
