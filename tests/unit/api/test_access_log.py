"""Tests of what the log says of a request, as people and as machines read it."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deploy import logs
from deploy.api.config import ApiConfig
from tests.support.fake_engine import (
    CHAT,
    COMPLETIONS,
    HELLO,
    FakeEngine,
    Step,
    http_client,
    ingress_over,
    says,
)

pytestmark = pytest.mark.anyio

PROMPT = {"model": "demo", "prompt": "abc", "wombat": 1}


@pytest.fixture
def written() -> Iterator[io.StringIO]:
    """Yield a stream of lines of JSON, as a process of ours writes them."""
    stream = io.StringIO()
    yield from _writing(stream, logs.handler("json", stream))


@pytest.fixture
def text() -> Iterator[io.StringIO]:
    stream = io.StringIO()
    yield from _writing(stream, logs.handler("text", stream))


def _writing(stream: io.StringIO, handler: logging.Handler) -> Iterator[io.StringIO]:
    room = logging.getLogger("deploy")
    before = room.level
    room.addHandler(handler)
    room.setLevel(logging.INFO)
    yield stream
    room.setLevel(before)
    room.removeHandler(handler)


def lines(written: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in written.getvalue().splitlines()]


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_request_is_one_line_when_it_ends(written: io.StringIO, tmp_path: Path, stream: bool) -> None:
    (tmp_path / "keys").write_text("alice sesame")
    app = ingress_over(FakeEngine(says("Hel", "lo")), config=ApiConfig(keys_file=tmp_path / "keys"))
    async with http_client(app) as http:
        response = await http.post(
            COMPLETIONS, json=PROMPT | {"stream": stream}, headers={"authorization": "Bearer sesame"}
        )
    *_, line = lines(written)
    assert line.pop("seconds") >= 0
    assert line.pop("time").endswith("+00:00")
    completion_id = line.pop("completion_id")
    assert completion_id in response.text
    assert line.pop("message").endswith(f"s, key alice, {completion_id}, 3 + 5 tokens")
    assert line == {
        "level": "INFO",
        "logger": "deploy.api.http.access_log",
        "request_id": response.headers["x-request-id"],
        "method": "POST",
        "path": COMPLETIONS,
        "status": 200,
        "complete": True,
        "key": "alice",
        "prompt_tokens": 3,
        "completion_tokens": 5,
    }
    assert "sesame" not in written.getvalue()


async def test_a_refusal_is_a_line_too(written: io.StringIO) -> None:
    async with http_client(ingress_over(FakeEngine([]), config=ApiConfig(max_body_mib=1))) as http:
        for path, body in [("/nowhere", b""), (CHAT, b"{"), (CHAT, bytes(2**20 + 1))]:
            await http.post(path, content=body)
    assert [(line["path"], line["status"]) for line in lines(written)] == [
        ("/nowhere", 404),
        (CHAT, 400),
        (CHAT, 413),
    ]


async def test_every_line_of_a_request_has_its_id(written: io.StringIO) -> None:
    script: list[Step] = [*says("Hel", finish=None), KeyError("our bug")]
    async with http_client(ingress_over(FakeEngine(script))) as http:
        responses = await asyncio.gather(
            *(http.post(path, json=PROMPT | HELLO | {"stream": path == CHAT}) for path in (CHAT, COMPLETIONS))
        )
    ids = [response.headers["x-request-id"] for response in responses]
    found = lines(written)
    for request_id in ids:
        own = [line for line in found if line["request_id"] == request_id]
        assert [line["level"] for line in own] == ["WARNING", "ERROR", "INFO"]
        assert "KeyError: 'our bug'" in own[1]["exception"]
    assert len(found) == 6


async def test_the_id_that_a_client_sent_is_the_one_in_the_log(written: io.StringIO) -> None:
    async with http_client(ingress_over(FakeEngine([]))) as http:
        await http.get("/version", headers={"x-request-id": "mine"})
        await http.get("/version", headers={"x-request-id": "x" * 5000})
    assert [len(line["request_id"]) for line in lines(written)] == [4, 200]


async def test_a_client_that_leaves_is_told_with_the_tokens_so_far(written: io.StringIO) -> None:
    app = ingress_over(FakeEngine([*says("Hello", finish=None), None]))
    body = json.dumps(PROMPT | {"stream": True}).encode()
    unread = [{"type": "http.request", "body": body, "more_body": False}]
    received = asyncio.Event()

    async def receive() -> Any:
        if unread:
            return unread.pop()
        await received.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        if message.get("body"):
            received.set()

    scope = {"type": "http", "method": "POST", "path": COMPLETIONS, "headers": [], "query_string": b""}
    await app(scope, receive, send)
    *_, line = lines(written)
    assert (line["status"], line["complete"], line["completion_tokens"]) == (200, False, 5)
    assert ", not finished, " in line["message"]


async def test_probes_have_no_line_and_none_has_where_they_are_off(written: io.StringIO) -> None:
    for config, paths in [(ApiConfig(), ["/health", "/ready"]), (ApiConfig(access_log=False), ["/version"])]:
        async with http_client(ingress_over(FakeEngine([]), config=config)) as http:
            for path in paths:
                assert (await http.get(path)).status_code == 200
    assert not written.getvalue()


async def test_nobody_writes_lines_of_his_own_into_the_log(text: io.StringIO) -> None:
    async with http_client(ingress_over(FakeEngine(says("Hello")))) as http:
        response = await http.get("/v1/models/x%0a2026-01-01 INFO deploy: forged%1b[2J")
        await http.post(COMPLETIONS, json=PROMPT | {"a\r\nb": 1})
    first, second, _ = text.getvalue().splitlines()
    assert (
        f" INFO deploy.api.http.access_log: {response.headers['x-request-id']}: GET /v1/models/x\\n" in first
    )
    assert first.isprintable()
    assert second.endswith("ignored fields: a\\r\\nb, wombat")
