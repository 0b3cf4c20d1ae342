"""Stop strings: where a text that arrives in pieces ends."""

from collections.abc import Sequence


class StopStrings:
    """Ends a text before the first stop string to become complete; of several that end together, the longest.

    However the text is cut into pieces, the result is the same. Time is linear in the text (Knuth, Morris, Pratt).
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = [(string, _borders(string)) for string in stop]
        self._matched = [0] * len(stop)  # per stop string: how much of it ends the text
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """What of the text so far is new and certain to stand before any stop string."""
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
        """What was kept back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str:
        """The longest stop string that this character completes, if any."""
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
    """Per prefix: the length of its longest proper prefix that is also its suffix."""
    borders = [0]
    for character in string[1:]:
        length = borders[-1]
        while length and string[length] != character:
            length = borders[length - 1]
        borders.append(length + (string[length] == character))
    return borders
