"""Helpers that feed an answer's text to readers in pieces."""

from collections.abc import Iterable, Sequence

from hypothesis import strategies as st

from deploy.api.reading.parts import CallArguments, Content, Part, Reader, Reasoning


def read(reader: Reader, pieces: Iterable[str]) -> list[Part]:
    """Return all parts of an answer that comes in pieces."""
    parts = [part for piece in pieces for part in reader.push(piece)]
    return joined(parts + reader.flush())


def cut(text: str, data: st.DataObject) -> list[str]:
    """Cut a text somewhere."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def joined(parts: Sequence[Part]) -> list[Part]:
    """Join neighbouring parts of the same kind."""
    whole: list[Part] = []
    for part in parts:
        last = whole[-1] if whole else None
        if isinstance(part, Content) and isinstance(last, Content):
            whole[-1] = Content(last.text + part.text)
        elif isinstance(part, Reasoning) and isinstance(last, Reasoning):
            whole[-1] = Reasoning(last.text + part.text)
        elif isinstance(part, CallArguments) and isinstance(last, CallArguments) and part.index == last.index:
            whole[-1] = CallArguments(part.index, last.text + part.text)
        else:
            whole.append(part)
    return whole
