"""A model's thoughts are told from its answer, however its text is cut."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.api.reading.parts import Content, Part, Reasoning
from deploy.api.reading.reasoning import ReasoningReader, is_open
from tests.support.read_parts import cut, read

WORDS = st.lists(st.sampled_from(["<think>", "</think>", "\n", "<", "th", "ink>", "word", " "]), max_size=10)


def slowly(text: str, *, is_open: bool) -> list[Part]:
    """Read the parts from the whole text at once."""
    opened = re.match(r"\n*<think>", text)
    if not opened and not is_open:
        return [Content(text)] if text else []
    thought, _, answer = text[opened.end() if opened else 0 :].partition("</think>")
    thought, answer = thought.strip("\n"), answer.lstrip("\n")
    return [*([Reasoning(thought)] if thought else []), *([Content(answer)] if answer else [])]


@given(words=WORDS, is_open=st.booleans(), data=st.data())
def test_pieces_join_to_what_the_whole_text_says(
    words: list[str], is_open: bool, data: st.DataObject
) -> None:
    text = "".join(words)
    expected = slowly(text, is_open=is_open)
    assert read(ReasoningReader(is_open=is_open), cut(text, data)) == expected
    assert read(ReasoningReader(is_open=is_open), text) == expected


@pytest.mark.parametrize(
    ("text", "is_open", "expected"),
    [
        ("<think>\nhm\n</think>\n\nyes", False, [Reasoning("hm"), Content("yes")]),
        ("hm\n</think>\n\nyes", True, [Reasoning("hm"), Content("yes")]),
        ("<think>\n\n</think>\n\nyes", False, [Content("yes")]),
        ("<think>hm", False, [Reasoning("hm")]),
        ("<think>hm\n<", False, [Reasoning("hm\n<")]),
        ("say <think>", False, [Content("say <think>")]),
        (
            "<think>a</think>say </think> and <think>",
            False,
            [Reasoning("a"), Content("say </think> and <think>")],
        ),
        ("\n<thin", False, [Content("\n<thin")]),
        ("", True, []),
    ],
    ids=[
        "thinks",
        "prompt thinks",
        "thinks nothing",
        "cut",
        "cut in a line",
        "later",
        "once",
        "a beginning",
        "nothing",
    ],
)
def test_reasoning(text: str, is_open: bool, expected: list[Part]) -> None:
    assert read(ReasoningReader(is_open=is_open), [text]) == expected


def test_a_thought_is_shown_as_it_comes() -> None:
    reader = ReasoningReader(is_open=True)
    assert reader.push("one ") == [Reasoning("one ")]
    assert reader.push("two\n") == [Reasoning("two")]
    assert reader.push("</thi") == []
    assert reader.push("ng") == [Reasoning("\n</thing")]


def test_a_prompt_may_leave_a_thought_open() -> None:
    assert is_open("<|im_start|>assistant\n<think>\n")
    assert not is_open("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not is_open("<|im_start|>user\n<think><|im_end|>\n<|im_start|>assistant\n")
