"""The endpoint at the level of HTTP: statuses, headers and bytes."""

import asyncio
import json
import os
from itertools import groupby

import httpx
import pytest

from deploy.api import readiness
from deploy.api.config import ApiConfig
from deploy.api.engine_client import Limits, QueueFull, Readiness, RouterLost
from deploy.api.http import asgi
from tests.support.fake_engine import (
    CHAT,
    COMPLETIONS,
    HELLO,
    LIMITS,
    FakeEngine,
    Step,
    error_of,
    http_client,
    ingress_over,
    says,
)

pytestmark = pytest.mark.anyio


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


@pytest.mark.parametrize(
    ("prompt", "max_tokens"), [(LIMITS.max_model_len, 1), (10, LIMITS.max_model_len - 9)]
)
async def test_what_exceeds_the_context_is_refused_with_numbers(
    http: httpx.AsyncClient, prompt: int, max_tokens: int
) -> None:
    body = {"model": "demo", "prompt": [7] * prompt, "max_tokens": max_tokens}
    error = error_of(await http.post(COMPLETIONS, json=body))
    assert error["code"] == "context_length_exceeded"
    assert f"is {LIMITS.max_model_len} tokens" in error["message"]
    assert f"{prompt} in the prompt and {max_tokens} to generate" in error["message"]
    assert (await http.post(COMPLETIONS, json=body | {"prompt": [7] * 9, "max_tokens": 1})).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", CHAT, b"{", 400),
        ("POST", CHAT, b'{"model": "\xff"}', 400),
        ("POST", CHAT, b"[" * 100_000, 400),
        ("POST", CHAT, b"x" * (8 * 2**20 + 1), 413),
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


async def test_the_context_is_what_the_engine_has_room_for() -> None:
    engine = FakeEngine(says("Hello"))
    engine.reached = RouterLost("the router has not started yet")
    async with http_client(ingress_over(engine)) as http:
        for response in [await http.get("/v1/models"), await http.post(CHAT, json=HELLO)]:
            assert response.status_code == 503
            assert "has not started yet" in error_of(response)["message"]
        engine.reached = Limits(max_model_len=14, max_requests=1)
        assert (await http.get("/v1/models")).json()["data"][0]["max_model_len"] == 14
        assert (await http.post(CHAT, json=HELLO | {"max_tokens": 3})).status_code == 200
        error = error_of(await http.post(CHAT, json=HELLO | {"max_tokens": 4}))
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")


async def test_every_request_has_the_time_limit_of_the_config() -> None:
    engine = FakeEngine(says("Hel", finish="timeout"))
    async with http_client(ingress_over(engine, config=ApiConfig(request_timeout_s=30))) as http:
        answer = (await http.post(CHAT, json=HELLO | {"n": 2})).json()
    assert [request.timeout_s for request in engine.requests] == [30, 30]
    ended = [(choice["finish_reason"], choice["stop_reason"]) for choice in answer["choices"]]
    assert ended == [("length", "timeout")] * 2
    assert answer["choices"][0]["message"]["content"] == "Hel"


async def test_pages_of_other_sites_are_no_business_of_ours(http: httpx.AsyncClient) -> None:
    """Unless api.cors_origins names them."""
    page = {"origin": "https://chat.example.org"}
    preflight = await http.options(CHAT, headers=page | {"access-control-request-method": "POST"})
    assert preflight.status_code == 405
    answer = await http.post(CHAT, json=HELLO, headers=page)
    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_silent_stream_is_kept_open_by_comments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "WAITING_S", 0.02)
    script: list[Step] = [0.1, *says("Hel", finish=None), 0.1, *says("lo")]
    async with http_client(ingress_over(FakeEngine(script))) as http:
        response = await http.post(COMPLETIONS, json={"model": "demo", "prompt": "x", "stream": True})
    events = response.text.split("\n\n")
    comments = [event.startswith(":") for event in events]
    assert events[0] == ": waiting"
    assert [len(list(run)) > 1 for comment, run in groupby(comments) if comment] == [True, True]
    assert events[-2] == "data: [DONE]"


