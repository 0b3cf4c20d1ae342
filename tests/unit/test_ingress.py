"""The endpoint at the level of HTTP: statuses, headers and bytes."""

import json
from collections.abc import AsyncIterator

import httpx
import pytest

from deploy.engine_client import Readiness, RouterLost
from deploy.ingress import MAX_BODY_BYTES
from tests.unit.fake_engine import (
    CHAT,
    COMPLETIONS,
    HELLO,
    MAX_MODEL_LEN,
    FakeEngine,
    error_of,
    http_client,
    ingress_over,
    says,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(ingress_over(FakeEngine(says("Hello")))) as client:
        yield client


async def test_a_stream_is_made_of_server_sent_events(http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, json=HELLO | {"stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    *events, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] for event in events)


async def test_events_are_ascii_so_that_no_client_splits_them_at_unicode_line_ends() -> None:
    text = "one\u2028two\u0085né\n\ndata: x"
    async with http_client(ingress_over(FakeEngine(says(text, "")))) as http:
        response = await http.post(COMPLETIONS, json={"model": "demo", "prompt": "x", "stream": True})
    assert response.content.isascii()
    first, *_ = response.text.split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"][0]["text"] == text


async def test_a_body_needs_no_content_type(http: httpx.AsyncClient) -> None:
    response = await http.post(CHAT, content=json.dumps(HELLO))
    assert response.status_code == 200


@pytest.mark.parametrize(("prompt", "max_tokens"), [(MAX_MODEL_LEN, 1), (10, MAX_MODEL_LEN - 9)])
async def test_what_exceeds_the_context_is_refused_with_numbers(
    http: httpx.AsyncClient, prompt: int, max_tokens: int
) -> None:
    body = {"model": "demo", "prompt": [7] * prompt, "max_tokens": max_tokens}
    error = error_of(await http.post(COMPLETIONS, json=body))
    assert error["code"] == "context_length_exceeded"
    assert f"is {MAX_MODEL_LEN} tokens" in error["message"]
    assert f"{prompt} in the prompt and {max_tokens} to generate" in error["message"]
    assert (await http.post(COMPLETIONS, json=body | {"prompt": [7] * 9, "max_tokens": 1})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", CHAT, b"{", 400),
        ("POST", CHAT, b'{"model": "\xff"}', 400),
        ("POST", CHAT, b"[" * 100_000, 400),
        ("POST", CHAT, b"x" * (MAX_BODY_BYTES + 1), 413),
        ("POST", CHAT, json.dumps(HELLO | {"model": "other"}).encode(), 404),
        ("POST", "/v1/embeddings", b"{}", 404),
        ("GET", CHAT, b"", 405),
        ("POST", "/health", b"", 405),
    ],
    ids=["json", "utf-8", "depth", "size", "model", "route", "method", "health"],
)
async def test_every_error_has_openais_shape_and_an_id(
    http: httpx.AsyncClient, method: str, path: str, body: bytes, status: int
) -> None:
    response = await http.request(method, path, content=body)
    assert response.status_code == status
    error_of(response)
    assert response.headers["x-request-id"].startswith("req_")


async def test_a_request_id_is_only_added_where_the_request_had_none(http: httpx.AsyncClient) -> None:
    assert (await http.get("/health")).headers["x-request-id"]
    assert "x-request-id" not in (await http.get("/health", headers={"x-request-id": "mine"})).headers


async def test_a_bug_is_logged_with_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    async with http_client(ingress_over(FakeEngine([KeyError("secret")]))) as http:
        response = await http.post(CHAT, json=HELLO)
    assert response.status_code == 500
    assert f"{response.headers['x-request-id']}: POST {CHAT} failed" in caplog.text
    assert "KeyError: 'secret'" in caplog.text


async def test_readiness_is_the_engines_and_health_is_ours() -> None:
    engine = FakeEngine([])
    async with http_client(ingress_over(engine)) as http:
        assert (await http.get("/ready")).json() == {"ready": True, "reason": "", "detail": {"epoch": 3}}
        engine.readiness = Readiness(ready=False, reason="shard 1 loads", detail={"shards": []})
        response = await http.get("/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "shard 1 loads")
        engine.readiness = RouterLost("the router died")
        response = await http.get("/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "the router died")
        assert (await http.get("/health")).status_code == 200
