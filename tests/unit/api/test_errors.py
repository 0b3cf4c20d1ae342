"""An error's message is short, whatever a client sent: nobody's megabytes come back, and no number whole."""

import json
from typing import Any

import httpx
import pytest

from deploy.api.http.errors import ApiError
from tests.support.fake_engine import CHAT, COMPLETIONS, HELLO, error_of

pytestmark = pytest.mark.anyio

NUMBER = 10**400
WORD = "x" * 50_000
WORDS = "x y " * 50_000


@pytest.mark.parametrize(
    "value", [NUMBER, -NUMBER, WORD, WORDS, [WORD] * 20, {WORD: WORD}], ids=lambda v: str(v)[:8]
)
@pytest.mark.parametrize(
    "field",
    [
        *(
            "model",
            "n",
            "stream",
            "stream_options",
            "priority",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "seed",
        ),
        *("repetition_penalty", "presence_penalty", "logit_bias", "stop", "stop_token_ids", "ignore_eos"),
        *(
            "min_tokens",
            "max_tokens",
            "logprobs",
            "prompt_logprobs",
            "best_of",
            "suffix",
            "bad_words",
            "echo",
        ),
        *("messages", "tools", "tool_choice", "parallel_tool_calls", "top_logprobs", "max_completion_tokens"),
        *(
            "response_format",
            "structured_outputs",
            "guided_json",
            "guided_regex",
            "guided_choice",
            "guided_grammar",
        ),
        *("functions", "function_call", "modalities", "audio", "chat_template_kwargs", "allowed_token_ids"),
    ],
)
async def test_what_a_client_sent_is_not_echoed_whole(
    http: httpx.AsyncClient, field: str, value: Any
) -> None:
    tools = {"tools": [{"type": "function", "function": {"name": "f"}}]}
    for path, body in [(CHAT, HELLO | tools), (COMPLETIONS, {"model": "demo", "prompt": "x"})]:
        response = await http.post(path, content=json.dumps(body | {field: value}))
        assert response.status_code in (200, 400, 404), response.text[:1000]
        if response.status_code != 200:
            error = error_of(response)
            assert len(error["message"]) < 1_100
            assert len(error["param"] or "") < 1_100
            words = f"{error['message']} {error['param']}".split()
            assert max(map(len, words)) < 110


async def test_a_path_is_not_echoed_whole(http: httpx.AsyncClient) -> None:
    response = await http.get(f"/{WORD}")
    assert response.status_code == 404
    assert len(response.text) < 400
    response = await http.get(f"/v1/models/{WORD}")
    assert response.status_code == 404
    assert len(response.text) < 400


def test_an_ordinary_message_stays_as_it_is() -> None:
    message = "top_p=2 must be above 0 and at most 1"
    assert ApiError(400, message, param="top_p").message == message
