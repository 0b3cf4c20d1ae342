"""A streamed reply and a whole one say the same."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deploy.api.openai.chat_shape import ChatShape
from deploy.api.openai.completion_shape import CompletionShape
from deploy.api.openai.reply import Reply
from deploy.api.openai.requests import CompletionRequest
from deploy.api.openai.responses import Shape
from deploy.api.reading.parts import ChatReader, Reader
from deploy.api.reading.reasoning import ReasoningReader
from deploy.api.reading.tool_calls import CallReader, HermesCall
from router.request import RequestOutput, TokenLogprob
from tests.support.fake_engine import ByteTokenizer, says
from tests.support.read_parts import cut

outputs_of_a_request = st.lists(
    st.builds(
        lambda text, tokens: RequestOutput(
            "", text, tuple(tokens), tuple(TokenLogprob(token, -1.0) for token in tokens)
        ),
        st.text(max_size=4),
        st.binary(max_size=3),  # a token for each byte; text comes when it likes
    ),
    min_size=1,
)


COMPLETION = CompletionRequest(model="demo", prompt=["x"], logprobs=0)


def completion_shape() -> Shape:
    return CompletionShape(ByteTokenizer(), COMPLETION, prompts=[b"x"])


def chat_shape() -> Shape:
    def reader() -> Reader:
        return ChatReader(ReasoningReader(is_open=False), CallReader(HermesCall), max_calls=None)

    return ChatShape(ByteTokenizer(), new_reader=reader, calls_finish=True)


def reply(shape: Shape) -> Reply:
    return Reply(
        shape,
        reply_id="cmpl-1",
        created=0,
        model="demo",
        prompt_tokens=[1],
        n=1,
        logprobs=True,
        include_usage=False,
    )


def streamed(shape: Shape, outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
    """Return the choice of every event."""
    stream = reply(shape)
    events = b"".join(stream.event(0, output) for output in outputs).decode().split("\n\n")
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events if event]


def whole(shape: Shape, outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    gathered = reply(shape)
    for output in outputs:
        gathered.add(0, output)
    return json.loads(gathered.whole())["choices"][0]


@given(outputs=outputs_of_a_request)
def test_the_events_of_a_stream_join_to_the_whole(outputs: list[RequestOutput]) -> None:
    choices, one = streamed(completion_shape(), outputs), whole(completion_shape(), outputs)
    assert "".join(choice["text"] for choice in choices) == one["text"]
    for name, values in one["logprobs"].items():
        parts = [choice["logprobs"][name] for choice in choices if choice["logprobs"]]
        assert [value for part in parts for value in part] == values


ANSWER = (
    "<think>\nhm\n</think>\n\nSo\n"
    '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
    '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
)


@given(data=st.data())
def test_the_events_of_a_chat_join_to_the_whole(data: st.DataObject) -> None:
    outputs: list[Any] = says(*cut(ANSWER, data))
    one = whole(chat_shape(), outputs)
    choices = streamed(chat_shape(), outputs)
    assert one["message"]["reasoning_content"] == "hm"
    assert [call["function"] for call in one["message"]["tool_calls"]] == [
        {"name": "f", "arguments": '{"a": 1}'},
        {"name": "g", "arguments": "{}"},
    ]
    for name in ("content", "reasoning_content"):
        assert "".join(choice["delta"].get(name, "") for choice in choices) == one["message"][name]
    arguments = ["", ""]
    for choice in choices:
        for call in choice["delta"].get("tool_calls", []):
            arguments[call["index"]] += call["function"]["arguments"]
    assert arguments == [call["function"]["arguments"] for call in one["message"]["tool_calls"]]
    assert choices[-1]["finish_reason"] == one["finish_reason"] == "tool_calls"


def test_offsets_do_not_wait_for_a_text_that_lags() -> None:
    first, second = (RequestOutput("", "", (t,), (TokenLogprob(t, -1.0),)) for t in b"ab")
    offsets = [choice["logprobs"]["text_offset"] for choice in streamed(completion_shape(), [first, second])]
    assert offsets == [[0], [1]]
