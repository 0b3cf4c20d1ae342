"""HandleClient: the ingress's EngineClient, which reaches the router through a Serve handle."""

import asyncio
import contextvars
import logging
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from deploy.api.engine_client import Limits, Readiness, RouterLost, Stopping, Unread
from deploy.engine.messages import MAX_REQUEST_BYTES, Joiner, Part, request_bytes
from deploy.fleet.spec import Refusal
from deploy.within import within
from router.request import QueueFull, Request, RequestOutput

logger = logging.getLogger(__name__)

RECONNECT_S = 0.2
MAX_RETRY_AFTER_S = 60.0
RENEW_S = 2.0
"""Seconds between two renewals. A router drops an ingress that is silent for several times as long."""

T = TypeVar("T")


@dataclass(eq=False)
class _Attachment:
    """The connection of this ingress to one router.

    name: the ingress's name for this attachment. lost: done once this router holds nothing of ours any more.
    inbox: outputs that wait to be read, by request; one that has max_unread when more come is told to
    on_unread, and gets no more. held: the requests that the router has taken and not
    ended. queued_s: how long the last request to run had waited in the router's queue.
    """

    name: str
    lost: asyncio.Future[RouterLost]
    max_unread: int
    on_unread: Callable[[str], object]
    inbox: dict[str, asyncio.Queue[RequestOutput | RouterLost | Unread]] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    joiner: Joiner = field(default_factory=Joiner)
    queued_s: float = 0.0

    def deliver(self, batch: Sequence[RequestOutput | Part]) -> None:
        """Put a batch into the inboxes.

        A batch counts as one: however much came while our own process stood still, its readers had no time.
        """
        seen: set[str] = set()
        for item in batch:
            if isinstance(item, Part) and item.output.id not in self.inbox:
                continue  # nobody reads it any more
            output = self.joiner.take(item)
            if output is None:
                continue
            if inbox := self.inbox.get(output.id):
                if output.id in seen or output.finish or inbox.qsize() < self.max_unread:
                    seen.add(output.id)
                    inbox.put_nowait(output)
                else:
                    inbox.put_nowait(Unread(self.max_unread))
                    del self.inbox[output.id]
                    self.held.discard(output.id)
                    self.on_unread(output.id)
            if output.finish:
                self.held.discard(output.id)
            self.queued_s = output.queued_s or self.queued_s

    def full(self) -> QueueFull:
        """Return the refusal that asks the client to come again when half of the queue has gone."""
        return QueueFull(max(1.0, min(self.queued_s / 2, MAX_RETRY_AFTER_S)))

    def lose(self, error: RouterLost) -> None:
        self.lost.set_result(error)
        for inbox in self.inbox.values():
            inbox.put_nowait(error)


