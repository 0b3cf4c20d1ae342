"""A streamed reply and a whole one say the same."""

import json
from collections.abc import Sequence
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deploy.api.completion_shape import CompletionShape
from deploy.api.reply import Reply
from deploy.api.requests import CompletionRequest
from router.request import RequestOutput, TokenLogprob
from tests.unit.fake_engine import ByteTokenizer

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


def reply() -> Reply:
    body = CompletionRequest(model="demo", prompt=["x"], logprobs=0)
    return Reply(
        CompletionShape(ByteTokenizer(), body, prompts=[b"x"]),
        reply_id="cmpl-1",
        created=0,
        model="demo",
        prompt_tokens=[1],
        n=1,
        logprobs=True,
        include_usage=False,
    )


def streamed(outputs: Sequence[RequestOutput]) -> list[dict[str, Any]]:
    """The choice of every event."""
    stream = reply()
    events = b"".join(stream.event(0, output) for output in outputs).decode().split("\n\n")
    return [json.loads(event.removeprefix("data: "))["choices"][0] for event in events if event]


def whole(outputs: Sequence[RequestOutput]) -> dict[str, Any]:
    gathered = reply()
    for output in outputs:
        gathered.add(0, output)
    return json.loads(gathered.whole())["choices"][0]


@given(outputs=outputs_of_a_request)
def test_the_events_of_a_stream_join_to_the_whole(outputs: list[RequestOutput]) -> None:
    choices, one = streamed(outputs), whole(outputs)
    assert "".join(choice["text"] for choice in choices) == one["text"]
    for name, values in one["logprobs"].items():
        parts = [choice["logprobs"][name] for choice in choices if choice["logprobs"]]
        assert [value for part in parts for value in part] == values


def test_offsets_do_not_wait_for_a_text_that_lags() -> None:
    first, second = (RequestOutput("", "", (t,), (TokenLogprob(t, -1.0),)) for t in b"ab")
    offsets = [choice["logprobs"]["text_offset"] for choice in streamed([first, second])]
    assert offsets == [[0], [1]]
