"""The endpoint as OpenAI's own client reads it: everything below goes through its typed parsing."""

from collections.abc import Sequence
from math import inf
from typing import Any

import openai
import pytest

from deploy.api.engine_client import QueueFull, RouterLost
from deploy.api.http import asgi
from router.request import Request, RequestOutput, TokenLogprob
from tests.support.fake_engine import FakeEngine, Step, client_of, says

pytestmark = pytest.mark.anyio

HELLO: list[Any] = [{"role": "user", "content": "hello"}]


async def test_a_chat_is_one_message_with_usage() -> None:
    client = client_of(FakeEngine(says("Hel", "", "lo é", finish="length")))
    chat = await client.chat.completions.create(model="demo", messages=HELLO)
    assert chat.id.startswith("chatcmpl-")
    assert (chat.object, chat.model, chat.system_fingerprint) == ("chat.completion", "demo", None)
    (choice,) = chat.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello é")
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len("<user>hello")
    assert chat.usage.completion_tokens == len("Hello é".encode())
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens


async def test_a_streamed_chat_opens_with_the_role_and_closes_with_the_reason() -> None:
    client = client_of(FakeEngine(says("Hel", "", "lo", "")))
    stream = await client.chat.completions.create(model="demo", messages=HELLO, stream=True)
    chunks = [chunk async for chunk in stream]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [
        (c.choices[0].delta.role, c.choices[0].delta.content, c.choices[0].finish_reason) for c in chunks
    ]
    assert deltas == [
        ("assistant", "", None),
        (None, "Hel", None),
        (None, "lo", None),
        (None, None, "stop"),
    ]
    assert all("usage" not in chunk.model_fields_set for chunk in chunks)


async def test_comments_in_a_stream_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "WAITING_S", 0.02)
    client = client_of(FakeEngine([0.1, *says("Hel", finish=None), 0.1, *says("lo")]))
    stream = await client.completions.create(model="demo", prompt="x", stream=True)
    assert [chunk.choices[0].text async for chunk in stream] == ["Hel", "lo"]


async def test_usage_comes_last_in_a_stream_that_asks_for_it() -> None:
    client = client_of(FakeEngine(says("Hello")))
    stream = await client.chat.completions.create(
        model="demo", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    assert all("usage" in chunk.model_fields_set and chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (11, 5, 16)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_n_choices_differ_by_seed_and_keep_their_places(stream: bool) -> None:
    def script(request: Request) -> Sequence[Step]:
        return says("seed ", f"{request.params.seed}")

    client = client_of(engine := FakeEngine(script))
    texts = ["", ""]
    answer: Any = await client.chat.completions.create(
        model="demo", messages=HELLO, n=2, seed=7, stream=stream
    )
    if stream:
        async for chunk in answer:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    else:
        texts = [choice.message.content for choice in answer.choices]
    assert texts == ["seed 7", "seed 8"]
    assert len({request.id for request in engine.requests}) == 2


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_chat_logprobs_have_bytes_and_alternatives(stream: bool) -> None:
    client = client_of(engine := FakeEngine(says("é", logprobs=True)))
    answer: Any = await client.chat.completions.create(
        model="demo", messages=HELLO, logprobs=True, top_logprobs=2, stream=stream
    )
    choices = [chunk.choices[0] async for chunk in answer] if stream else answer.choices
    content = choices[-1].logprobs.content
    assert engine.requests[0].params.logprobs == 2
    assert [scored.bytes for scored in content] == [[0xC3], [0xA9]]
    assert [(top.token, top.logprob, top.bytes) for top in content[0].top_logprobs] == [
        ("\ufffd", -0.5, [0xC3]),
        ("\0", -2.0, [0]),
    ]


async def test_an_impossible_token_has_openais_least_logprob() -> None:
    impossible = RequestOutput("", "a", (97,), (TokenLogprob(97, -inf),), finish="stop")
    client = client_of(FakeEngine([impossible]))
    chat = await client.chat.completions.create(model="demo", messages=HELLO, logprobs=True)
    assert chat.choices[0].logprobs is not None
    assert chat.choices[0].logprobs.content is not None
    assert chat.choices[0].logprobs.content[0].logprob == -9999.0


async def test_a_batch_of_completions_counts_each_prompt_once() -> None:
    client = client_of(engine := FakeEngine(lambda request: says(bytes(request.prompt).decode().upper())))
    completion = await client.completions.create(model="demo", prompt=["ab", "cde"], n=2, max_tokens=5)
    assert completion.id.startswith("cmpl-")
    assert completion.object == "text_completion"
    assert [(c.index, c.text, c.finish_reason) for c in completion.choices] == [
        (0, "AB", "stop"),
        (1, "AB", "stop"),
        (2, "CDE", "stop"),
        (3, "CDE", "stop"),
    ]
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (5, 10)
    assert {request.params.max_tokens for request in engine.requests} == {5}


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("ab", [(97, 98)]),
        ([97, 98], [(97, 98)]),
        ([[97], [98]], [(97,), (98,)]),
        (["a", "b"], [(97,), (98,)]),
    ],
    ids=["text", "tokens", "token lists", "texts"],
)
async def test_a_prompt_is_text_or_tokens_alone_or_in_a_batch(
    prompt: Any, prompts: list[tuple[int, ...]]
) -> None:
    client = client_of(engine := FakeEngine(says("x")))
    await client.completions.create(model="demo", prompt=prompt)
    assert [request.prompt for request in engine.requests] == prompts


