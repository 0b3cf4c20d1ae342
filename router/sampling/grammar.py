"""Grammars of structured answers, in llguidance's serialisation: what SamplingParams.grammar holds.

Every function raises ValueError with llguidance's own message for what it cannot do. They may take a while.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher


def of_json_schema(schema: Mapping[str, Any] | str) -> str:
    """JSON of a schema (an object, or its text), without blanks: a small model might go on with them for ever."""
    given = schema if isinstance(schema, str) else dict(schema)
    return _checked(LLMatcher.grammar_from_json_schema(given, overrides={"whitespace_flexible": False}))


def of_regex(regex: str) -> str:
    """Texts that the expression matches as a whole."""
    return _checked(LLMatcher.grammar_from_regex(regex))


def of_choice(choices: Sequence[str]) -> str:
    """One of these texts."""
    if not choices:
        raise ValueError("there must be a choice")
    return of_lark(f"start: {' | '.join(map(literal, choices))}")


def of_lark(grammar: str) -> str:
    """Texts of llguidance's variant of a Lark grammar."""
    return _checked(LLMatcher.grammar_from_lark(grammar))


def either(lark: str, name: str, grammar: str) -> str:
    """Texts of a rule of these Lark rules, or of another grammar that one of the functions above made."""
    first, *rest = json.loads(grammar)["grammars"] if _is_json(grammar) else [{"lark_grammar": grammar}]
    rules = f"start: {name} | @other\n{lark}"
    return _checked(json.dumps({"grammars": [{"lark_grammar": rules}, {**first, "name": "other"}, *rest]}))


def literal(text: str) -> str:
    """A text as a Lark grammar writes it."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any], *, item_separator: str, key_separator: str) -> str:
    """JSON of a schema as the right side of a rule of a Lark grammar."""
    form = {"whitespace_flexible": False, "item_separator": item_separator, "key_separator": key_separator}
    return f"%json {json.dumps({**schema, 'x-guidance': form}, ensure_ascii=False)}"


def _checked(grammar: str) -> str:
    if message := LLMatcher.validate_grammar(grammar):
        raise ValueError(message.strip())
    return grammar


def _is_json(grammar: str) -> bool:
    return grammar.startswith("{")  # no Lark grammar does
