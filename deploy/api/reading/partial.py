"""Expressions for text that is still coming: whether it matches, or may yet. Pure."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A part of an Expression. begun: what matches every beginning of what `whole` matches, the empty one too."""

    whole: str
    begun: str


def text(literal: str) -> Step:
    """Exactly this."""
    begun = ""
    for character in reversed(literal):
        begun = f"(?:{re.escape(character)}{begun})?"
    return Step(re.escape(literal), begun)


def ahead(*literals: str) -> Step:
    """One of these follows, and is not part of the match."""
    begun = "|".join(text(literal).begun for literal in literals)
    return Step(f"(?={'|'.join(map(re.escape, literals))})", f"(?:{begun})")


class Expression:
    """Steps in a row. A text that has begun to match matches in the same way however it goes on."""

    def __init__(self, *steps: Step) -> None:
        self._whole = re.compile("".join(step.whole for step in steps), re.DOTALL)
        begun = ""
        for step in reversed(steps):
            # The quick one first: a long text that goes on for many pieces is looked at once for each.
            begun = f"(?:{step.begun}|{step.whole}{begun})" if begun else step.begun
        self._begun = re.compile(begun, re.DOTALL)

    def match(self, text: str) -> re.Match[str] | None:
        """At the beginning of the text."""
        return self._whole.match(text)

    def may_come(self, text: str) -> bool:
        """Whether the whole text is a beginning of a match."""
        return self._begun.fullmatch(text) is not None


def num_held(text: str, tag: str) -> int:
    """Of how many last characters it is open whether the tag begins there."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
