"""The parts of an answer (content, reasoning, tool calls) and the readers that find them in its text.

Pure.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol
from uuid import uuid4


@dataclass(frozen=True)
class Content:
    """Text for the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """Text that the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """The beginning of the index-th tool call of the answer; its arguments follow."""

    index: int
    name: str
    id: str = field(default_factory=lambda: f"call_{uuid4().hex[:24]}", compare=False)


@dataclass(frozen=True)
class CallArguments:
    """A part of a call's arguments.

    Joined, they are JSON, unless the model broke off or wrote something else.
    """

    index: int
    text: str


Part = Content | Reasoning | CallBegun | CallArguments


class Reader(Protocol):
    """A reader of one answer. However its text is cut into pieces, the parts joined are the same."""

    def push(self, text: str, /) -> list[Part]:
        """Take more text, and return the parts that are now certain."""
        ...

    def flush(self) -> list[Part]:
        """Return the remaining parts, when no more text comes."""
        ...


class PlainReader:
    """A reader that takes all text as content."""

    def push(self, text: str, /) -> list[Part]:
        return [Content(text)] if text else []

    def flush(self) -> list[Part]:
        return []


class ChatReader:
    """A reader of reasoning, then of content with tool calls.

    max_calls: calls beyond are left out, as the client asked.
    """

    def __init__(self, reasoning: Reader, calls: Reader, *, max_calls: int | None) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._max_calls = max_calls

    def push(self, text: str, /) -> list[Part]:
        return self._read(self._reasoning.push(text))

    def flush(self) -> list[Part]:
        return self._read(self._reasoning.flush()) + self._allowed(self._calls.flush())

    def _read(self, parts: Iterable[Part]) -> list[Part]:
        read: list[Part] = []
        for part in parts:
            read += self._calls.push(part.text) if isinstance(part, Content) else [part]
        return self._allowed(read)

    def _allowed(self, parts: list[Part]) -> list[Part]:
        if self._max_calls is None:
            return parts
        return [
            part
            for part in parts
            if not (isinstance(part, CallBegun | CallArguments) and part.index >= self._max_calls)
        ]
