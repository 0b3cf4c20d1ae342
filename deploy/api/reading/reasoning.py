"""ReasoningReader: takes the text between <think> and </think> as reasoning, not content. Pure."""

from deploy.api.reading.partial import num_held
from deploy.api.reading.parts import Content, Part, Reasoning

OPEN, CLOSE = "<think>", "</think>"


def thinks(template: str) -> bool:
    """Return whether a chat template is that of a model that thinks."""
    return OPEN in template


def is_open(prompt: str) -> bool:
    """Return whether a rendered prompt ends inside the model's thoughts, so that the answer begins with them."""
    return prompt.rstrip().endswith(OPEN)


class ReasoningReader:
    """A reader of thoughts at the beginning of an answer.

    A marker that comes later is content like any other. Newlines around the markers are dropped. If the
    thoughts do not end, the whole answer is reasoning. is_open: whether the prompt ends inside the thoughts,
    see `is_open`.
    """

    def __init__(self, *, is_open: bool) -> None:
        self._is_open = is_open
        self._read = self._before
        self._held = ""

    def push(self, text: str, /) -> list[Part]:
        self._held += text
        return self._read()

    def flush(self) -> list[Part]:
        held, self._held = self._held, ""
        unopened = self._read == self._before and self._is_open
        if unopened or self._read == self._within:
            thought = (held.lstrip("\n") if unopened else held).rstrip("\n")
            return [Reasoning(thought)] if thought else []
        return [Content(held)] if held else []

    def _before(self) -> list[Part]:
        """Read the beginning, until it is clear whether there are thoughts."""
        begun = self._held.lstrip("\n")
        if not begun.startswith(OPEN) and OPEN.startswith(begun):
            return []
        if begun.startswith(OPEN) or self._is_open:
            self._held = begun.removeprefix(OPEN)
            self._read = self._to_thoughts
        else:
            self._read = self._after
        return self._read()

    def _to_thoughts(self) -> list[Part]:
        self._held = self._held.lstrip("\n")
        if not self._held:
            return []
        self._read = self._within
        return self._within()

    def _within(self) -> list[Part]:
        thought, closed, rest = self._held.partition(CLOSE)
        if closed:
            self._held = rest
            self._read = self._to_answer
            thought = thought.rstrip("\n")
            return [*([Reasoning(thought)] if thought else []), *self._to_answer()]
        certain = self._held[: len(self._held) - num_held(self._held, CLOSE)].rstrip("\n")
        self._held = self._held[len(certain) :]
        return [Reasoning(certain)] if certain else []

    def _to_answer(self) -> list[Part]:
        self._held = self._held.lstrip("\n")
        if not self._held:
            return []
        self._read = self._after
        return self._after()

    def _after(self) -> list[Part]:
        content, self._held = self._held, ""
        return [Content(content)] if content else []
