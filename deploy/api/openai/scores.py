"""Small conversions that both endpoints' answers share. Pure."""

from router.request import FinishReason

_LEAST_LOGPROB = -9999.0  # OpenAI's stand-in for minus infinity, which JSON cannot hold


def finite(logprob: float) -> float:
    return max(logprob, _LEAST_LOGPROB)


def finish_reason(finish: FinishReason | None) -> str | None:
    """OpenAI's word. It has none for a time limit: the stop_reason says so."""
    return "length" if finish == "timeout" else finish
