"""The access log: gives every request an id, and writes a line to the log when it ends."""

import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.api.http.quota import current_use
from deploy.logs import request_id
from router.request import RequestOutput

logger = logging.getLogger(__name__)

PROBES = frozenset({"/health", "/ready"})
"""Paths for which no line is written, because load balancers ask them all the time."""

MAX_ID = 200
"""The most characters that the log keeps of an id that a client sent."""


@dataclass
class Entry:
    """The notes on a request while it is served, for its line in the log.

    key: the name of its API key. completion_tokens: the tokens that the engine generated so far.
    """

    key: str | None = None
    completion_id: str | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


_entry: ContextVar[Entry] = ContextVar("entry")


def current_entry() -> Entry:
    """Return the entry of the request that the current task serves."""
    return _entry.get()


async def note_outputs(
    outputs: AsyncGenerator[tuple[int, RequestOutput], None], *, completion_id: str, prompt_tokens: int
) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Pass outputs on, and count their tokens for the current request: in its entry, and for its key.

    Closing it closes them.
    """
    noted, use = current_entry(), current_use.get()
    noted.completion_id, noted.prompt_tokens, noted.completion_tokens = completion_id, prompt_tokens, 0
    async with aclosing(outputs):
        async for index, output in outputs:
            noted.completion_tokens += len(output.tokens)
            if use is not None:
                use.spend(len(output.tokens))
            yield index, output


def route_path(scope: Scope) -> str:
    """Return the path of a request without the prefix that Serve's route_prefix adds."""
    return scope["path"].removeprefix(scope.get("root_path", ""))


class RequestLog:
    """The outermost middleware, which gives a request its id and logs its end.

    lines: whether to write lines at all. Ray Serve's proxy sends an x-request-id with every request and adds
    it to the response itself. So only an id that is made here is added to the response here, or clients would
    read it twice.
    """

    def __init__(self, app: ASGIApp, *, lines: bool) -> None:
        self._app = app
        self._lines = lines

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id")
        request_id.set(given[:MAX_ID] if given else f"req_{uuid4().hex}")
        _entry.set(noted := Entry())
        began = time.monotonic()
        status: int | None = None
        complete = False

        async def send_with_id(message: Message) -> None:
            nonlocal status, complete
            if message["type"] == "http.response.start":
                status = message["status"]
                if not given:
                    message["headers"] = [*message["headers"], (b"x-request-id", request_id.get().encode())]
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body", False)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            if self._lines and route_path(scope) not in PROBES:
                fields = {
                    "method": scope["method"],
                    "path": scope["path"],
                    "status": status,
                    "seconds": round(time.monotonic() - began, 4),
                    "complete": complete,
                    **asdict(noted),
                }
                logger.info("%s", as_text(fields), extra={"fields": fields})


def as_text(fields: dict[str, Any]) -> str:
    """Return the fields of a line as a text for people."""
    parts = [f"{fields['method']} {fields['path']} {fields['status'] or '-'} in {fields['seconds']:.3f} s"]
    if not fields["complete"]:
        parts.append("not finished")
    if fields["key"] is not None:
        parts.append(f"key {fields['key']}")
    if fields["completion_id"] is not None:
        parts.append(fields["completion_id"])
        parts.append(f"{fields['prompt_tokens']} + {fields['completion_tokens']} tokens")
    return ", ".join(parts)
