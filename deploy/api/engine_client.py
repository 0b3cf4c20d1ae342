"""EngineClient: the engine as the ingress sees it, wherever it runs."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from deploy.api.http.errors import ApiError
from router.request import QueueFull, Request, RequestOutput

RETRY_AFTER_S = 5.0
"""Seconds after which a client may try again where no router serves (the Retry-After of a 503)."""


class RouterLost(Exception):
    """No router answers: it died, and its requests with it, or it has not started. str() says which."""


class Stopping(Exception):
    """The server is to stop: it finishes the requests that it has and takes no new ones."""


class Unread(Exception):
    """So many outputs of a request were not read that it was cancelled. The argument is how many may be."""


MAX_QUEUED = 16
"""Outputs of the requests of one body that wait together; the others wait where they are counted."""


@dataclass(frozen=True)
class Readiness:
    """The state of the engine: whether it would generate a token now.

    reason: a sentence why not, else "". detail: plain JSON for people: epoch, shards, seconds since the last
    step.
    """

    ready: bool
    reason: str = ""
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """The limits of the engine.

    max_model_len: tokens of a prompt and its answer together. max_requests: running and waiting ones
    together.
    """

    max_model_len: int
    max_requests: int


class EngineClient(Protocol):
    """A client of the engine, with what the ingress needs."""

    def limits(self) -> Limits:
        """Return the limits of the engine that serves, or served last.

        Raises RouterLost before one was reached.
        """
        ...

    def check_room(self) -> None:
        """Raise QueueFull if this client alone has filled the engine, or RouterLost.

        It costs next to nothing, so the ingress calls it before anything else. Where it does not raise, the
        engine may refuse all the same.
        """
        ...

    def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Submit a request and yield its outputs, the last of which has `finish`.

        Closing the generator, or cancelling the task that reads it, cancels the request. Raises QueueFull,
        RouterLost, Stopping, Unread if its outputs are made faster than they are read for too long, and
        ValueError for a request that can never run.
        """
        ...

    async def ready(self) -> Readiness:
        """Return whether the engine would generate a token now. Raises RouterLost."""
        ...


async def generate_all(
    client: EngineClient, requests: Sequence[Request]
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Yield the outputs of several requests as they come, each with its request's place in `requests`.

    Closing it, or an error in one of them, cancels them all. Raises ApiError for what the engine refuses or
    loses.
    """
    if len(requests) == 1:  # the usual case needs neither tasks nor a queue
        async with aclosing(_outputs(client, requests[0])) as outputs:
            async for output in outputs:
                yield 0, output
        return
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception] = asyncio.Queue(MAX_QUEUED)
    readers = [asyncio.create_task(_read(client, request, i, queue)) for i, request in enumerate(requests)]
    unfinished = len(readers)
    try:
        while unfinished:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            unfinished -= item[1].finish is not None
            yield item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


async def _read(
    client: EngineClient,
    request: Request,
    index: int,
    queue: asyncio.Queue[tuple[int, RequestOutput] | Exception],
) -> None:
    """Put one request's outputs, or its error, into the queue."""
    try:
        async with aclosing(_outputs(client, request)) as outputs:
            async for output in outputs:
                await queue.put((index, output))
    except Exception as error:  # noqa: BLE001 the reader of the queue raises it again
        await queue.put(error)


async def _outputs(client: EngineClient, request: Request) -> AsyncGenerator[RequestOutput, None]:
    """Yield one request's outputs, the last one with a finish. Raises the engine's errors as ApiError."""
    async with aclosing(client.generate(request)) as outputs:
        try:
            async for output in outputs:
                if output.at_fault:
                    raise ApiError(400, f"The request cannot be finished: {output.error}")
                if output.finish in ("error", "cancelled"):
                    raise _unavailable(f"The request was not finished: {output.error or output.finish}")
                yield output
                if output.finish is not None:
                    return
        except QueueFull as error:
            raise too_many(error) from error
        except RouterLost as error:
            raise no_router(error) from error
        except Stopping as error:
            raise _unavailable("The server is stopping and takes no more requests.") from error
        except Unread as error:
            message = (
                f"The answer was not read: more than {error.args[0]} outputs waited, so it was cancelled."
            )
            raise ApiError(408, message) from error
        except ValueError as error:
            raise ApiError(400, str(error)) from error
    raise AssertionError(f"{request.id}: the engine's outputs ended without a finish")


def too_many(error: QueueFull) -> ApiError:
    """Return the answer to a request for which the engine has no room (429)."""
    message = "Too many requests are waiting; try again later."
    return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=error.retry_after_s)


def no_router(error: RouterLost) -> ApiError:
    """Return the answer to a request while no router serves (503)."""
    return _unavailable(f"No router is serving; if one died, the requests it held were lost with it: {error}")


def _unavailable(message: str) -> ApiError:
    """Return a 503: nothing is wrong with the request, which may be sent again."""
    return ApiError(503, message, retry_after_s=RETRY_AFTER_S)