class HandleClient:
    """An EngineClient with one stream of outputs for all requests of this ingress.

    Lives in one event loop.
    """

    def __init__(self, router: DeploymentHandle, *, max_unread: int) -> None:
        """max_unread: outputs of one request that may wait to be read; one more, and it is cancelled."""
        self._router = router
        self._max_unread = max_unread
        self._stream = router.options(stream=True)
        self._attachment: _Attachment | None = None
        self._why_not = RouterLost("the router has not started yet")
        self._limits: Limits | None = None
        self._listener: asyncio.Task[None] | None = None
        self._withdrawing: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Attach to the router now, and again whenever it is replaced."""
        self._listener = asyncio.get_running_loop().create_task(self._listen())

    async def stop(self) -> None:
        """Detach from the router.

        It cancels what it still holds for us, and need not wait for us when it stops.
        """
        assert self._listener is not None
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)

    def limits(self) -> Limits:
        """Return the engine's limits as EngineClient says."""
        if self._limits is None:
            raise self._why_not
        return self._limits

    def check_room(self) -> None:
        """Raise QueueFull or RouterLost as EngineClient says."""
        attachment = self._attached()
        if self._limits is not None and len(attachment.held) >= self._limits.max_requests:
            raise attachment.full()

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Yield a request's outputs as EngineClient says."""
        attachment = self._attached()
        if (size := request_bytes(request)) > MAX_REQUEST_BYTES:  # Serve would fail without a sentence
            raise ValueError(
                f"the request has about {size} bytes, most of them of its {len(request.prompt)} prompt tokens; "
                f"the router takes at most {MAX_REQUEST_BYTES}"
            )
        inbox = attachment.inbox[request.id] = asyncio.Queue()
        submitting = _detached_task(self._submit(attachment, request))
        held = True  # by the router, as far as we know
        try:
            await asyncio.shield(submitting)
            attachment.held.add(request.id)
            while held:
                output = await inbox.get()
                if isinstance(output, Unread):
                    held = False
                if isinstance(output, Unread | RouterLost):
                    raise output
                held = output.finish is None
                yield output
        finally:
            attachment.inbox.pop(request.id, None)
            attachment.joiner.forget(request.id)
            attachment.held.discard(request.id)
            if held and not _refused(submitting):
                withdrawing = _detached_task(self._withdraw(attachment, request.id, submitting))
                self._withdrawing.add(withdrawing)
                withdrawing.add_done_callback(self._withdrawing.discard)

    async def ready(self) -> Readiness:
        """Return the router's readiness as EngineClient says."""
        attachment = self._attached()
        return Readiness(**await _answer_or_lost(self._router.readiness.remote(), attachment))

    def _attached(self) -> _Attachment:
        if self._attachment is None:
            raise self._why_not
        return self._attachment

    async def _submit(self, attachment: _Attachment, request: Request) -> None:
        refusal: Refusal | None = await _answer_or_lost(
            self._router.submit.remote(attachment.name, request), attachment
        )
        if refusal is None:
            return
        if refusal.kind == "full":
            raise attachment.full()
        if refusal.kind == "draining":
            raise Stopping(refusal.why)
        raise RouterLost(refusal.why) if refusal.kind == "lost" else ValueError(refusal.why)

    async def _withdraw(
        self, attachment: _Attachment, request_id: str, submitting: "asyncio.Task[None]"
    ) -> None:
        """Cancel a request that nobody reads, after its submit has returned.

        A cancel that overtook the submit would find nothing.
        """
        await asyncio.wait([submitting])
        if not _refused(submitting) and not attachment.lost.done():
            self._router.cancel.remote([request_id])

    async def _listen(self) -> None:
        while True:
            name = f"ingress-{uuid.uuid4().hex[:8]}"  # a router cancels what it held for an old name
            batches: Any = self._stream.attach.remote(name)
            try:
                await self._take(name, batches)
                why = "the router was stopped, or did not hear from this ingress"
            except asyncio.CancelledError:
                batches.cancel()
                raise
            except Exception as error:  # noqa: BLE001 however it ended, we attach again
                why = f"the router died ({type(error).__name__})"
                logger.warning("%s: %s", why, str(error).partition("\n")[0])
            self._lose(why)
            await asyncio.sleep(RECONNECT_S)

    async def _take(self, name: str, batches: Any) -> None:
        """Deliver outputs until the router ends the stream.

        Its first item is Limits, all others are batches.
        """
        self._limits = await anext(batches)
        self._attachment = _Attachment(
            name,
            asyncio.get_running_loop().create_future(),
            self._max_unread,
            on_unread=lambda request_id: self._router.cancel.remote([request_id]),
        )
        renewing = asyncio.create_task(self._renew(name))
        try:
            async for batch in batches:
                self._attachment.deliver(batch)
        finally:
            renewing.cancel()

    async def _renew(self, name: str) -> None:
        """Tell the router regularly that we live, which the stream does not show.

        If it is gone, the stream will end.
        """
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                await within(RENEW_S, self._router.renew.remote(name))
            except (TimeoutError, RayError, RayServeException) as error:
                logger.warning("the router did not hear that we live: %s", type(error).__name__)

    def _lose(self, why: str) -> None:
        """End every request that the router held with RouterLost, because their KV cache is gone with it."""
        attachment, self._attachment = self._attachment, None
        self._why_not = RouterLost(why)
        if attachment is not None:
            attachment.lose(self._why_not)


async def _answer_or_lost(response: Awaitable[T], attachment: _Attachment) -> T:
    """Return what the router answers.

    Raises RouterLost if it dies first: Serve would wait for another one for ever.
    """
    answer = asyncio.ensure_future(response)
    try:
        await asyncio.wait({answer, attachment.lost}, return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise attachment.lost.result()
        return answer.result()
    except RayTaskError:  # the router's code raised, so this is our bug
        raise
    except (RayError, RayServeException) as error:
        raise RouterLost(f"the router died ({type(error).__name__})") from error
    finally:
        answer.cancel()


def _detached_task(call: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
    """Start a task outside the context of the HTTP request that it is for.

    When a request is cancelled, Serve cancels the calls that were made in its context.
    """
    return asyncio.create_task(call, context=contextvars.Context())


def _refused(submitting: "asyncio.Task[None]") -> bool:
    return submitting.done() and not submitting.cancelled() and submitting.exception() is not None
