"""What one body may ask for at most: each bound is a 400 that names the field and both numbers."""

import json
import logging
from typing import Any

import httpx
import pytest

from deploy.api import checks, ingress
from deploy.api.openai import limits
from tests.support.fake_engine import (
    CHAT,
    COMPLETIONS,
    HELLO,
    LIMITS,
    FakeEngine,
    error_of,
    http_client,
    ingress_over,
    says,
)

pytestmark = pytest.mark.anyio

TOOL = {"type": "function", "function": {"name": "f"}}
LONG_TOOL = {"type": "function", "function": {"name": "f", "description": "x" * limits.MAX_TOOLS_BYTES}}
USER = {"role": "user", "content": ""}
CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
TEXT = {"type": "text", "text": ""}


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    ("path", "fields", "param", "says"),
    [
        (CHAT, {"messages": [USER] * (limits.MAX_MESSAGES + 1)}, "messages", "at most 4096 items"),
        (CHAT, {"stop": ["x"] * 17}, "stop", "at most 16 items"),
        (CHAT, {"stop": "x" * 1025}, "stop", "at most 1024 characters"),
        (CHAT, {"stop": ["x", "x" * 400_000]}, "stop.1", "at most 1024 characters"),
        (CHAT, {"stop_token_ids": [1] * 1025}, "stop_token_ids", "at most 1024 items"),
        (CHAT, {"logit_bias": {str(n): 1 for n in range(1025)}}, "logit_bias", "at most 1024 items"),
        (CHAT, {"tools": [TOOL] * 129}, "tools", "at most 128 items"),
        (CHAT, {"tools": [LONG_TOOL]}, "tools", "262144 bytes of JSON, not 262"),
        (
            CHAT,
            {"chat_template_kwargs": {str(n): 1 for n in range(65)}},
            "chat_template_kwargs",
            "at most 64",
        ),
        (CHAT, {"messages": [USER | {"content": [TEXT] * 1025}]}, "messages.0.content", "at most 1024 items"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "tool_calls": [CALL] * 1025}]},
            "messages.0.tool_calls",
            "at most 1024 items",
        ),
        (CHAT, {f"unknown_{n}": 1 for n in range(300)}, None, "at most 256 fields, not 302"),
        (CHAT, {"x": [1] * (limits.MAX_ITEMS + 2)}, None, "at most 262144 are read"),
        (COMPLETIONS, {"prompt": ["x"] * 1025}, "prompt", "at most 1024 items"),
        ("/tokenize", {"prompt": None, "tools": [TOOL] * 129}, "tools", "at most 128 items"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
async def test_a_body_beyond_a_bound_is_refused(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str | None, says: str
) -> None:
    body = {"model": "demo", "prompt": "x"} if path == COMPLETIONS else HELLO
    response = await http.post(path, json=body | fields)
    assert response.status_code == 400
    error = error_of(response)
    assert error["param"] == param
    assert says in error["message"]
    assert len(response.content) < 1000, "what was sent is not sent back"


@pytest.mark.parametrize(
    "body",
    [
        json.dumps(HELLO)[:-1] + f', "tools": [{nested(300)}]}}',
        json.dumps(
            HELLO
            | {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"function": {"name": "f", "arguments": nested(300)}, "type": "function"}
                        ],
                    }
                ]
            }
        ),
    ],
    ids=["body", "arguments in a string"],
)
async def test_nesting_has_a_bound(http: httpx.AsyncClient, body: str) -> None:
    response = await http.post(CHAT, content=body)
    assert response.status_code == 400
    assert "nested too deeply" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (COMPLETIONS, {"prompt": "x" * 65}, "prompt"),
        (COMPLETIONS, {"prompt": ["x", "x" * 65]}, "prompt"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 65}]}, "messages"),
        ("/tokenize", {"prompt": "x" * 65}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "x" * 65}]}, "messages"),
        ("/detokenize", {"tokens": [1] * 65}, "tokens"),
    ],
)
async def test_a_text_beyond_the_context_is_refused_with_both_numbers(
    http: httpx.AsyncClient, path: str, body: dict[str, Any], param: str
) -> None:
    response = await http.post(path, json={"model": "demo"} | body)
    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, "context_length_exceeded")
    assert f"is {LIMITS.max_model_len} tokens, but the text has " in error["message"]


async def test_unknown_fields_make_one_short_line(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"forged\nWARNING all is lost": 1, "x" * 1000: 1} | {f"y{n}": 1 for n in range(100)}
    with caplog.at_level(logging.WARNING):
        assert (await http.post(CHAT, json=HELLO | names)).status_code == 200
    [line] = [record.message for record in caplog.records if "ignored fields" in record.message]
    assert r"forged\nWARNING" in line
    assert line.endswith("and 82 more")
    assert len(line) < 2000


async def test_logprobs_that_a_reply_cannot_hold_are_refused_or_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in (checks, ingress):
        monkeypatch.setattr(module, "MAX_SCORES", 30)
    engine = FakeEngine(says("hello", "world", logprobs=True))
    async with http_client(ingress_over(engine)) as http:

        async def post(**fields: Any) -> httpx.Response:
            return await http.post(COMPLETIONS, json={"model": "demo", "prompt": "abcde"} | fields)

        assert (await post(prompt_logprobs=5)).status_code == 200
        error = error_of(await post(prompt_logprobs=5, n=2))
        assert error["param"] == "prompt_logprobs"
        assert "60 logprobs were asked for; a reply holds at most 30" in error["message"]
        assert len(engine.requests) == 1
        assert (await post(logprobs=2)).status_code == 200
        error = error_of(await post(logprobs=3))
        assert error["param"] == "logprobs"
        assert "40 logprobs" in error["message"]
        assert not engine.running
        assert (await post(logprobs=3, stream=True)).status_code == 200
