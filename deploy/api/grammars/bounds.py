"""The bounds of what a client may send as a grammar, checked by cheap code that does not recurse.

All functions raise ValueError that names the bound. What they let pass may still be too costly: that shows in
a child process.
"""

import re
from collections.abc import Sequence
from typing import Any

MAX_BYTES = 128 * 1024
"""The most bytes of a grammar, of a schema as JSON, or of all schemas of a body's tools together."""

MAX_DEPTH = 100
"""The most levels of objects and lists in one another; a property's schema is two levels below its object's."""

MAX_REFS = 500
MAX_KEYS = 10_000
"""The most keys of all objects of a schema: properties, definitions and keywords."""

MAX_RULES = 500
MAX_TERMS = 5_000
MAX_AND = 32

# Linear in the text: every quantifier is possessive, and what is not closed extends to the end of its line.
_LARK = re.compile(
    r"""
    (?P<comment> //[^\n]*+ | \#[^\n]*+)
  | (?P<string> "(?:[^"\\\n]|\\.)*+"? )
  | (?P<regex> /(?:[^/\\\n]|\\.)*+/? )
  | (?P<rule> ^[ \t]*+[?!]?\w[\w.]*+ (?:[ \t]*+\[[^\]\n]*+\])?+ (?:[ \t]*+\{[^}\n]*+\})?+ [ \t]*+: )
  | (?P<name> \w++ )
  | (?P<and> & )
    """,
    re.VERBOSE | re.MULTILINE,
)


def bytes_of(text: str) -> int:
    """Return the length of a text in bytes, or of a huge one at least what is too many."""
    return len(text) if len(text) > MAX_BYTES else len(text.encode(errors="replace"))


def check_bytes(num_bytes: int, what: str) -> None:
    """Check a length in bytes. what: the name of what has it in the message, a plural or not."""
    if num_bytes > MAX_BYTES:
        raise ValueError(f"the {what} would take {num_bytes} bytes; at most {MAX_BYTES} are taken")


def check_schema(schema: Any) -> None:
    """Check the nesting, the keys and the `$ref`s of a parsed JSON schema."""
    num_keys = num_refs = 0
    level, depth = [schema], 0
    while level:
        _check(depth, MAX_DEPTH, "the JSON schema", "levels of nesting")
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                num_keys += len(value)
                num_refs += "$ref" in value
                _check(num_keys, MAX_KEYS, "the JSON schema", "keys")
                _check(num_refs, MAX_REFS, "the JSON schema", "$refs")
                below += value.values()
            elif isinstance(value, list):
                below += value
            _check(len(below), MAX_BYTES, "the JSON schema", "values")
        level = [value for value in below if isinstance(value, dict | list)]
        depth += 1


def check_choices(choices: Sequence[str]) -> None:
    """Check the number and the length of texts to choose from."""
    _check(len(choices), MAX_TERMS, "the list", "choices")
    check_bytes(sum(map(bytes_of, choices)), "choices")


def check_lark(grammar: str) -> None:
    """Check the rules, terms and `&` of a Lark grammar of at most MAX_BYTES."""
    counts = dict.fromkeys(("rule", "term", "and"), 0)
    for found in _LARK.finditer(grammar):
        kind = found.lastgroup or ""
        kind = "term" if kind in ("string", "regex", "name") else kind
        if kind in counts:
            counts[kind] += 1
    _check(counts["rule"], MAX_RULES, "the grammar", "rules")
    _check(counts["term"], MAX_TERMS, "the grammar", "terms")
    _check(counts["and"], MAX_AND, "the grammar", "times '&'")


def _check(number: int, most: int, what: str, of: str) -> None:
    if number > most:
        raise ValueError(f"{what} has more than {most} {of}, the most that are taken")
