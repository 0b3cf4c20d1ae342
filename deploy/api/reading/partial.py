"""Regular expressions for text that is still coming: they tell whether it matches, or may yet. Pure."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """A part of an Expression.

    `begun` matches every beginning of what `whole` matches, including the empty one.
    """

    whole: str
    begun: str


def text(literal: str) -> Step:
    """Return the step that matches exactly this text."""
    begun = ""
    for character in reversed(literal):
        begun = f"(?:{re.escape(character)}{begun})?"
    return Step(re.escape(literal), begun)


def ahead(*literals: str) -> Step:
    """Return the step that needs one of these texts to follow, as a lookahead: it is not part of the match."""
    begun = "|".join(text(literal).begun for literal in literals)
    return Step(f"(?={'|'.join(map(re.escape, literals))})", f"(?:{begun})")


class Expression:
    """A sequence of steps. A text that has matched must match in the same way however it goes on."""

    def __init__(self, *steps: Step) -> None:
        self._whole = re.compile("".join(step.whole for step in steps), re.DOTALL)
        begun = ""
        for step in reversed(steps):
            # The quick alternative comes first: a long text is looked at once for each piece that comes.
            begun = f"(?:{step.begun}|{step.whole}{begun})" if begun else step.begun
        self._begun = re.compile(begun, re.DOTALL)

    def match(self, text: str) -> re.Match[str] | None:
        """Return the match at the beginning of the text, None if there is none."""
        return self._whole.match(text)

    def may_come(self, text: str) -> bool:
        """Return whether the whole text is a beginning of a match."""
        return self._begun.fullmatch(text) is not None


def num_held(text: str, tag: str) -> int:
    """Return how many of the last characters may be the beginning of the tag, and must be held back."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)
