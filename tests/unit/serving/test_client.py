"""HandleClient over a Serve handle that does as it is told."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import RayServeException

from deploy.api.engine_client import Limits, Readiness, RouterLost, Unread
from deploy.engine.client import HandleClient
from deploy.engine.messages import Part
from deploy.fleet.spec import Refusal
from router.request import QueueFull, Request, RequestOutput, SamplingParams, TokenLogprob
from tests.support.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio

REQUEST = Request("r1", (1, 2), SamplingParams())
MAX_UNREAD = 20
LIMITS = Limits(max_model_len=100, max_requests=4)

A_WHILE_S = 60.0
"""Seconds of virtual time, which pass at once."""


http_request: ContextVar[str] = ContextVar("http_request")


class Stream:
    """A stand-in for what `attach` returns: Limits, then what is put into it, until an Exception or None ends
    it."""

    def __init__(self) -> None:
        self.items: asyncio.Queue[
            list[RequestOutput] | list[Part] | list[Part | RequestOutput] | Limits | Exception | None
        ] = asyncio.Queue()
        self.items.put_nowait(LIMITS)

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Any:
        item = await self.items.get()
        if item is None:
            raise StopAsyncIteration
        if isinstance(item, Exception):
            raise item
        return item

    def cancel(self) -> None:
        self.items.put_nowait(None)


class Method:
    def __init__(self, call: Callable[..., Any]) -> None:
        self.remote = call


class Handle:
    """A stand-in for Serve's handle.

    answers: by method, what its next call gives; a method that is not there never answers.
    """

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.calls: list[tuple[str, Any]] = []
        self.answers: dict[str, asyncio.Future[Any]] = {}
        self.on_behalf_of: dict[str, str | None] = {}

    def options(self, *, stream: bool) -> "Handle":
        return self

    def __getattr__(self, name: str) -> Method:
        return Method(lambda *args: self._call(name, args))

    def will_answer(self, method: str, value: Any) -> None:
        future = self.answers.setdefault(method, asyncio.get_running_loop().create_future())
        if isinstance(value, Exception):
            future.set_exception(value)
        else:
            future.set_result(value)

    def called(self, method: str) -> list[Any]:
        return [args for name, args in self.calls if name == method]

    def _call(self, name: str, args: Any) -> Any:
        self.calls.append((name, args))
        self.on_behalf_of[name] = http_request.get(None)
        if name == "attach":
            self.streams.append(Stream())
            return self.streams[-1]
        # Shielded: a caller that gives up does not take the answer from the next.
        return asyncio.shield(self.answers.setdefault(name, asyncio.get_running_loop().create_future()))


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": VirtualTimeLoop}


@pytest.fixture
async def handle() -> Handle:
    return Handle()


@pytest.fixture
async def client(handle: Handle) -> AsyncIterator[HandleClient]:
    """Yield a client that is attached to a router."""
    handle_: Any = handle
    client = HandleClient(handle_, max_unread=MAX_UNREAD)
    client.start()
    await settle()
    yield client
    await client.stop()


async def settle() -> None:
    """Let every task come to where it waits."""
    for _ in range(20):
        await asyncio.sleep(0)


async def collect(client: HandleClient) -> list[RequestOutput]:
    async with asyncio.timeout(5):
        return [output async for output in client.generate(REQUEST)]


async def test_outputs_come_until_one_has_a_finish(client: HandleClient, handle: Handle) -> None:
    handle.will_answer("submit", None)
    task = asyncio.create_task(collect(client))
    await settle()
    outputs = [RequestOutput("r1", "a"), RequestOutput("r1", "b", finish="stop")]
    handle.streams[0].items.put_nowait([outputs[0], RequestOutput("r2", "another's")])
    handle.streams[0].items.put_nowait([outputs[1]])
    assert await task == outputs
    assert client.limits() == LIMITS
    assert not handle.called("cancel")


async def test_an_output_in_parts_comes_as_one(client: HandleClient, handle: Handle) -> None:
    handle.will_answer("submit", None)
    task = asyncio.create_task(collect(client))
    await settle()
    scores = tuple(TokenLogprob(n, -0.5) for n in range(6))
    whole = RequestOutput("r1", "a", (1,), logprobs=scores, prompt_logprobs=scores, finish="stop")
    parts = [Part(RequestOutput("r1", prompt_logprobs=scores[:4])), Part(RequestOutput("gone"))]
    handle.streams[0].items.put_nowait(parts)
    parts = [
        Part(RequestOutput("r1", prompt_logprobs=scores[4:])),
        Part(RequestOutput("r1", logprobs=scores)),
    ]
    handle.streams[0].items.put_nowait([*parts, replace(whole, logprobs=(), prompt_logprobs=())])
    assert await task == [whole]


async def test_outputs_that_nobody_reads_end_the_request(client: HandleClient, handle: Handle) -> None:
    handle.will_answer("submit", None)
    outputs = client.generate(REQUEST)
    reading = asyncio.create_task(anext(outputs))
    await settle()
    many = [RequestOutput("r1", "a")] * (MAX_UNREAD + 5)
    handle.streams[0].items.put_nowait(many)  # all at once: its reader had no time to read
    await reading
    await settle()
    assert not handle.called("cancel")
    handle.streams[0].items.put_nowait(many[:1])
    await settle()
    assert handle.called("cancel") == [(["r1"],)]
    for _ in many[1:]:
        await anext(outputs)
    with pytest.raises(Unread):
        await anext(outputs)
    await settle()
    assert len(handle.called("cancel")) == 1


async def test_a_request_that_serve_would_not_carry_is_refused_with_both_numbers(
    client: HandleClient, handle: Handle
) -> None:
    huge = Request("r1", (1,) * 700_000, SamplingParams())
    with pytest.raises(ValueError, match=r"about 420\d+ bytes, .* 700000 prompt tokens; .* at most 3145728"):
        await anext(client.generate(huge))
    assert not handle.called("submit")


async def test_whoever_has_filled_the_router_knows_it_without_asking(
    client: HandleClient, handle: Handle
) -> None:
    """And says when half of the queue will have gone: half of what the last request to run had waited."""
    handle.will_answer("submit", None)
    requests = [Request(f"r{n}", (1,), SamplingParams()) for n in range(LIMITS.max_requests)]
    tasks = [asyncio.create_task(anext(client.generate(request))) for request in requests]
    await settle()
    with pytest.raises(QueueFull) as refused:
        client.check_room()
    assert refused.value.retry_after_s == 1
    handle.streams[0].items.put_nowait([RequestOutput("r0", "a", queued_s=9.0), RequestOutput("r0", "b")])
    await settle()
    with pytest.raises(QueueFull) as refused:
        client.check_room()
    assert refused.value.retry_after_s == 4.5
    handle.streams[0].items.put_nowait([RequestOutput("r3", "a", finish="stop")])
    await settle()
    client.check_room()
    for task in tasks:
        task.cancel()


async def test_calls_of_a_request_are_not_its_children(client: HandleClient, handle: Handle) -> None:
    """Serve cancels the calls that a cancelled HTTP request has made, which it knows by a context variable."""
    http_request.set("r1")
    handle.will_answer("submit", None)
    task = asyncio.create_task(collect(client))
    await settle()
    task.cancel()
    await settle()
    assert handle.called("cancel") == [(["r1"],)]
    assert handle.on_behalf_of["submit"] is None
    assert handle.on_behalf_of["cancel"] is None


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (Refusal("full", ""), QueueFull),
        (Refusal("invalid", "too long"), ValueError),
        (Refusal("lost", "replaced"), RouterLost),
        (ActorDiedError(), RouterLost),
        (RayServeException("the deployment is gone"), RouterLost),
    ],
    ids=["full", "invalid", "lost", "dead", "deleted"],
)
async def test_a_refused_request_is_over(
    client: HandleClient, handle: Handle, refusal: Any, expected: type[Exception]
) -> None:
    handle.will_answer("submit", refusal)
    with pytest.raises(expected):
        await collect(client)
    await settle()
    assert not handle.called("cancel"), "there is nothing to cancel"


@pytest.mark.parametrize("end", [ActorDiedError(), None], ids=["died", "stopped"])
async def test_a_submit_that_is_never_answered_ends_with_the_router(
    client: HandleClient, handle: Handle, end: Exception | None
) -> None:
    """Serve's handle waits for a router to come, however long that takes."""
    task = asyncio.create_task(collect(client))
    await settle()
    assert handle.called("submit")
    handle.streams[0].items.put_nowait(end)
    with pytest.raises(RouterLost, match="router"):
        await task
    with pytest.raises(RouterLost):
        await collect(client)
    await settle()
    assert not handle.called("cancel")


