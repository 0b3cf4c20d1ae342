"""The messages between ingress and router, cut to what one message of Serve may hold. Pure.

Serve's gRPC refuses a message of more than 4 MiB, and with it ends the stream that carries the outputs of
everybody's requests. Sizes are upper estimates of what pickle makes; tests hold them against it.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from router.request import Request, RequestOutput, TokenLogprob

MAX_BATCH_BYTES = 2**20
"""The most that a batch of outputs may have."""

MAX_REQUEST_BYTES = 3 * 2**20
"""The most that a request may have."""

_OBJECT_BYTES = 512  # of a request or an output without what it holds
_SCORE_BYTES = 64
_PAIR_BYTES = 24
_TOKEN_BYTES = 6
_CHAR_BYTES = 4


@dataclass(frozen=True)
class Part:
    """The beginning of an output that is too large for one message: only its scores count.

    What comes next for the same request goes on with it; an output that is no Part ends it.
    """

    output: RequestOutput


def output_bytes(output: RequestOutput) -> int:
    """Return about how many bytes an output has, never less than it does."""
    size = _OBJECT_BYTES + _CHAR_BYTES * len(output.text) + _TOKEN_BYTES * len(output.tokens)
    if output.error:
        size += _CHAR_BYTES * len(output.error)
    if isinstance(output.stop_reason, str):
        size += _CHAR_BYTES * len(output.stop_reason)
    if output.logprobs or output.prompt_logprobs:
        size += sum(map(_score_bytes, (*output.logprobs, *output.prompt_logprobs)))
    return size


def request_bytes(request: Request) -> int:
    """Return about how many bytes a request has, never less than it does."""
    params = request.params
    chars = sum(map(len, params.stop)) + len(params.grammar or "") + len(request.id)
    numbers = len(request.prompt) + len(params.stop_token_ids)
    return (
        2 * _OBJECT_BYTES
        + _CHAR_BYTES * chars
        + _TOKEN_BYTES * numbers
        + _PAIR_BYTES * (len(params.stop) + len(params.logit_bias))
    )


def cut(output: RequestOutput) -> Iterable[tuple[RequestOutput | Part, int]]:
    """Return an output, or the parts that it is in, each with its bytes: at most MAX_BATCH_BYTES."""
    size = output_bytes(output)
    return ((output, size),) if size <= MAX_BATCH_BYTES else _parts(output)


class Joiner:
    """Joins the parts of outputs again. It holds what has come of those that are not whole yet."""

    def __init__(self) -> None:
        self._parts: dict[str, list[RequestOutput]] = {}

    def take(self, item: RequestOutput | Part) -> RequestOutput | None:
        """Return the output that an item completes, None if it completes none."""
        if isinstance(item, Part):
            self._parts.setdefault(item.output.id, []).append(item.output)
            return None
        if not self._parts or (parts := self._parts.pop(item.id, None)) is None:
            return item
        return replace(
            item,
            prompt_logprobs=tuple(score for part in parts for score in part.prompt_logprobs),
            logprobs=tuple(score for part in parts for score in part.logprobs),
        )

    def forget(self, request_id: str) -> None:
        """Drop what has come of a request that nobody reads any more."""
        self._parts.pop(request_id, None)


def _parts(output: RequestOutput) -> Iterator[tuple[RequestOutput | Part, int]]:
    for name in ("prompt_logprobs", "logprobs"):
        for scores, scores_bytes in _chunks(getattr(output, name)):
            part = replace(RequestOutput(output.id), **{name: scores})
            yield Part(part), _OBJECT_BYTES + scores_bytes
    rest = replace(output, prompt_logprobs=(), logprobs=())
    yield rest, output_bytes(rest)


def _score_bytes(score: TokenLogprob) -> int:
    return _SCORE_BYTES + _PAIR_BYTES * len(score.top)


def _chunks(scores: Sequence[TokenLogprob]) -> Iterator[tuple[tuple[TokenLogprob, ...], int]]:
    """Yield scores in chunks that each fit a batch, with their bytes."""
    begin, size = 0, 0
    for place, score in enumerate(scores):
        more = _score_bytes(score)
        if size + more > MAX_BATCH_BYTES - _OBJECT_BYTES:
            yield tuple(scores[begin:place]), size
            begin, size = place, 0
        size += more
    if begin < len(scores):
        yield tuple(scores[begin:]), size
