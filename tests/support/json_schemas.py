"""Random JSON schemas whose every value is short, so that an answer that keeps to one ends."""

import random
from collections.abc import Callable
from typing import Any

Schema = dict[str, Any]

WORDS = ("name", "age", "tags", "parent", "is_open", "größe", "a b", "x-1", "colour", "total")


def random_schema(rng: random.Random, *, depth: int = 3) -> Schema:
    """Return a schema with an object or a list at the top, as people ask for, and anything below, nested at
    most so deep."""
    return rng.choice((_object, _array))(rng, depth)


def _any(rng: random.Random, depth: int) -> Schema:
    nested: tuple[Callable[[random.Random, int], Schema], ...] = (_object, _array, _any_of) if depth else ()
    return rng.choice((_string, _integer, _number, _boolean, _enum, _const, _nullable, *nested))(
        rng, depth - 1
    )


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 4))
    return {
        "type": "object",
        "properties": {name: _any(rng, depth) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(0, 2)
    return {
        "type": "array",
        "items": _any(rng, depth),
        "minItems": least,
        "maxItems": least + rng.randint(0, 2),
    }


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(2)]}


def _string(rng: random.Random, depth: int) -> Schema:
    form: Schema = rng.choice(
        (
            {"maxLength": rng.randint(1, 12)},
            {"minLength": 2, "maxLength": 6},
            {"pattern": "^[a-z]{1,6}$"},
            {"pattern": "^(red|green)-[0-9]{2}$"},
            {"format": "date"},
        )
    )
    return {"type": "string", **form}


def _integer(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(-1000, 1000)
    return {"type": "integer", "minimum": least, "maximum": least + rng.randint(0, 5000)}


def _number(rng: random.Random, depth: int) -> Schema:
    least = rng.randint(-10, 10)
    return {"type": "number", "minimum": least, "maximum": least + 2.5}


def _boolean(rng: random.Random, depth: int) -> Schema:
    return {"type": "boolean"}


def _enum(rng: random.Random, depth: int) -> Schema:
    return {"enum": rng.sample(["a", "b c", 1, -2.5, True, None, "é"], rng.randint(1, 4))}


def _const(rng: random.Random, depth: int) -> Schema:
    return {"const": rng.choice(["fixed", 7, False])}


def _nullable(rng: random.Random, depth: int) -> Schema:
    return {"type": ["string", "null"], "maxLength": 5}
