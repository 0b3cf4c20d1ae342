"""Grammars of structured answers: made from what a request asks for, and followed while its answer is sampled.

The language and the work are llguidance's. The functions return a grammar in llguidance's serialisation, which is what
SamplingParams.grammar holds; they raise ValueError with llguidance's own message for what it cannot do, and may take a
while. A Guide then says, token by token, what the grammar allows next.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from llguidance import LLMatcher, LLTokenizer


def of_json_schema(schema: Mapping[str, Any] | str) -> str:
    """Return the grammar of JSON that a schema (an object, or its text) describes, without blanks.

    A small model might go on with blanks for ever.
    """
    given = schema if isinstance(schema, str) else dict(schema)
    return _checked(LLMatcher.grammar_from_json_schema(given, overrides={"whitespace_flexible": False}))


def of_regex(regex: str) -> str:
    """Return the grammar of the texts that a regular expression matches as a whole."""
    return _checked(LLMatcher.grammar_from_regex(regex))


def of_choice(choices: Sequence[str]) -> str:
    """Return the grammar of exactly these texts."""
    if not choices:
        raise ValueError("there must be a choice")
    return of_lark(f"start: {' | '.join(map(literal, choices))}")


def of_lark(grammar: str) -> str:
    """Return the grammar that a text in llguidance's variant of Lark describes."""
    return _checked(LLMatcher.grammar_from_lark(grammar))


def either(lark: str, name: str, grammar: str) -> str:
    """Return the grammar of texts of the Lark rule `name`, or of another grammar that a function above made."""
    first, *rest = json.loads(grammar)["grammars"] if _is_json(grammar) else [{"lark_grammar": grammar}]
    rules = f"start: {name} | @other\n{lark}"
    return _checked(json.dumps({"grammars": [{"lark_grammar": rules}, {**first, "name": "other"}, *rest]}))


def literal(text: str) -> str:
    """Return a text as a Lark grammar quotes it."""
    return json.dumps(text, ensure_ascii=False)


def json_rule(schema: Mapping[str, Any], *, item_separator: str, key_separator: str) -> str:
    """Return the right side of a Lark rule that is JSON of a schema, with these separators."""
    form = {"whitespace_flexible": False, "item_separator": item_separator, "key_separator": key_separator}
    return f"%json {json.dumps({**schema, 'x-guidance': form}, ensure_ascii=False)}"


def _checked(grammar: str) -> str:
    if message := LLMatcher.validate_grammar(grammar):
        raise ValueError(message.strip())
    return grammar


def _is_json(grammar: str) -> bool:
    return grammar.startswith("{")  # no Lark grammar does


class Guide:
    """A matcher that follows one request's answer token by token. Lives in the engine's thread."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    @property
    def finished(self) -> bool:
        """True once the text is complete and nothing may follow, or there is an error."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """The reason why the grammar cannot go on, such as a limit of its cost; empty if it can."""
        return self._matcher.get_error()

    def allowed(self) -> np.ndarray:
        """Return the mask of tokens that may come next: int32 [ceil(V / 32)], bit i of word w for token 32 w + i.

        End tokens are among them where the text may end.
        """
        return np.frombuffer(self._matcher.compute_bitmask(), np.int32)

    def accept(self, token: int) -> None:
        """Advance by a sampled token. One that the grammar does not allow sets `error`."""
        self._matcher.consume_token(token)


class Grammars:
    """Makes the guides of requests. Any thread may call it; a large schema takes up to a second, without the GIL."""

    def __init__(self, tokenizer_json: str, *, vocab_size: int, eos: frozenset[int]) -> None:
        """Prepare llguidance's view of a vocabulary, which takes a second if it is large.

        tokenizer_json: as Tokenizer.to_json writes it. vocab_size: rows of the model's head, which may be more than the
        tokenizer has tokens. eos: the tokens that may end a text.
        """
        self._tokenizer = LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=sorted(eos) or None)

    def guide(self, grammar: str) -> Guide:
        """Return a new guide for a grammar that a function of this module made.

        Raises ValueError for one that llguidance does not take.
        """
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0)
        if error := matcher.get_error():
            raise ValueError(f"grammar: {error}")
        return Guide(matcher)
