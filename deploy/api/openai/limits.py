"""The bounds on what one body may ask for, all in one place; a body beyond one is refused (400) by name.

They are so far above what clients send that none is a setting. Further bounds: api.max_body_mib on a body,
the model's context on texts (`Ingress`), pydantic's on the nesting of JSON (about 200 levels).
"""

from collections.abc import Sequence

MAX_MESSAGES = 4096
MAX_PARTS = 1024
"""Parts of one message's content, and calls that one message made."""

MAX_TOOLS = 128
MAX_TOOLS_BYTES = 256 * 1024
"""All tools together, as JSON: a template writes them all before the first message."""

MAX_PROMPTS = 1024
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
"""Every character of an answer is held against every stop string, and both cross to the router."""

MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_TEMPLATE_KWARGS = 64
MAX_SCORES = 2**18
"""Logprobs of one reply that are held at a time, alternatives counted: they become tens of MiB of JSON at once."""

MAX_ITEMS = 2**18
"""Commas in a body; twice the model's context, if that is more. It bounds the objects that a body becomes: 8 MiB of
small ones would hold the interpreter for seconds, while texts and lists of tokens that fit the context pass."""

MAX_FIELDS = 256
"""Fields of one of our own objects, known and unknown."""

MAX_NAMED_FIELDS = 20
"""Unknown fields of a body that the log names."""


def num_scores(num_tokens: int, alternatives: int | None) -> int:
    """Return how many logprobs tell of so many tokens, with the alternatives of each; None: no logprobs."""
    return 0 if alternatives is None else num_tokens * (1 + alternatives)


def too_many_items(body: bytes, *, max_model_len: int) -> str:
    """Return a sentence if a body holds more than may be read, "" if not. It takes a millisecond at most."""
    found, most = body.count(b","), max(MAX_ITEMS, 2 * max_model_len)
    return f"The body has {found} commas; at most {most} are read." if found > most else ""


def named_fields(names: Sequence[str]) -> str:
    """Return the first of a body's unknown fields for the log: one line, whatever a client calls a field."""
    shown = ", ".join(ascii(name[:60])[1:-1] for name in names[:MAX_NAMED_FIELDS])
    more = len(names) - MAX_NAMED_FIELDS
    return f"{shown} and {more} more" if more > 0 else shown
