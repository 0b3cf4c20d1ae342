"""A client that leaves costs nothing: whatever it waited for, the engine hears of it at once."""

import asyncio
import json
from typing import Any

import pytest
from fastapi import FastAPI

from tests.support.fake_engine import CHAT, HELLO, FakeEngine, ingress_over, says

pytestmark = pytest.mark.anyio


class Leaver:
    """An ASGI client that sends one body and leaves when `leave` is set; `receive` then fails if `rudely`."""

    def __init__(self, body: dict[str, Any], *, rudely: bool) -> None:
        self._rudely = rudely
        self._unsent = [json.dumps(body).encode()]
        self.leave = asyncio.Event()
        self.received = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if self._unsent:
            return {"type": "http.request", "body": self._unsent.pop(), "more_body": False}
        await self.leave.wait()
        if self._rudely:
            raise ConnectionError("gone")
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.received.set()

    def post(self, app: FastAPI, path: str) -> "asyncio.Task[None]":
        scope = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
        return asyncio.ensure_future(_run(app, scope, self))


async def _run(app: FastAPI, scope: dict[str, Any], client: Leaver) -> None:
    await app(scope, client.receive, client.send)


@pytest.mark.parametrize("how", ["http.disconnect", "receive fails", "cancelled"])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
async def test_a_client_that_leaves_frees_its_slots_at_once(stream: bool, n: int, how: str) -> None:
    engine = FakeEngine([*says("some text", finish=None), None])
    client = Leaver(HELLO | {"stream": stream, "n": n}, rudely=how == "receive fails")
    task = client.post(ingress_over(engine), CHAT)
    async with asyncio.timeout(5):
        if stream:
            await client.received.wait()
        while len(engine.running) < n:
            await asyncio.sleep(0)
        if how == "cancelled":
            task.cancel()
        client.leave.set()
        await asyncio.wait([task])
    assert not engine.running
    assert task.cancelled() == (how == "cancelled")
