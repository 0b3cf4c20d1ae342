"""Tests of the fields of a body: which are served, refused by name, or ignored and logged."""

import asyncio
import json
import logging
from dataclasses import replace
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.request import SamplingParams
from tests.support.fake_engine import (
    CHAT,
    COMPLETIONS,
    HELLO,
    MODEL,
    FakeEngine,
    error_of,
    http_client,
    ingress_over,
    says,
)

pytestmark = pytest.mark.anyio


def chat(**fields: object) -> tuple[str, dict[str, Any]]:
    return CHAT, HELLO | fields


def completion(**fields: object) -> tuple[str, dict[str, Any]]:
    return COMPLETIONS, {"model": "demo", "prompt": "x", **fields}


@pytest.mark.parametrize(
    ("request_", "param", "message"),
    [
        (chat(messages="hi"), "messages", "valid array"),
        (chat(messages=[]), "messages", "at least 1"),
        (chat(messages=[{"role": "user"}]), "messages.0.content", "required"),
        (
            chat(messages=[{"role": "user", "content": [{"type": "text"}]}]),
            "messages.0.content.0.text",
            "requ",
        ),
        (chat(messages=[{"role": "user", "content": "refuse"}]), "messages", "template failed"),
        (chat(temperature=-1), "temperature", "temperature=-1.0 must be between 0 and 100"),
        (chat(temperature=float("nan")), "temperature", "temperature=nan"),
        (chat(max_tokens=-5), "max_tokens", "greater than or equal to 1"),
        (chat(max_completion_tokens=0), "max_completion_tokens", "greater than or equal to 1"),
        (chat(n=0), "n", "greater than or equal to 1"),
        (chat(stop=["x"] * 17), "stop", "at most 16"),
        (chat(stop=""), "stop", "not empty"),
        (chat(seed=2**63), "seed", "64-bit"),
        (chat(top_logprobs=2), "top_logprobs", "logprobs=true"),
        (chat(logprobs=True, top_logprobs=21), "top_logprobs", "less than or equal to 20"),
        (chat(logit_bias={"x": 1}), "logit_bias.x", "valid integer"),
        (chat(logit_bias={"7": 101}), "logit_bias", "between -100 and 100"),
        (chat(logit_bias={"256": 1}), "logit_bias", "outside the vocabulary of 256"),
        (completion(logit_bias={"-1": 1}), "logit_bias", "outside the vocabulary"),
        (chat(min_tokens=-1), "min_tokens", "at least 0"),
        (chat(min_tokens=5, max_tokens=4), "min_tokens", "at most max_tokens=4"),
        (chat(priority=2**31), "priority", "less than"),
        (completion(max_tokens=0), "max_tokens", "only allowed with echo=true"),
        (completion(max_tokens=-1, echo=True), "max_tokens", "greater than or equal to 0"),
        (completion(prompt_logprobs=1, stream=True), "prompt_logprobs", "stream=true"),
        (completion(prompt_logprobs=21), "prompt_logprobs", "less than or equal to 20"),
        (chat(stream_options={"include_usage": True}), "stream_options", "stream=true"),
        (completion(prompt=""), "prompt", "empty"),
        (completion(prompt=[]), "prompt", "at least 1"),
        (completion(prompt=[[]]), "prompt", "empty"),
        (completion(prompt=[1, "x"]), "prompt.0", "valid"),
        (completion(prompt=[True]), "prompt.0", "valid"),
        (completion(prompt=[0, 256]), "prompt", "outside the vocabulary of 256"),
        (completion(prompt=[-1]), "prompt", "outside the vocabulary"),
        (
            completion(prompt=["x"] * 7, n=7),
            "prompt",
            "49 answers were asked for; this server holds at most 48",
        ),
        (completion(n=49), "n", "at most 48 at a time"),
        (chat(n=49), "n", "at most 48 at a time"),
        (completion(best_of=2), "best_of", "not supported (only n=1)"),
    ],
    ids=lambda value: json.dumps(value[1])[30:80] if isinstance(value, tuple) else "",
)
async def test_a_bad_field_is_named(
    http: httpx.AsyncClient, request_: tuple[str, dict[str, Any]], param: str, message: str
) -> None:
    path, body = request_
    response = await http.post(path, content=json.dumps(body))
    assert response.status_code == 400
    error = error_of(response)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [{"type": "custom"}]},
        {"tool_choice": "sometimes"},
        {"functions": [{}]},
        {"response_format": {"type": "structural_tag"}},
        {"structured_outputs": {"structural_tag": "x"}},
        {"echo": True},
        {"prompt_logprobs": 1},
        {"modalities": ["audio"]},
        {"audio": {"voice": "x"}},
        {"messages": [{"role": "function", "content": "x"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"type": "custom"}]}]},
    ],
    ids=lambda fields: next(iter(fields)),
)
async def test_what_is_not_supported_is_refused(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    response = await http.post(CHAT, json=HELLO | fields)
    assert response.status_code == 400
    assert "not supported" in error_of(response)["message"]
    assert error_of(response)["param"].startswith(next(iter(fields)))


async def test_fields_that_ask_for_nothing_are_accepted(http: httpx.AsyncClient) -> None:
    neutral = {
        "user": "me",
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "temperature": None,
        "n": None,
        "top_k": -1,
        "stop": None,
    }
    assert (await http.post(CHAT, json=HELLO | neutral)).status_code == 200
    best = {"model": "demo", "prompt": "x", "best_of": 2, "n": 2, "suffix": "", "echo": False}
    assert (await http.post(COMPLETIONS, json=best)).status_code == 200


async def test_unknown_fields_are_ignored_and_logged(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    messages = [{"role": "user", "content": "hello", "name": "bob"}]
    with caplog.at_level(logging.WARNING):
        response = await http.post(CHAT, json=HELLO | {"store": True, "messages": messages})
    assert response.status_code == 200
    assert "ignored fields: messages.name, store" in caplog.text


async def test_text_parts_are_lines_and_a_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    async with http_client(ingress_over(engine := FakeEngine(says("Hello")))) as http:
        await http.post(CHAT, json=HELLO | {"messages": messages})
    assert bytes(engine.requests[0].prompt) == b"<system>be brief<user>a\nb"


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, MODEL.defaults),
        ({"temperature": None}, MODEL.defaults),
        ({"temperature": 0, "top_k": -1}, SamplingParams(temperature=0, top_k=0)),
        ({"top_k": 0, "top_p": 0.9}, SamplingParams(temperature=MODEL.defaults.temperature, top_p=0.9)),
        ({"min_p": 0.1, "repetition_penalty": 2}, replace(MODEL.defaults, min_p=0.1, repetition_penalty=2)),
    ],
    ids=["none", "null", "greedy", "all tokens", "further"],
)
async def test_sampling_that_is_not_asked_for_is_the_models_own(
    fields: dict[str, Any], expected: SamplingParams
) -> None:
    async with http_client(ingress_over(engine := FakeEngine(says("Hello")))) as http:
        await http.post(CHAT, json=HELLO | fields)
    assert engine.requests[0].params == expected


