"""Grammars that a hostile client sends: each costs gigabytes, minutes or the process that compiles it unguarded."""

import json
from functools import reduce
from typing import Any


def conjunction(number: int) -> str:
    """A token of which all of so many patterns must hold: its automaton is exponential."""
    return "start: T\nT: " + " & ".join(f"/(.|\\n)*{n:x}(.|\\n)*/" for n in range(number))


def ring(number: int) -> str:
    """Rules in a ring: a stack frame each."""
    rules = (f"r{n}: r{(n + 1) % number}" for n in range(number))
    return "start: r0\n" + "\n".join(rules)


def chain(number: int) -> str:
    """Rules in a chain that ends."""
    rules = (f'r{n}: "a" r{n + 1}' for n in range(number))
    return "start: r0\n" + "\n".join(rules) + f'\nr{number}: "b"'


def refs(number: int) -> dict[str, Any]:
    """Definitions that are each a reference to the next."""
    chained: dict[str, Any] = {f"d{n}": {"$ref": f"#/$defs/d{n + 1}"} for n in range(number)}
    return {"$defs": chained | {f"d{number}": {"type": "integer"}}, "$ref": "#/$defs/d0"}


def nested(depth: int) -> str:
    """The text of a schema of objects in one another."""
    begin, end = '{"type": "object", "properties": {"a": ', "}}"
    return begin * depth + '{"type": "integer"}' + end * depth


def patterns(number: int) -> dict[str, Any]:
    """A conjunction, by a schema."""
    return {"type": "string", "allOf": [{"pattern": f"(.|\\n)*{n:x}(.|\\n)*"} for n in range(number)]}


def in_parentheses(depth: int) -> str:
    """An alternative in so many parentheses."""
    return "start: " + "(" * depth + '"a"' + ")" * depth


AMBIGUOUS = 'start: s\ns: s s | s s s | "a"'
"""Every text of n letters has a number of readings that is exponential in n."""

POWER = "start: /(a{1000}){1000}/"

WITHIN_BOUNDS: dict[str, dict[str, Any]] = {
    "32 terms": {"guided_grammar": conjunction(32)},
    "a pattern of patterns": {"guided_json": patterns(100)},
    "parentheses": {"guided_grammar": in_parentheses(2_000)},
    "groups": {"guided_regex": "(" * 5_000 + "a" + ")" * 5_000},
}
"""Attacks that no count shows to be any; fields of a body."""

BEYOND_BOUNDS: dict[str, tuple[dict[str, Any], str]] = {
    "200 terms": ({"guided_grammar": conjunction(200)}, "more than 32 times '&'"),
    "1000 terms": ({"guided_grammar": conjunction(1_000)}, "more than 32 times '&'"),
    "ring": ({"guided_grammar": ring(5_000)}, "more than 500 rules"),
    "chain": ({"guided_grammar": chain(5_000)}, "more than 500 rules"),
    "refs": ({"guided_json": refs(5_000)}, "more than 500 $refs"),
    "refs as text": ({"guided_json": json.dumps(refs(1_000))}, "more than 500 $refs"),
    "nested": ({"guided_json": nested(1_000)}, "recursion limit"),
    "nested lists": (
        {"guided_json": reduce(lambda a, _: {"items": a}, range(110), {})},
        "more than 100 levels",
    ),
    "keys": ({"guided_json": {"properties": {f"p{n}": {} for n in range(11_000)}}}, "more than 10000 keys"),
    "terms": ({"guided_grammar": "start: " + " ".join('"a"' for _ in range(6_000))}, "more than 5000 terms"),
    "long grammar": ({"guided_grammar": "start: " + "a" * 200_000}, "at most 131072 are taken"),
    "long regex": ({"guided_regex": "a" * 200_000}, "at most 131072 are taken"),
    "long schema": ({"guided_json": {"const": "a" * 200_000}}, "at most 131072 are taken"),
    "long text": ({"guided_json": " " * 200_000}, "at most 131072 are taken"),
    "choices": ({"guided_choice": [str(n) for n in range(6_000)]}, "more than 5000 choices"),
    "long choice": ({"guided_choice": ["a" * 200_000]}, "at most 131072 are taken"),
}
"""Attacks that a count shows, and what the refusal says."""
