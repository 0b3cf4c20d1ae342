"""Requests to the engine and its outputs. Plain data: it is sent between processes."""

import reprlib
from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "timeout", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are sampled. Names and defaults are vLLM's; temperature 0 is greedy.

    max_tokens: None stops only at the context's end; 0, with prompt_logprobs, only scores the prompt.
    min_tokens: so many tokens come before an end token or a stop string may end the text.
    stop: strings that end the text and are not part of it.
    stop_token_ids: tokens that end the text besides the model's end-of-sequence tokens; ignore_eos ignores the latter.
    logit_bias: pairs of a token id and the bias added to its logit. grammar: one that the text must follow, see
    router.sampling.grammar. top_k: 0 keeps all tokens. seed: None draws one. logprobs: the number of alternatives
    reported beside the chosen token (0: only the chosen one), None for no logprobs. prompt_logprobs: the same for every
    token of the prompt.
    """

    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    grammar: str | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        """Raise ValueError naming the field for a value that is out of range."""
        least = 1 if self.prompt_logprobs is None else 0
        _check(
            "max_tokens",
            self.max_tokens,
            self.max_tokens is None or self.max_tokens >= least,
            f"at least {least}",
        )
        _check("min_tokens", self.min_tokens, self.min_tokens >= 0, "at least 0")
        if self.max_tokens is not None:
            most = f"at most max_tokens={self.max_tokens}"
            _check("min_tokens", self.min_tokens, self.min_tokens <= self.max_tokens, most)
        _check("temperature", self.temperature, 0 <= self.temperature <= 100, "between 0 and 100")
        _check("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1")
        _check("top_k", self.top_k, self.top_k >= 0, "at least 0 (0 keeps all)")
        _check("min_p", self.min_p, 0 <= self.min_p <= 1, "between 0 and 1")
        _check("seed", self.seed, self.seed is None or abs(self.seed) < 2**63, "a 64-bit integer")
        _check("repetition_penalty", self.repetition_penalty, 0 < self.repetition_penalty <= 100, "above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            _check(name, getattr(self, name), -2 <= getattr(self, name) <= 2, "between -2 and 2")
        biases = [bias for _, bias in self.logit_bias]
        _check("logit_bias", biases, all(-100 <= bias <= 100 for bias in biases), "between -100 and 100")
        for name in ("logprobs", "prompt_logprobs"):
            _check(name, getattr(self, name), 0 <= (getattr(self, name) or 0) <= 20, "between 0 and 20")
        _check("stop", self.stop, all(self.stop), "strings that are not empty")


def _check(name: str, value: object, ok: bool, rule: str) -> None:
    if not ok:
        raise ValueError(f"{name}={reprlib.repr(value)} must be {rule}")


class QueueFull(Exception):
    """The engine's queue is full. The request may be sent again after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: float = 1.0) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True)
class Request:
    """One prompt to continue. id: unique among all requests of an engine's life.

    priority: lower values are served first, as in vLLM. timeout_s: seconds from the arrival at the engine, after which
    the request ends with the text that it has.
    """

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    timeout_s: float | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of a token's probability, before temperature and penalties.

    top: (token id, logprob) of the likeliest tokens, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class RequestOutput:
    """The increment that one step adds to a request's answer. All outputs of a request, joined, are its answer.

    text: whole characters only; it may lag behind the tokens. finish: set in a request's last output.
    stop_reason: the stop string or the token of stop_token_ids that ended it. error: a sentence, when finish is
    "error"; at_fault: the request itself is the cause, and would fail again. Only the first output has prompt_logprobs, of all prompt tokens but the first, if they were asked for;
    num_cached, the number of prompt tokens whose keys and values were found in the prefix cache; and queued_s, the seconds
    that the request waited for its first step.
    """

    id: str
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob, ...] = field(default=(), repr=False)
    num_cached: int = 0
    queued_s: float = 0.0
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    at_fault: bool = False
