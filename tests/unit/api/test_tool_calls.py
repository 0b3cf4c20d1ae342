"""Tool calls are told from text, however it is cut."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deploy.api.reading.parts import CallArguments, CallBegun, Content, Part
from deploy.api.reading.tool_calls import CallReader, GlmCall, HermesCall
from tests.support.read_parts import cut, joined, read

SCHEMAS: dict[str, Any] = {
    "f": {
        "properties": {
            "text": {"type": "string"},
            "number": {"type": "number"},
            "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        }
    }
}


def hermes() -> CallReader:
    return CallReader(HermesCall)


def glm() -> CallReader:
    return CallReader(lambda: GlmCall(SCHEMAS))


def hermes_call(name: str, arguments: str) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def glm_call(name: str, **values: str) -> str:
    pairs = "".join(f"<arg_key>{k}</arg_key>\n<arg_value>{v}</arg_value>\n" for k, v in values.items())
    return f"<tool_call>{name}\n{pairs}</tool_call>"


def calls(*called: tuple[str, str]) -> list[Part]:
    return [
        part for i, (name, text) in enumerate(called) for part in (CallBegun(i, name), CallArguments(i, text))
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (hermes_call("f", '{"a": "}\\"<"}'), calls(("f", '{"a": "}\\"<"}'))),
        (
            "\n" + hermes_call("f", "{}") + "\n" + hermes_call("unknown", '{"a": {}}') + "\n",
            calls(("f", "{}"), ("unknown", '{"a": {}}')),
        ),
        (f"Let me look. \n{hermes_call('f', '{}')}", [Content("Let me look."), *calls(("f", "{}"))]),
        ("say <tool_call> or <tool", [Content("say <tool_call> or <tool")]),
        ("no call\n", [Content("no call\n")]),
        ("<tool_call>\n{'name': 1}\n</tool_call>", [Content("<tool_call>\n{'name': 1}\n</tool_call>")]),
        ('<tool_call>{"name": "f"}</tool_call>', [Content('<tool_call>{"name": "f"}</tool_call>')]),
        (
            f"<tool_call>oh\n{hermes_call('f', '{}')}",
            [Content("<tool_call>oh"), *calls(("f", "{}"))],
        ),
        ('<tool_call>\n{"name": "f", "arg', [Content('<tool_call>\n{"name": "f", "arg')]),
        ('<tool_call>\n{"name": "f", "arguments": {"a": "b', calls(("f", '{"a": "b'))),
        (
            '<tool_call>\n{"name": "f", "arguments": {"a": 1</tool_call> so',
            [*calls(("f", '{"a": 1')), Content("so")],
        ),
        ('<tool_call>\n{"name": "f", "arguments": {}\n</tool_call>', calls(("f", "{}"))),
        ('<tool_call>\n{"name": "f", "arguments": {}}\n</tool', calls(("f", "{}"))),
        (
            '<tool_call>\n{"name": "f", "arguments": {}, "more": 1}\n</tool_call>',
            [*calls(("f", "{}")), Content(', "more": 1}\n</tool_call>')],
        ),
    ],
    ids=[
        *("one", "two", "text before", "a mention", "text", "not JSON", "no arguments", "after a mention"),
        *("head cut", "arguments cut", "brace missing", "last brace missing", "end cut", "more than a call"),
    ],
)
def test_hermes(text: str, expected: list[Part]) -> None:
    assert read(hermes(), [text]) == expected
    assert read(hermes(), text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (glm_call("f", text="1", number="1"), calls(("f", '{"text": "1", "number": 1}'))),
        (
            "<tool_call>f<arg_key>text</arg_key><arg_value>a\n<b></arg_value></tool_call>",
            calls(("f", '{"text": "a\\n<b>"}')),
        ),
        (glm_call("f", number="many", maybe="null"), calls(("f", '{"number": "many", "maybe": null}'))),
        (glm_call("f", maybe="7", other="[7]"), calls(("f", '{"maybe": "7", "other": [7]}'))),
        (glm_call("f", other="NaN"), calls(("f", '{"other": "NaN"}'))),
        (
            f"So\n{glm_call('g')}\n{glm_call('unknown', é='{}')} end",
            [Content("So"), *calls(("g", "{}"), ("unknown", '{"é": {}}')), Content("end")],
        ),
        ("<tool_call>two words</tool_call>", [Content("<tool_call>two words</tool_call>")]),
        ("<tool_call>f", [Content("<tool_call>f")]),
        (
            "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>a</arg_value>\n<arg_key>nu",
            [*calls(("f", '{"text": "a"')), Content("\n<arg_key>nu")],
        ),
        (
            "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>a</arg_value> hm</tool_call>",
            [*calls(("f", '{"text": "a"')), Content(" hm</tool_call>")],
        ),
    ],
    ids=["types", "no newlines", "null", "either", "NaN", "two", "no name", "name cut", "cut", "broken"],
)
def test_glm(text: str, expected: list[Part]) -> None:
    assert read(glm(), [text]) == expected
    assert read(glm(), text) == expected


def slowly(text: str, call: str, arguments: Callable[[str], str]) -> list[Part]:
    """Return what whole, well-formed calls and the text around them say.

    call: an expression with name and arguments.
    """
    parts: list[Part] = []
    place = 0
    num_calls = 0
    for match in re.finditer(call, text, re.DOTALL):
        between = text[place : match.start()].rstrip()
        parts.append(Content(between if not num_calls else between.lstrip()))
        parts += [CallBegun(num_calls, match[1]), CallArguments(num_calls, arguments(match[2]))]
        place = match.end()
        num_calls += 1
    rest = text[place:]
    parts.append(Content(rest.lstrip() if num_calls else rest))
    return [part for part in joined(parts) if not isinstance(part, Content) or part.text]


HERMES = r'<tool_call>\s*\{"name": "(\w+)", "arguments": (\{[^{}]*\})\}\s*</tool_call>'
GLM = r"<tool_call>\s*([^\s<]+)\s*((?:<arg_key>\w+</arg_key>\n<arg_value>[^<]*</arg_value>\n)*)</tool_call>"
TEXT = st.sampled_from(
    ["word", " ", "\n", "<", "<tool", "tool_call>", "</tool_call>", "<tool_call>", "{", "é"]
)
JSON = st.dictionaries(st.text("ab<", max_size=3), st.integers() | st.text('<>"\\x', max_size=4), max_size=3)


def glm_arguments(pairs: str) -> str:
    values = re.findall(r"<arg_key>(\w+)</arg_key>\n<arg_value>([^<]*)</arg_value>", pairs)
    return json.dumps({key: int(value) if key == "number" else value for key, value in values})


@settings(deadline=None)
@given(
    words=st.lists(TEXT | JSON.map(lambda a: hermes_call("f", json.dumps(a))), max_size=8),
    data=st.data(),
)
def test_hermes_in_pieces_is_what_the_whole_text_says(words: list[str], data: st.DataObject) -> None:
    check_pieces(hermes, "".join(words), slowly("".join(words), HERMES, str), data)


@settings(deadline=None)
@given(
    words=st.lists(
        TEXT | st.integers().map(lambda n: glm_call("f", number=str(n), text="a\nb") + "\n"), max_size=8
    ),
    data=st.data(),
)
def test_glm_in_pieces_is_what_the_whole_text_says(words: list[str], data: st.DataObject) -> None:
    check_pieces(glm, "".join(words), slowly("".join(words), GLM, glm_arguments), data)


def check_pieces(
    new_reader: Callable[[], CallReader], text: str, expected: list[Part], data: st.DataObject
) -> None:
    for way in ([text], cut(text, data), text):
        assert read(new_reader(), way) == expected


@settings(deadline=None)
@given(
    words=st.lists(
        TEXT
        | st.sampled_from(
            [
                *('"name": ', '"f"', ', "arguments": ', "}", '"', "\\", "f\n"),
                *("<arg_key>", "text", "</arg_key>", "<arg_value>", "</arg_value>"),
            ]
        ),
        max_size=14,
    ),
    data=st.data(),
)
@pytest.mark.parametrize("new_reader", [hermes, glm])
def test_any_text_reads_the_same_however_it_is_cut(
    new_reader: Callable[[], CallReader], words: list[str], data: st.DataObject
) -> None:
    text = "<tool_call>" + "".join(words)
    check_pieces(new_reader, text, read(new_reader(), [text]), data)


def test_arguments_are_shown_as_they_come() -> None:
    reader = hermes()
    assert reader.push('<tool_call>\n{"name": "f", "arguments": {"te') == [
        CallBegun(0, "f"),
        CallArguments(0, '{"te'),
    ]
    assert reader.push('xt": "a') == [CallArguments(0, 'xt": "a')]
    assert reader.push('"}}\n</tool_call>') == [CallArguments(0, '"}')]
