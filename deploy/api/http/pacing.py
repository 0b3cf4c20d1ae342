"""Pacing: an answer leaves in small pieces, no faster than its client reads them, and not for ever.

Serve's proxy in Python takes whatever is sent, keeps what its client has not read, and carries it in messages
that may not be larger than 4 MiB. So what it keeps is asked for, and bounded here.
"""

import asyncio
import logging
from collections.abc import Callable

from starlette.types import Message, Send

logger = logging.getLogger(__name__)

PIECE_BYTES = 256 * 1024
"""The most bytes of a body in one ASGI message, and the most that may wait for the client before the next one."""

STALL_S = 60.0
"""Seconds in which a client must take something, else it is given up."""

POLL_S = 0.02

UnreadOf = Callable[[Send], Callable[[], int] | None]
"""A function that tells how many bytes a server's `send` keeps that were not passed on yet.

None for a `send` that waits for its client itself, as uvicorn's does.
"""


class ClientStalled(ConnectionError):
    """The client reads nothing any more; nothing can be sent to it."""


def paced(send: Send, *, unread_of: UnreadOf | None) -> Send:
    """Return a `send` that cuts bodies into pieces and waits for the client. Raises ClientStalled."""
    unread = unread_of(send) if unread_of is not None else None

    async def send_piece(message: Message) -> None:
        try:
            async with asyncio.timeout(STALL_S):
                await send(message)
        except TimeoutError:
            raise ClientStalled(f"the client has read nothing for {STALL_S:.0f} s") from None
        if unread is not None:
            await _until_read(unread)

    async def send_paced(message: Message) -> None:
        body = message.get("body", b"")
        for begin in range(0, len(body) - PIECE_BYTES, PIECE_BYTES):
            piece = body[begin : begin + PIECE_BYTES]
            await send_piece({"type": message["type"], "body": piece, "more_body": True})
        if len(body) > PIECE_BYTES:
            message = {**message, "body": body[(len(body) - 1) // PIECE_BYTES * PIECE_BYTES :]}
        await send_piece(message)

    return send_paced


async def _until_read(unread: Callable[[], int]) -> None:
    """Return when little is left to be read. Raises ClientStalled if it does not get less for STALL_S."""
    loop = asyncio.get_running_loop()
    least, ends = unread(), loop.time() + STALL_S
    pause_s = 0.0  # the first look is only behind whoever passes the bytes on
    while (left := unread()) > PIECE_BYTES:
        if left < least:
            least, ends = left, loop.time() + STALL_S
        if loop.time() > ends:
            raise ClientStalled(f"the client has read nothing for {STALL_S:.0f} s")
        await asyncio.sleep(pause_s)
        pause_s = POLL_S
