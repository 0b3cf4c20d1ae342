"""ControlTokens: keeps what clients write from becoming control tokens when a chat template is filled in.

A template writes control tokens (`<|im_end|>`) as text, between the texts of clients, and the tokenizer finds
them by their text. So every control token that a client writes is replaced by a mark before the template sees
it, and the mark becomes plain text again when it is encoded. Of all other text the template sees what was
written: it may trim it, look into it or cut it, and a mark that it cuts is no control token either.
"""

import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_PRIVATE = [
    chr(code) for code in range(0xE000, 0xF8FF)
]  # Unicode's own: no letter case, no blanks, no JSON escapes
_DIGITS = _PRIVATE[:256]


class ControlTokens:
    """The control tokens of one tokenizer. Stateless after its construction: any thread may use it."""

    def __init__(self, special: Mapping[int, str], *, encode_plain: Callable[[str], Sequence[int]]) -> None:
        """special: the text of each. encode_plain: encodes a text as if there were no control tokens.

        Where it cannot (the vocabulary has the whole text as a word), the characters are encoded one by one.
        """
        texts = {text: id_ for id_, text in special.items() if text}
        nonce = "".join(secrets.choice(_PRIVATE) for _ in range(4))  # so that no client can write a mark
        marks = [f"{nonce}{_DIGITS[n // 256]}{_DIGITS[n % 256]}" for n in range(len(texts))]
        self._mark_of = dict(zip(texts, marks, strict=True))
        self._text_of = {mark: text for text, mark in self._mark_of.items()}
        self._plain = {
            self._mark_of[text]: _without(encode_plain(text), special, text, encode_plain) for text in texts
        }
        self._tokens = _any_of(texts)
        self._marks = re.compile(f"({re.escape(nonce)}[{_DIGITS[0]}-{_DIGITS[-1]}]{{2}})")
        ends = {text[:2] for text in texts} | {text[-2:] for text in texts}
        self._fragments = _any_of(ends | {text[1:-1] for text in texts if len(text) > 3})
        self._edges = {text[edge] for text in texts for edge in (0, -1)}

    def hide(self, value: Any) -> Any:
        """Return a value of JSON with marks in place of the control tokens in all its texts."""
        return _in_texts(value, lambda text: self._tokens.sub(lambda found: self._mark_of[found[0]], text))

    def reveal(self, text: str) -> str:
        """Return a text with the control tokens' texts in place of their marks."""
        return self._marks.sub(lambda found: self._text_of.get(found[0], found[0]), text)

    def pieces(self, rendered: str) -> list[str | Sequence[int]]:
        """Return a rendered chat in pieces: texts to encode with control tokens, and plain tokens of marks."""
        return [self._plain.get(piece, piece) for piece in self._marks.split(rendered) if piece]

    def may_be_spelled(self, value: Any) -> bool:
        """Return whether texts without control tokens have parts that a template could put together to one."""
        found = False

        def look(text: str) -> str:
            nonlocal found
            found = found or self._fragments.search(text) is not None
            return text

        _in_texts(value, look)
        return found

    def without_edges(self, value: Any) -> Any:
        """Return a value of JSON whose texts have no first or last character of any control token."""

        def cut(text: str) -> str:
            for edge in self._edges:
                text = text.replace(edge, _PRIVATE[-1])
            return text

        return _in_texts(value, cut)

    def found_in(self, rendered: str) -> list[str]:
        """Return the control tokens of a rendered chat, in their order."""
        return self._tokens.findall(rendered)


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_in_texts(key, change): _in_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_in_texts(inner, change) for inner in value]
    return value


def _any_of(texts: Mapping[str, int] | set[str]) -> re.Pattern[str]:
    """Return what matches one of the texts, of several the longest; nothing, if there are none."""
    longest_first = sorted(texts, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


def _without(
    ids: Sequence[int],
    special: Mapping[int, str],
    text: str,
    encode_plain: Callable[[str], Sequence[int]],
) -> list[int]:
    if special.keys().isdisjoint(ids):
        return list(ids)
    return [id_ for character in text for id_ in encode_plain(character) if id_ not in special]
