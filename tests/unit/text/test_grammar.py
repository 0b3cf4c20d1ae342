"""Grammars say which texts are allowed: tried with llguidance's matcher over a tokenizer of bytes."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from router.sampling import grammar
from tests.support.json_schemas import random_schema

BYTES = grammar.Grammars("byte", vocab_size=LLTokenizer("byte").vocab_size, eos=frozenset())

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}


def allows(of: str, text: str) -> bool:
    """Return whether the text is one of the grammar's, to its end."""
    matcher = LLMatcher(LLTokenizer("byte"), of, log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(
    ("of", "allowed", "refused"),
    [
        (grammar.of_json_schema(POINT), '{"x":1}', '{"y":1}'),
        (grammar.of_json_schema('{"type": "integer"}'), "12", '"12"'),
        (grammar.of_json_schema({"type": "object"}), '{"x":[1,{}]}', '{"x": 1}'),
        (grammar.of_regex("[0-9]{3}"), "123", "1234"),
        (grammar.of_choice(['a"\n\\é', "b"]), 'a"\n\\é', "c"),
        (grammar.of_choice(["", "b"]), "", "bb"),
        (grammar.of_lark('start: "a" b\nb: "b"+'), "abb", "a"),
    ],
    ids=["schema", "schema's text", "no blanks", "regex", "choice", "empty choice", "lark"],
)
def test_what_a_grammar_allows(of: str, allowed: str, refused: str) -> None:
    assert allows(of, allowed)
    assert not allows(of, refused)


@pytest.mark.parametrize(
    "other",
    [grammar.of_json_schema(POINT), grammar.of_lark('start: "{\\"x\\":1}"')],
    ids=["json", "lark"],
)
def test_either_of_two(other: str) -> None:
    both = grammar.either('words: "yes" | "no"', "words", other)
    assert allows(both, "yes")
    assert allows(both, '{"x":1}')
    assert not allows(both, "maybe")


@pytest.mark.parametrize(
    ("make", "value", "message"),
    [
        (grammar.of_json_schema, {"type": "frob"}, "Invalid type: frob"),
        (grammar.of_json_schema, {"not": {}}, "Unimplemented keys"),
        (grammar.of_json_schema, "[", "EOF"),
        (grammar.of_json_schema, "[" * 10**5, "recursion limit"),
        (grammar.of_regex, "a(", "unclosed group"),
        (grammar.of_regex, "(?=a)", "look-around"),
        (grammar.of_choice, [], "a choice"),
        (grammar.of_lark, "start: nothing", 'unknown name: "nothing"'),
        (grammar.of_lark, '{"grammars": []}', "empty grammars"),
    ],
    ids=lambda value: str(value)[:20] if not callable(value) else "",
)
def test_what_cannot_be_is_refused_in_llguidances_words(
    make: Callable[[object], str], value: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        BYTES.guide(make(value))


def test_a_panic_is_not_told() -> None:
    assert grammar.sentence("thread panicked at src/earley.rs:17: index out of bounds") == "it is too complex"
    assert len(grammar.sentence("x" * 10**6)) < 300


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_limits_change_nothing_for_ordinary_schemas(seed: int) -> None:
    """The masks of a whole answer are those of llguidance's own limits, computed alone."""
    rng = random.Random(seed)
    text = grammar.of_json_schema(random_schema(rng))
    guide, plain = BYTES.guide(text), LLMatcher(LLTokenizer("byte"), text, log_level=0)
    for _ in range(400):
        BYTES.start_masks([guide])
        mask = guide.allowed()
        assert mask.tobytes() == plain.compute_bitmask()
        token = rng.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())
        BYTES.accept([(guide, token)])
        plain.consume_token(token)
        assert (guide.error, guide.finished) == ("", plain.is_stopped())
        if guide.finished:
            break