@pytest.mark.parametrize(("pause_s", "status"), [(0.0, 429), (0.1, 200)], ids=["at once", "after a comment"])
async def test_the_status_of_a_stream_waits_for_a_while(
    monkeypatch: pytest.MonkeyPatch, pause_s: float, status: int
) -> None:
    monkeypatch.setattr(asgi, "WAITING_S", 0.05)
    async with http_client(ingress_over(FakeEngine([pause_s, QueueFull(1)]))) as http:
        response = await http.post(CHAT, json=HELLO | {"stream": True})
    assert response.status_code == status
    answer = response.text.replace(": waiting\n\n", "").removeprefix("data: ")
    assert json.loads(answer)["error"]["code"] == "rate_limit_exceeded"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_full_server_refuses_before_it_looks_into_a_body(path: str) -> None:
    engine = FakeEngine([])
    engine.full = QueueFull(3.2)
    async with http_client(ingress_over(engine)) as http:
        response = await http.post(path, content=b"whatever")
    assert response.status_code == 429
    assert response.headers["retry-after"] == "4"
    assert error_of(response)["code"] == "rate_limit_exceeded"


async def test_a_bug_is_logged_with_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    async with http_client(ingress_over(FakeEngine([KeyError("secret")]))) as http:
        response = await http.post(CHAT, json=HELLO)
    assert response.status_code == 500
    assert f"POST {CHAT} failed" in caplog.text
    assert "KeyError: 'secret'" in caplog.text


async def test_readiness_is_the_engines_and_health_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readiness, "FRESH_S", 0.0)
    engine = FakeEngine([])
    async with http_client(ingress_over(engine)) as http:
        detail = {"ingress_pid": os.getpid(), "epoch": 3}
        assert (await http.get("/ready")).json() == {"ready": True, "reason": "", "detail": detail}
        engine.readiness = Readiness(ready=False, reason="shard 1 loads", detail={"shards": []})
        response = await http.get("/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "shard 1 loads")
        engine.readiness = RouterLost("the router died")
        response = await http.get("/ready")
        assert (response.status_code, response.json()["reason"]) == (503, "the router died")
        assert (await http.get("/health")).status_code == 200


async def test_a_flood_asks_the_engine_once() -> None:
    engine = FakeEngine([])
    asked = 0

    async def ready() -> Readiness:
        nonlocal asked
        asked += 1
        await asyncio.sleep(0.01)
        return Readiness(ready=True)

    engine.ready = ready
    async with http_client(ingress_over(engine)) as http:
        first = asyncio.create_task(http.get("/ready"))
        await asyncio.sleep(0)
        first.cancel()  # who asked first and left takes nobody's answer along
        answers = await asyncio.gather(*(http.get("/ready") for _ in range(50)))
    assert [answer.status_code for answer in answers] == [200] * 50
    assert asked == 1


@pytest.mark.parametrize(
    ("client", "forwarded", "told"),
    [
        ("127.0.0.1", [], True),
        ("::1", [], True),
        ("10.0.0.7", [], False),
        ("10.0.0.7", ["127.0.0.1"], False),
        ("127.0.0.1", ["10.0.0.7"], False),
        ("127.0.0.1", ["127.0.0.1", "10.0.0.7"], False),
        ("127.0.0.1", ["127.0.0.1, 10.0.0.7"], False),
        ("127.0.0.1", ["127.0.0.1"], True),
        ("127.0.0.1", ["unknown"], False),
    ],
)
async def test_details_stay_on_this_machine(client: str, forwarded: list[str], told: bool) -> None:
    transport = httpx.ASGITransport(ingress_over(FakeEngine([])), client=(client, 1))
    async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        answer = (await http.get("/ready", headers=[("x-forwarded-for", one) for one in forwarded])).json()
    assert answer["ready"] is True
    assert bool(answer["detail"]) is told
