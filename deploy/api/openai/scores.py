"""Small conversions of logprobs and finish reasons, which both endpoints' answers share. Pure."""

from router.request import FinishReason

_LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


def finite(logprob: float) -> float:
    """Return a logprob that JSON can hold."""
    return max(logprob, _LEAST_LOGPROB)


def finish_reason(finish: FinishReason | None) -> str | None:
    """Return OpenAI's word for a reason to finish.

    It has none for a time limit: there the stop_reason says so.
    """
    return "length" if finish == "timeout" else finish
