"""Tool calls and reasoning as OpenAI's own client reads them, whole and streamed."""

import json
import re
from typing import Any

import openai
import pytest
from llguidance import LLMatcher, LLTokenizer

from deploy.api.engine_client import Limits
from tests.support.fake_engine import (
    ByteTokenizer,
    FakeEngine,
    Step,
    client_of,
    http_client,
    ingress_over,
    says,
)

pytestmark = pytest.mark.anyio

HERMES = "a template with <tool_call> in it"
GLM = "a template with <tool_call> and <arg_key> in it"
ASK: list[Any] = [{"role": "user", "content": "Weather in Rome?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "clock"}}
IN_ROME = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
IN_ROME_GLM = "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n</tool_call>"
FORCE: Any = {"type": "function", "function": {"name": "weather"}}


def engine_of(script: list[Step]) -> FakeEngine:
    engine = FakeEngine(script)
    engine.reached = Limits(max_model_len=4096, max_requests=8)
    return engine


async def answer(engine: FakeEngine, template: str, *, stream: bool, tail: str = "", **fields: Any) -> Any:
    """Return the one choice; a streamed one as the client's own accumulator joins it."""
    client = client_of(engine, ByteTokenizer(template, tail=tail))
    asked = {"model": "demo", "messages": ASK, **fields}
    if not stream:
        return (await client.chat.completions.create(**asked)).choices[0]
    async with client.chat.completions.stream(**asked) as events:
        async for _ in events:
            pass
        return (await events.get_final_completion()).choices[0]


def called(choice: Any) -> list[tuple[str, dict[str, Any]]]:
    calls = choice.message.tool_calls or []
    assert all(re.fullmatch("call_[0-9a-f]{24}", call.id) and call.type == "function" for call in calls)
    return [(call.function.name, json.loads(call.function.arguments)) for call in calls]


both = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


@both
@pytest.mark.parametrize(("template", "text"), [(HERMES, IN_ROME), (GLM, IN_ROME_GLM)], ids=["hermes", "glm"])
async def test_a_call(template: str, text: str, stream: bool) -> None:
    choice = await answer(engine_of(says(*text)), template, stream=stream, tools=[WEATHER])
    assert called(choice) == [("weather", {"city": "Rome"})]
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content


@both
async def test_text_and_calls_of_unknown_tools(stream: bool) -> None:
    text = f"Let me see.\n{IN_ROME}\n{IN_ROME.replace('weather', 'unknown')}"
    choice = await answer(engine_of(says(*text)), HERMES, stream=stream, tools=[WEATHER])
    assert choice.message.content == "Let me see."
    assert called(choice) == [("weather", {"city": "Rome"}), ("unknown", {"city": "Rome"})]


@both
async def test_one_call_at_most(stream: bool) -> None:
    engine = engine_of(says(IN_ROME, IN_ROME))
    choice = await answer(engine, HERMES, stream=stream, tools=[WEATHER], parallel_tool_calls=False)
    assert called(choice) == [("weather", {"city": "Rome"})]


async def test_deltas_of_a_call() -> None:
    client = client_of(engine_of(says("So\n" + IN_ROME[:50], IN_ROME[50:])), ByteTokenizer(HERMES))
    stream = await client.chat.completions.create(model="demo", messages=ASK, tools=[WEATHER], stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    assert [delta.content for delta in deltas] == ["", "So", None, None, None]
    calls = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
    assert [(call.index, call.type, call.function and call.function.name) for call in calls] == [
        (0, "function", "weather"),
        (0, None, None),
        (0, None, None),
    ]
    assert [call.function and call.function.arguments for call in calls] == ["", '{"cit', 'y": "Rome"}']


@both
async def test_a_call_that_the_limit_cut_is_not_to_be_run(stream: bool) -> None:
    cut = engine_of(says(IN_ROME[:-20], finish="length"))
    client = client_of(cut, ByteTokenizer(HERMES))
    asked: Any = {"model": "demo", "messages": ASK, "tools": [WEATHER], "stream": stream}
    chat = await client.chat.completions.create(**asked)
    choices = [chunk.choices[0] async for chunk in chat] if stream else chat.choices
    assert choices[-1].finish_reason == "length"


@both
@pytest.mark.parametrize(("template", "text"), [(HERMES, IN_ROME), (GLM, IN_ROME_GLM)], ids=["hermes", "glm"])
@pytest.mark.parametrize(("choice", "finish"), [("required", "tool_calls"), (FORCE, "stop")], ids=str)
async def test_a_forced_call_has_a_grammar(
    template: str, text: str, choice: Any, finish: str, stream: bool
) -> None:
    engine = engine_of(says(text))
    got = await answer(engine, template, stream=stream, tools=[WEATHER, CLOCK], tool_choice=choice)
    assert called(got) == [("weather", {"city": "Rome"})]
    assert got.finish_reason == finish
    assert allows(engine, text)
    assert not allows(engine, "words")
    clock = (
        text.replace("weather", "clock")
        .replace('"city": "Rome"', "")
        .replace("\n<arg_key>city</arg_key>", "")
    )
    clock = clock.replace("\n<arg_value>Rome</arg_value>", "")
    assert allows(engine, clock) == (choice == "required")
    assert allows(engine, f"{text}\n{text}") == (choice == "required")


def allows(engine: FakeEngine, text: str) -> bool:
    """Return whether the request's grammar allows the text."""
    of = engine.requests[-1].params.grammar
    assert of is not None
    matcher = LLMatcher(LLTokenizer("byte"), of, log_level=0)
    tokens = list(text.encode())
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@both
async def test_a_form_leaves_the_model_its_tools(stream: bool) -> None:
    engine = engine_of(says(IN_ROME))
    form: Any = {"type": "json_object"}
    choice = await answer(engine, HERMES, stream=stream, tools=[WEATHER], response_format=form)
    assert called(choice) == [("weather", {"city": "Rome"})]
    assert allows(engine, '{"sunny":true}')
    assert allows(engine, IN_ROME)
    assert not allows(engine, "sunny")


async def test_no_tool_is_offered_where_none_may_be_called() -> None:
    engine = engine_of(says(IN_ROME))
    choice = await answer(engine, HERMES, stream=False, tools=[WEATHER], tool_choice="none")
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (
        IN_ROME,
        None,
        "stop",
    )
    assert b"<tools>" not in bytes(engine.requests[0].prompt)


async def test_tools_calls_and_their_results_reach_the_template() -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome"}'},
    }
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    engine = engine_of(says("It is sunny."))
    await answer(engine, HERMES, stream=False, messages=messages, tools=[WEATHER])
    prompt = bytes(engine.requests[0].prompt).decode()
    call["function"] = {"name": "weather", "arguments": {"city": "Rome"}}
    assert (
        prompt
        == f"<tools>{json.dumps([WEATHER])}<user>Weather in Rome?<assistant>{json.dumps([call])}<tool>sunny"
    )


@pytest.mark.parametrize(
    ("template", "fields", "param", "message"),
    [
        ("no calls", {"tools": [WEATHER]}, "tools", "no format of tool calls"),
        ("<tool_call><function=f>", {"tools": [WEATHER]}, "tools", "no format of tool calls"),
        (HERMES, {"tool_choice": "required"}, "tool_choice", "needs tools"),
        (HERMES, {"tools": [CLOCK], "tool_choice": FORCE}, "tool_choice", "'weather' is not among the tools"),
        (
            HERMES,
            {"tools": [WEATHER], "tool_choice": "required", "response_format": {"type": "json_object"}},
            "tool_choice",
            "response_format and tool_choice",
        ),
        (
            HERMES,
            {"tools": [WEATHER], "tool_choice": FORCE, "extra_body": {"guided_regex": "a"}},
            "tool_choice",
            "guided_regex and tool_choice",
        ),
        (
            HERMES,
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
            "Unimplemented keys",
        ),
        (
            HERMES,
            {"tools": [{"type": "function", "function": {"name": "two words"}}]},
            "tools.0.function.name",
            "pattern",
        ),
        (
            HERMES,
            {
                "messages": [
                    {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}
                ]
            },
            "messages.0.tool_calls.0.function.arguments",
            "must be a JSON object",
        ),
    ],
    ids=[
        *("no format", "another format", "no tools", "no such tool", "form and required", "form and named"),
        *("schema", "name", "arguments"),
    ],
)
async def test_what_cannot_be_called_is_refused(
    template: str, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        await answer(engine_of([]), template, stream=False, **fields)
    assert caught.value.param == param


THINKS = "a template with <think> and <tool_call>"


@both
@pytest.mark.parametrize(
    ("tail", "text"),
    [("", "<think>\nhm\n</think>\n\nyes"), ("<think>\n", "hm\n</think>\n\nyes")],
    ids=["model opens", "prompt opens"],
)
async def test_reasoning(tail: str, text: str, stream: bool) -> None:
    client = client_of(engine_of(says(*text)), ByteTokenizer(THINKS, tail=tail))
    chat: Any = await client.chat.completions.create(model="demo", messages=ASK, stream=stream)
    if stream:
        deltas = [chunk.choices[0].delta async for chunk in chat]
        assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "hm"
        assert "".join(delta.content or "" for delta in deltas) == "yes"
    else:
        message = chat.choices[0].message
        assert (message.reasoning_content, message.content) == ("hm", "yes")


async def test_a_call_after_reasoning_and_none_within() -> None:
    engine = engine_of(says(f"<think>{IN_ROME}</think>\n{IN_ROME.replace('Rome', 'Oslo')}"))
    choice = await answer(engine, THINKS, stream=False, tools=[WEATHER])
    assert choice.message.reasoning_content == IN_ROME
    assert called(choice) == [("weather", {"city": "Oslo"})]


async def test_no_reasoning_where_the_template_knows_none_or_the_answer_has_a_form() -> None:
    plain = await answer(engine_of(says("<think>hm</think>yes")), HERMES, stream=False)
    assert plain.message.content == "<think>hm</think>yes"
    form: Any = {"type": "json_object"}
    formed = await answer(engine_of(says("{}")), THINKS, tail="<think>", stream=False, response_format=form)
    assert formed.message.content == "{}"
    assert "reasoning_content" not in formed.message.model_fields_set


async def test_earlier_reasoning_reaches_the_template() -> None:
    seen: list[Any] = []

    class Tokenizer(ByteTokenizer):
        def render_chat(self, messages: Any, /, **variables: Any) -> str:
            seen.extend(messages)
            return super().render_chat(messages, **variables)

    said = {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
    async with http_client(ingress_over(engine_of(says("ok")), Tokenizer(THINKS))) as http:
        await http.post("/v1/chat/completions", json={"model": "demo", "messages": [*ASK, said, *ASK]})
    assert seen[1] == said
