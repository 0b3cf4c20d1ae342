"""Answers of a given form: each way to ask for one ends in the request's grammar."""

from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel

from router.sampling import grammar
from tests.support.fake_engine import (
    CHAT,
    COMPLETIONS,
    HELLO,
    FakeEngine,
    client_of,
    error_of,
    http_client,
    ingress_over,
    says,
)


class Point(BaseModel):
    x: int


pytestmark = pytest.mark.anyio

POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
LARK = 'start: "a"+'
FORMS: list[Any] = [
    ({"response_format": {"type": "json_object"}}, grammar.of_json_schema({"type": "object"})),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "point", "schema": POINT}}},
        grammar.of_json_schema(POINT),
    ),
    ({"structured_outputs": {"json": POINT}}, grammar.of_json_schema(POINT)),
    ({"structured_outputs": {"regex": "[0-9]+"}}, grammar.of_regex("[0-9]+")),
    ({"structured_outputs": {"choice": ["yes", "no"]}}, grammar.of_choice(["yes", "no"])),
    ({"structured_outputs": {"grammar": LARK}}, grammar.of_lark(LARK)),
    ({"guided_json": '{"type": "integer"}'}, grammar.of_json_schema({"type": "integer"})),
    ({"guided_regex": "[0-9]+"}, grammar.of_regex("[0-9]+")),
    ({"guided_choice": ["yes", "no"]}, grammar.of_choice(["yes", "no"])),
    ({"guided_grammar": LARK}, grammar.of_lark(LARK)),
    ({"response_format": {"type": "text"}}, None),
    ({"structured_outputs": {}}, None),
]


@pytest.mark.parametrize(("fields", "expected"), FORMS, ids=lambda value: str(value)[:50])
async def test_a_form_is_a_grammar(fields: dict[str, Any], expected: str | None) -> None:
    engine = FakeEngine(says("x"))
    async with http_client(ingress_over(engine)) as http:
        for path, body in [(CHAT, HELLO), (COMPLETIONS, {"model": "demo", "prompt": "x"})]:
            assert (await http.post(path, json=body | fields)).status_code == 200
    assert [request.params.grammar for request in engine.requests] == [expected, expected]


async def test_a_typed_form_is_parsed_by_the_client() -> None:
    client = client_of(engine := FakeEngine(says('{"x":', "1}")))
    chat = await client.chat.completions.parse(
        model="demo", messages=[{"role": "user", "content": "hello"}], response_format=Point
    )
    assert chat.choices[0].message.parsed == Point(x=1)
    assert '"x"' in (engine.requests[0].params.grammar or "")


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "frob"}}}},
            "response_format",
            "response_format: Invalid type: frob",
        ),
        (
            {"response_format": {"type": "json_schema"}},
            "response_format.json_schema",
            "required",
        ),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", "unclosed group"),
        ({"structured_outputs": {"json_object": True}}, "structured_outputs.json_object", "not supported"),
        ({"guided_json": "{"}, "guided_json", "EOF"),
        ({"guided_choice": []}, "guided_choice", "at least 1"),
        ({"guided_grammar": "start: x"}, "guided_grammar", "unknown name"),
        (
            {"guided_regex": "a", "guided_choice": ["a"]},
            "guided_choice",
            "guided_regex and guided_choice cannot go together",
        ),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
            "response_format and structured_outputs.regex cannot",
        ),
        (
            {"structured_outputs": {"regex": "a", "json": {}}},
            "structured_outputs.regex",
            "structured_outputs.json and structured_outputs.regex cannot",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
async def test_a_form_that_cannot_be_is_refused(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str, message: str
) -> None:
    for path, body in [(CHAT, HELLO), (COMPLETIONS, {"model": "demo", "prompt": "x"})]:
        response = await http.post(path, json=body | fields)
        assert response.status_code == 400
        error = error_of(response)
        assert error["param"] == param
        assert message in error["message"]


async def test_the_client_raises_a_bad_request() -> None:
    client = client_of(FakeEngine([]))
    with pytest.raises(openai.BadRequestError, match="guided_regex: "):
        await client.completions.create(model="demo", prompt="x", extra_body={"guided_regex": "("})
