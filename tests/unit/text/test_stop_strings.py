"""StopStrings against a search of the whole text."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.text.detokenizer import StopStrings

small_texts = st.text(alphabet="ab", max_size=20)
stop_strings = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=4)


def reference(text: str, stop: list[str]) -> tuple[str, str | None]:
    """Return the text before the match that ends first, the longest of those; and the string that matches, if any
    does."""
    matches = [
        (text.find(string) + len(string), text.find(string), string) for string in stop if string in text
    ]
    _, begin, string = min(matches, default=(0, len(text), None))
    return text[:begin], string


@given(text=small_texts, stop=stop_strings, cuts=st.lists(st.integers(0, 20), max_size=8))
def test_equals_a_search_of_the_whole_text(text: str, stop: list[str], cuts: list[int]) -> None:
    search = StopStrings(stop)
    pieces = [
        search.push(text[start:end]) for start, end in pairwise([0, *sorted(cuts), len(text)]) if start <= end
    ]
    assert ("".join(pieces) + search.flush(), search.found) == reference(text, stop)


@given(text=small_texts, stop=stop_strings)
def test_keeps_back_only_what_may_begin_a_stop_string(text: str, stop: list[str]) -> None:
    search = StopStrings(stop)
    given = ""
    for end, character in enumerate(text, start=1):
        given += search.push(character)
        if search.found:
            return
        begun = [size for string in stop for size in range(len(string)) if text[:end].endswith(string[:size])]
        assert given == text[: end - max(begun, default=0)]


@pytest.mark.parametrize(
    ("stop", "expected"), [(["b", "abc"], "xa"), (["bc", "abc"], "x")], ids=["completed first", "longest"]
)
def test_which_of_several_matches_counts(stop: list[str], expected: str) -> None:
    search = StopStrings(stop)
    assert search.push("xabcd") == expected
    assert search.push("more") == search.flush() == ""
