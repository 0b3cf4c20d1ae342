"""Clients that send or read slowly, or not at all, over real sockets: none is kept for ever, or at a price."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn
from starlette.types import ASGIApp, Message

from deploy.api.config import ApiConfig
from deploy.api.http import asgi, pacing
from deploy.api.http.pacing import PIECE_BYTES, ClientStalled, paced
from deploy.engine.client import HandleClient
from router.request import RequestOutput
from tests.support.fake_engine import CHAT, HELLO, FakeEngine, http_client, ingress_over, says
from tests.unit.serving.test_client import Handle, settle

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def listening(app: ASGIApp) -> AsyncIterator[Callable[[], Awaitable[socket.socket]]]:
    """uvicorn around the app; yields a function that opens a connection whose own buffer is small."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    opened: list[socket.socket] = []

    async def connect() -> socket.socket:
        one = socket.socket()
        opened.append(one)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.setblocking(False)
        await asyncio.get_running_loop().sock_connect(one, address)
        return one

    try:
        yield connect
    finally:
        for one in opened:
            one.close()
        server.should_exit = server.force_exit = True
        await serving


async def send(one: socket.socket, body: bytes, *, length: int | None = None) -> None:
    head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-length: {length or len(body)}\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(one, head.encode() + body)


async def read_to_the_end(one: socket.socket) -> bytes:
    """What comes until the server closes the connection."""
    found = b""
    async with asyncio.timeout(20):
        while piece := await asyncio.get_running_loop().sock_recv(one, 2**16):
            found += piece
    return found


async def test_a_body_that_does_not_come_is_waited_for_a_while() -> None:
    app = ingress_over(FakeEngine([]), config=ApiConfig(body_timeout_s=0.2))
    async with listening(app) as connect:
        waiting = [await connect() for _ in range(30)]
        for one in waiting:
            await send(one, b'{"model"', length=100)
        for one in waiting:
            answer = await read_to_the_end(one)
            assert answer.startswith(b"HTTP/1.1 408 ")
            assert b"within 0.2 s (api.body_timeout_s)" in answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"


async def test_bodies_that_are_on_their_way_share_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asgi, "MAX_BODIES", 2)
    app = ingress_over(FakeEngine(says("Hello")), config=ApiConfig(max_body_mib=1))
    async with listening(app) as connect:
        waiting = [await connect() for _ in range(4)]
        for one in waiting:
            await send(one, b"x" * 700_000, length=800_000)
        # The first answer is a refusal; whose it is depends on whose bytes came last.
        answers = [asyncio.create_task(read_to_the_end(one)) for one in waiting]
        done, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        assert done.pop().result().startswith(b"HTTP/1.1 503 ")
        for one in waiting:
            one.close()
        for answer in answers:
            answer.cancel()
        await asyncio.wait(answers)
    async with http_client(app) as http:  # whoever has gone counts no more
        assert (await http.post(CHAT, json=HELLO | {"user": "x" * 900_000})).status_code == 200


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_that_nobody_reads_is_cancelled(n: int) -> None:
    handle: Any = Handle()
    client = HandleClient(handle, max_unread=50)
    client.start()
    await settle()
    handle.will_answer("submit", None)
    async with listening(ingress_over(client)) as connect:
        one = await connect()
        await send(one, json.dumps(HELLO | {"stream": True, "n": n}).encode())
        while len(handle.called("submit")) < n:
            await asyncio.sleep(0.01)
        ids = [request.id for _, request in handle.called("submit")]
        async with asyncio.timeout(20):
            while not handle.called("cancel"):
                handle.streams[0].items.put_nowait([RequestOutput(id_, "x" * 1000, (7,)) for id_ in ids])
                await asyncio.sleep(0)
        assert handle.called("cancel")[0][0][0] in ids
        *_, last = (await read_to_the_end(one)).split(b"data: ")
        assert b"The answer was not read: more than 50 outputs waited" in last
    await client.stop()
    assert {id_ for [[id_]] in handle.called("cancel")} == {*ids}


async def test_an_answer_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "STALL_S", 0.2)
    ended = asyncio.Event()
    inner = ingress_over(FakeEngine(says("x" * 10_000_000)))

    async def app(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(ClientStalled):
            await inner(scope, receive, send)
        ended.set()

    async with listening(app) as connect:
        one = await connect()
        await send(one, json.dumps(HELLO).encode())
        await asyncio.wait_for(ended.wait(), 20)


class Keeper:
    """A server that keeps what it is sent until it is read, as Serve's proxy in Python does."""

    def __init__(self) -> None:
        self.kept: list[Message] = []
        self.most = 0

    async def send(self, message: Message) -> None:
        self.kept.append(message)
        self.most = max(self.most, self.unread())

    def unread(self) -> int:
        return sum(len(message.get("body", b"")) for message in self.kept)

    async def read(self) -> list[Message]:
        await asyncio.sleep(0)
        read, self.kept = self.kept, []
        return read


async def test_a_server_that_keeps_everything_is_given_little_at_a_time() -> None:
    keeper = Keeper()
    sending = paced(keeper.send, unread_of=lambda send: keeper.unread)
    body = bytes(range(256)) * 20_000
    task = asyncio.ensure_future(sending({"type": "http.response.body", "body": body, "more_body": False}))
    read: list[Message] = []
    while not task.done() or keeper.kept:
        read += await keeper.read()
    assert b"".join(message["body"] for message in read) == body
    assert [message["more_body"] for message in read] == [True] * (len(read) - 1) + [False]
    assert keeper.most <= 2 * PIECE_BYTES


async def test_a_server_whose_client_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pacing, "STALL_S", 0.1)
    keeper = Keeper()
    sending = paced(keeper.send, unread_of=lambda send: keeper.unread)
    for _ in range(PIECE_BYTES // 1000):
        await sending({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
    with pytest.raises(ClientStalled, match="read nothing for"):
        await sending({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
    assert keeper.most <= 2 * PIECE_BYTES