async def test_fields_of_sampling_reach_the_engine() -> None:
    fields = {"logit_bias": {"7": -100, "8": 0.5}, "min_tokens": 2, "priority": -3, "max_tokens": 4}
    engine = FakeEngine(says("Hello"))
    async with http_client(ingress_over(engine)) as http:
        for path, body in [chat(**fields), completion(**fields)]:
            assert (await http.post(path, json=body)).status_code == 200
    for request in engine.requests:
        assert request.params.logit_bias == ((7, -100.0), (8, 0.5))
        assert (request.params.min_tokens, request.priority) == (2, -3)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
FIELDS = [
    *(
        "messages",
        "prompt",
        "n",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "seed",
    ),
    *(
        "stop",
        "stop_token_ids",
        "max_tokens",
        "logprobs",
        "top_logprobs",
        "best_of",
        "echo",
        "logit_bias",
        "tools",
        "tool_choice",
        "response_format",
        "structured_outputs",
        "guided_json",
        "guided_regex",
        "guided_grammar",
        "model",
        "user",
    ),
]


@settings(max_examples=150, deadline=None)
@given(
    path=st.sampled_from([CHAT, COMPLETIONS]),
    body=JSON
    | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=4).map(lambda d: HELLO | {"prompt": "x"} | d),
)
def test_no_json_body_is_answered_with_500(path: str, body: object) -> None:
    async def post() -> httpx.Response:
        async with http_client(ingress_over(FakeEngine(says("Hello")))) as http:
            return await http.post(path, content=json.dumps(body))

    assert asyncio.run(post()).status_code in {200, 400, 404}