async def test_streamed_completions_join_to_the_whole_with_legacy_logprobs() -> None:
    client = client_of(FakeEngine(says("ab", "c", logprobs=True)))
    stream = await client.completions.create(model="demo", prompt="x", logprobs=2, stream=True)
    choices = [chunk.choices[0] async for chunk in stream]
    assert [(c.text, c.finish_reason) for c in choices] == [("ab", None), ("c", "stop")]
    logprobs = [choice.logprobs for choice in choices]
    assert all(logprobs)
    assert [(lp.tokens, lp.text_offset) for lp in logprobs if lp] == [(["a", "b"], [0, 1]), (["c"], [2])]
    assert [lp.token_logprobs for lp in logprobs if lp] == [[-0.5, -0.5], [-0.5]]
    assert [lp.top_logprobs for lp in logprobs if lp][1] == [{"c": -0.5, "\0": -2.0}]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("end", "reason", "stop_reason"),
    [
        ({"finish": "stop"}, "stop", None),
        ({"finish": "stop", "stop_reason": "END"}, "stop", "END"),
        ({"finish": "stop", "stop_reason": 7}, "stop", 7),
        ({"finish": "length"}, "length", None),
        ({"finish": "timeout"}, "length", "timeout"),
    ],
    ids=["model", "string", "token", "length", "timeout"],
)
async def test_a_choice_says_what_ended_it(
    end: dict[str, Any], reason: str, stop_reason: object, stream: bool
) -> None:
    client = client_of(FakeEngine([RequestOutput("", "a", (97,), **end)]))
    for answer in (
        await client.chat.completions.create(model="demo", messages=HELLO, stream=stream),
        await client.completions.create(model="demo", prompt="x", stream=stream),
    ):
        any_answer: Any = answer
        choices = [chunk.choices[0] async for chunk in any_answer] if stream else any_answer.choices
        assert (choices[-1].finish_reason, choices[-1].stop_reason) == (reason, stop_reason)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_usage_says_how_much_of_each_prompt_was_cached(stream: bool) -> None:
    def script(request: Request) -> Sequence[Step]:
        first = RequestOutput("", "a", (97,), num_cached=len(request.prompt) - 1)
        return [first, *says("b")]

    client = client_of(FakeEngine(script))
    options: Any = {"stream_options": {"include_usage": True}} if stream else {}
    answer: Any = await client.completions.create(
        model="demo", prompt=["abc", "de"], n=2, stream=stream, **options
    )
    usage = [chunk async for chunk in answer][-1].usage if stream else answer.usage
    assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (5, 3)


async def test_models_lists_the_one_model() -> None:
    client = client_of(FakeEngine([]))
    assert [model.id for model in (await client.models.list()).data] == ["demo"]
    assert (await client.models.retrieve("demo")).object == "model"
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("failure", "expected", "kind", "message"),
    [
        (QueueFull(2.2), openai.RateLimitError, "rate_limit_error", "Too many requests"),
        (RouterLost("actor died"), openai.InternalServerError, "server_error", "lost with it: actor died"),
        (ValueError("never fits"), openai.BadRequestError, "invalid_request_error", "never fits"),
        (KeyError("secret"), openai.InternalServerError, "server_error", "Internal server error"),
        (
            RequestOutput("", finish="error", error="step 3 failed"),
            openai.InternalServerError,
            "server_error",
            "step 3",
        ),
    ],
    ids=["queue full", "router lost", "refused", "bug", "failed"],
)
async def test_failures_before_the_first_token_have_a_status(
    failure: Step, expected: type[openai.APIStatusError], kind: str, message: str, stream: bool
) -> None:
    client = client_of(FakeEngine([failure]))
    with pytest.raises(expected, match=message) as caught:
        await client.chat.completions.create(model="demo", messages=HELLO, stream=stream)
    assert caught.value.type == kind
    assert "secret" not in str(caught.value)
    assert caught.value.request_id


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize(
    "failure", [RouterLost("actor died"), KeyError("secret")], ids=["router lost", "bug"]
)
async def test_a_failure_in_the_middle_of_a_stream_raises_after_what_came(failure: Step, n: int) -> None:
    client = client_of(engine := FakeEngine([*says("some text", finish=None), failure]))
    stream = await client.chat.completions.create(model="demo", messages=HELLO, stream=True, n=n)
    texts = []

    async def read() -> None:
        async for chunk in stream:
            texts.append(chunk.choices[0].delta.content)

    with pytest.raises(openai.APIError) as caught:
        await read()
    assert "some text" in texts
    assert caught.value.type == "server_error"
    assert "secret" not in str(caught.value)
    assert not engine.running


async def test_retry_after_says_when_in_whole_seconds() -> None:
    for failure, seconds in [(QueueFull(2.2), "3"), (RouterLost("gone"), "5")]:
        client = client_of(FakeEngine([failure]))
        with pytest.raises(openai.APIStatusError) as caught:
            await client.completions.create(model="demo", prompt="x")
        assert caught.value.response.headers["retry-after"] == seconds
