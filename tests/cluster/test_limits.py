"""Large answers, large requests, half-sent bodies and slow readers, through Serve's proxy and its gRPC.

What is right in process fails here if a message is larger than what Serve carries, and takes others along.
"""

import json
import socket
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.support.server import Server, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
ASKED: dict[str, Any] = {"model": "demo", "temperature": 0, "ignore_eos": True}


def post(server: Server, path: str, **fields: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=ASKED | fields, timeout=240)


def test_a_chat_with_the_logprobs_of_thousands_of_tokens(server: Server) -> None:
    messages = [{"role": "user", "content": "Write a function."}]
    answer = post(server, CHAT, messages=messages, max_tokens=3500, logprobs=True, top_logprobs=20)
    assert answer.status_code == 200
    assert len(answer.content) > 4 * 2**20
    [choice] = answer.json()["choices"]
    assert [len(token["top_logprobs"]) for token in choice["logprobs"]["content"]] == [20] * 3500


def test_the_logprobs_of_a_long_prompt(server: Server) -> None:
    prompt = [5 + place % 4000 for place in range(3900)]
    answer = post(server, COMPLETIONS, prompt=prompt, max_tokens=1, prompt_logprobs=20)
    assert answer.status_code == 200
    assert len(answer.content) > 4 * 2**20
    first, *scores = answer.json()["choices"][0]["prompt_logprobs"]
    assert first is None
    assert [next(iter(score)) for score in scores] == [str(token) for token in prompt[1:]]


@pytest.mark.parametrize(
    ("path", "fields", "says"),
    [
        ("/tokenize", {"prompt": "a b c " * 250_000, "return_token_strs": True}, "but the text has 1500000"),
        (CHAT, {"messages": [{"role": "user", "content": "a b c " * 250_000}]}, "but the text has 15000"),
        (COMPLETIONS, {"prompt": "x", "stop": ["y" * 400_000] * 16}, "at most 1024 characters"),
        (COMPLETIONS, {"prompt": [7] * 500_000}, "at most 262144 are read"),
    ],
    ids=["tokenize", "chat", "stops", "tokens"],
)
def test_what_is_too_large_is_refused_with_the_bound(
    server: Server, path: str, fields: dict[str, Any], says: str
) -> None:
    answer = post(server, path, **fields)
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


def connected(server: Server, path: str, body: bytes, *, length: int | None = None) -> socket.socket:
    url = urlsplit(server.url)
    assert url.hostname
    one = socket.socket()
    one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    one.settimeout(60)
    one.connect((url.hostname, url.port))
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: {length or len(body)}\r\n\r\n"
    one.sendall(head.encode() + body)
    return one


def test_a_body_that_does_not_come_is_answered_and_the_connection_closed(server: Server) -> None:
    halves = [connected(server, CHAT, b'{"model"', length=100) for _ in range(20)]
    for half in halves:
        with half, half.makefile("rb") as answer:
            assert b" 408 " in answer.readline()
            assert b"api.body_timeout_s" in answer.read()


def test_a_stream_that_nobody_reads_ends_and_others_go_on(server: Server) -> None:
    """Its client has a few MiB in sockets and servers; the rest is not made."""
    messages = [{"role": "user", "content": "Write a function."}]
    scored = {"messages": messages, "logprobs": True, "top_logprobs": 20}
    body = json.dumps(ASKED | scored | {"n": 8, "max_tokens": 3900, "stream": True}).encode()
    steps = server.detail()["num_steps"]
    with connected(server, CHAT, body):
        eventually(lambda: server.detail()["num_running"] == 8, what="they run", timeout_s=60)
        assert post(server, COMPLETIONS, prompt="y", max_tokens=8).status_code == 200
        eventually(lambda: server.detail()["num_running"] == 0, what="they are cancelled", timeout_s=240)
        assert server.detail()["num_steps"] - steps < 3000, "they ran to their end"
    assert post(server, COMPLETIONS, prompt="y", max_tokens=8).status_code == 200
