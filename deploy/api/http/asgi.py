"""Two ASGI parts around the routes: a guard of every request, and a stream of server-sent events."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

from fastapi import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.api.http.errors import INTERNAL_ERROR, ApiError
from deploy.api.http.pacing import ClientStalled

logger = logging.getLogger(__name__)


MAX_BODIES = 16
"""So many of the longest bodies may be on their way at a time, all requests together."""


class RequestGuard:
    """Middleware around every request.

    It bounds a body in bytes and seconds, cancels a request whose client leaves, and answers our bugs with
    500.
    """

    def __init__(self, app: ASGIApp, *, max_body_bytes: int, body_timeout_s: float) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._arriving = 0  # bytes of all bodies that are not complete

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._serve(scope, receive, watched_send)
        except ClientStalled as error:
            logger.info("%s %s is given up: %s", scope["method"], scope["path"], error)
            raise  # so that the server closes the connection
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if not started:
                await INTERNAL_ERROR.response()(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            body = await self._read_body(receive)
        except ApiError as error:
            # What is left of the body would be taken for the next request.
            await error.response({"connection": "close"})(scope, receive, send)
            return
        if body is not None:
            await _until_disconnect(self._app(scope, _replay(body), send), receive)

    async def _read_body(self, receive: Receive) -> bytes | None:
        """Return the whole body, or None if the client left. Raises ApiError 408, 413 or 503."""
        body = bytearray()
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    body += piece
                    self._arriving += len(piece)
                    if len(body) > self._max_body_bytes:
                        raise ApiError(413, f"The body is longer than {self._max_body_bytes} bytes.")
                    if not message.get("more_body", False):
                        return bytes(body)
                    if self._arriving > MAX_BODIES * self._max_body_bytes:
                        raise ApiError(503, "Too many bodies are on their way.", retry_after_s=1)
        except TimeoutError:
            why = f"The body did not come within {self._body_timeout_s:g} s (api.body_timeout_s)."
            raise ApiError(408, why) from None
        finally:
            self._arriving -= len(body)


def _replay(body: bytes) -> Receive:
    """Return a `receive` that gives the body once.

    It never tells of a disconnect: the guard watches for that.
    """
    unread = [body]

    async def receive() -> Message:
        if not unread:
            await asyncio.get_running_loop().create_future()  # waits until it is cancelled
        return {"type": "http.request", "body": unread.pop(), "more_body": False}

    return receive


async def _until_disconnect(work: Awaitable[None], receive: Receive) -> None:
    """Await the work; cancel it when the client leaves or we are cancelled (Ray Serve does the latter)."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.wait((worker, watcher))
    if not worker.cancelled():
        worker.result()


async def _disconnected(receive: Receive) -> None:
    """Return when the client has left."""
    try:
        while (await receive())["type"] != "http.disconnect":
            pass
    except Exception as error:  # noqa: BLE001 Ray Serve raises some error of its own for a client that left
        logger.info("the connection is lost: %s", type(error).__name__)


WAITING_S = 5.0
"""Seconds of silence after which a stream sends a comment.

Proxies cut a connection that is silent for a minute.
"""

_WAITING = b": waiting\n\n"


class EventStream(Response):
    """A response that sends events as they are made, and comments while none are.

    The status is sent with the first event or comment, so that an error in the first WAITING_S is still
    answered with its own status; a later one is sent as the last event. When cancelled, it closes the
    generator of the events at once. event_of: makes the last event of an error.
    """

    media_type = "text/event-stream"

    def __init__(
        self, events: AsyncGenerator[bytes, None], *, event_of: Callable[[Exception], bytes]
    ) -> None:
        # The length is unknown; proxies must neither keep nor collect events.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._event_of = event_of
        self._num_sent = 0
        self._one_sends = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        waiting = asyncio.create_task(self._comment(send))
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    await self._put(event, send)
        except ClientStalled:
            raise
        except Exception as error:
            if not self._num_sent:
                raise
            await self._put(self._event_of(error), send)
        finally:
            waiting.cancel()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _comment(self, send: Send) -> None:
        """Fill every silence with comments, which clients skip, until cancelled."""
        while True:
            before = self._num_sent
            await asyncio.sleep(WAITING_S)
            if self._num_sent == before:
                await self._put(_WAITING, send)

    async def _put(self, event: bytes, send: Send) -> None:
        self._num_sent += 1
        first = self._num_sent == 1
        async with self._one_sends:
            if first:
                await send(
                    {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                )
            await send({"type": "http.response.body", "body": event, "more_body": True})
