"""Detokenizer: the text of one request as its tokens are generated, up to the first stop string."""

from collections.abc import Sequence

from router.text.tokenizer import Tokenizer

_UNFINISHED = "\ufffd"  # what decoding makes of the bytes of an incomplete character
_PROMPT_TAIL = 8  # tokens: more than the bytes of a character, and enough that a text has begun


class Detokenizer:
    """The text of one request, token by token. Special tokens add none.

    stopped: the stop string that has appeared; then the text is complete and whatever follows is ignored.

    Not tokenizers' DecodeStream: it cannot be flushed, it raises on byte-fallback tokens that are not UTF-8, and it
    repeats the last character of a prompt that ends within one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], *, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = StopStrings(stop)
        self.stopped: str | None = None
        # A token's text depends on the tokens before it: a decoder joins bytes, and drops the space that begins a
        # text. So pending tokens are decoded behind a context; _shown is what the client has of both together.
        self._context = self._visible(prompt[-_PROMPT_TAIL:])
        self._pending: list[int] = []
        self._shown = tokenizer.decode(self._context)
        while self._shown.startswith(
            _UNFINISHED
        ):  # cut within a character, which can spoil all bytes that follow
            self._context = self._context[1:]
            self._shown = tokenizer.decode(self._context)

    def push(self, token_ids: Sequence[int], *, may_stop: bool = True) -> str:
        """Return the text that is now certain. An incomplete character and what may begin a stop string are kept back.

        may_stop: false while a stop string that begins in this text does not count.
        """
        tokens = self._visible(token_ids)
        if not tokens:
            return ""
        self._pending += tokens
        text = self._tokenizer.decode(self._context + self._pending)
        whole = text.rstrip(_UNFINISHED)
        # Only the prompt's text may end unfinished, and these tokens complete its character.
        known = self._shown if whole.startswith(self._shown) else self._shown.rstrip(_UNFINISHED)
        new = whole[len(known) :]
        if whole == text:
            self._context, self._pending = self._pending, []
            self._shown = self._tokenizer.decode(self._context)
        elif new:
            self._shown = whole
        if may_stop:
            new = self._stop.push(new)
            self.stopped = self._stop.found
        return new

    def flush(self) -> str:
        """Return the rest, when no more tokens come.

        As in vLLM, bytes of an incomplete character are dropped, and so is a U+FFFD that the model itself wrote last.
        """
        return self._stop.flush()

    def _visible(self, token_ids: Sequence[int]) -> list[int]:
        return [token for token in token_ids if token not in self._tokenizer.special_ids]


class StopStrings:
    """A search that ends a text before the first stop string to become complete; of several that end together, the longest.

    However the text is cut into pieces, the result is the same. Time is linear in the text (Knuth, Morris, Pratt).
    found: the stop string that ended the text, None as long as none did.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [(string, _borders(string)) for string in stop]
        self._matched = [0] * len(stop)  # per stop string: how much of it ends the text
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Return the part of the text so far that is new and certain to stand before any stop string."""
        if self.found or not self._stop:
            return "" if self.found else text
        for end, character in enumerate(text, start=1):
            if found := self._advance(character):
                self.found = found
                before, self._held = (self._held + text[:end])[: -len(found)], ""
                return before
        text = self._held + text
        certain = len(text) - max(self._matched)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """Return what was kept back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str:
        """Return the longest stop string that this character completes, "" if it completes none."""
        longest = ""
        for index, (string, borders) in enumerate(self._stop):
            matched = self._matched[index]
            while matched and string[matched] != character:
                matched = borders[matched - 1]
            matched += string[matched] == character
            self._matched[index] = matched
            if matched == len(string):
                longest = max(longest, string, key=len)
        return longest


def _borders(string: str) -> list[int]:
    """Return, for every prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for character in string[1:]:
        length = borders[-1]
        while length and string[length] != character:
            length = borders[length - 1]
        borders.append(length + (string[length] == character))
    return borders