async def test_requests_in_flight_are_lost_with_the_router(client: HandleClient, handle: Handle) -> None:
    handle.will_answer("submit", None)
    task = asyncio.create_task(collect(client))
    await settle()
    handle.streams[0].items.put_nowait(ActorDiedError())
    with pytest.raises(RouterLost, match=r"died \(ActorDiedError\)"):
        await task
    await asyncio.sleep(A_WHILE_S)
    assert len(handle.streams) == 2, "it attaches again"
    assert handle.called("attach")[0] != handle.called("attach")[1]


async def test_a_cancel_waits_for_its_submit(client: HandleClient, handle: Handle) -> None:
    """Or it might overtake it, and the request would decode on for nobody."""
    task = asyncio.create_task(collect(client))
    await settle()
    task.cancel()
    await settle()
    assert task.done()
    assert not handle.called("cancel")
    handle.will_answer("submit", None)
    await settle()
    assert handle.called("cancel") == [(["r1"],)]


async def test_readiness_is_the_routers_or_the_router_is_lost(client: HandleClient, handle: Handle) -> None:
    handle.will_answer("readiness", {"ready": True, "reason": "", "detail": {"epoch": 1}})
    assert await client.ready() == Readiness(ready=True, detail={"epoch": 1})
    handle.answers.clear()
    handle.will_answer("readiness", ActorDiedError())
    with pytest.raises(RouterLost):
        await client.ready()


async def test_nothing_is_known_of_a_router_that_has_not_come() -> None:
    handle: Any = Handle()
    client = HandleClient(handle, max_unread=MAX_UNREAD)
    with pytest.raises(RouterLost, match="not started"):
        client.limits()
    with pytest.raises(RouterLost, match="not started"):
        await client.ready()
    with pytest.raises(RouterLost, match="not started"):
        await collect(client)


async def test_it_renews_by_name_for_as_long_as_it_is_attached(handle: Handle) -> None:
    handle_: Any = handle
    client = HandleClient(handle_, max_unread=MAX_UNREAD)
    client.start()
    await asyncio.sleep(A_WHILE_S)  # the first renewal is not answered: the next ones come all the same
    await client.stop()
    renewed = handle.called("renew")
    assert set(renewed) == set(handle.called("attach"))
    await asyncio.sleep(A_WHILE_S)
    assert handle.called("renew") == renewed
