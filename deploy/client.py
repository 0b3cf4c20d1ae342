"""The ingress's way to the engine: an EngineClient over a Serve handle."""

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from ray.exceptions import RayActorError
from ray.serve.handle import DeploymentHandle

from deploy.engine_client import Readiness, RouterLost
from deploy.spec import Refusal
from router.request import QueueFull, Request, RequestOutput

logger = logging.getLogger(__name__)

RECONNECT_S = 0.2


class HandleClient:
    """One stream of outputs for all requests of this ingress. Lives in one event loop."""

    def __init__(self, router: DeploymentHandle) -> None:
        self._router = router
        self._stream = router.options(stream=True)
        self._name = ""
        self._inbox: dict[str, asyncio.Queue[RequestOutput | RouterLost]] = {}
        self._lost = RouterLost("the router has not started yet")
        self._attached = False
        self._listener: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Attach to the router, and again whenever it is replaced."""
        self._listener = asyncio.get_running_loop().create_task(self._listen())

    async def stop(self) -> None:
        """Detach: the router cancels what it still holds for us, and need not wait for us when it is stopped."""
        assert self._listener is not None
        self._listener.cancel()
        await asyncio.gather(self._listener, return_exceptions=True)

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """See EngineClient."""
        if not self._attached:
            raise self._lost
        inbox = self._inbox[request.id] = asyncio.Queue()
        finished = False
        try:
            await self._submit(request)
            while not finished:
                output = await inbox.get()
                if isinstance(output, RouterLost):
                    finished = True
                    raise output
                finished = output.finish is not None
                yield output
        finally:
            self._inbox.pop(request.id, None)
            if not finished and self._attached:
                self._router.cancel.remote([request.id])

    async def ready(self) -> Readiness:
        """See EngineClient."""
        if not self._attached:
            raise self._lost
        return Readiness(**await self._router.readiness.remote())

    async def _submit(self, request: Request) -> None:
        try:
            refusal: Refusal | None = await self._router.submit.remote(self._name, request)
        except RayActorError as error:
            raise RouterLost("the router died") from error
        if refusal is None:
            return
        if refusal.kind == "full":
            raise QueueFull(refusal.retry_after_s)
        raise RouterLost(refusal.why) if refusal.kind == "lost" else ValueError(refusal.why)

    async def _listen(self) -> None:
        while True:
            self._name = (
                f"ingress-{uuid.uuid4().hex[:8]}"  # a router cancels what it held for the stream before
            )
            batches: Any = self._stream.attach.remote(self._name)
            try:
                async for batch in batches:
                    self._attached = True
                    for output in batch:
                        if inbox := self._inbox.get(output.id):
                            inbox.put_nowait(output)
                why = "the router was stopped"
            except asyncio.CancelledError:
                batches.cancel()
                raise
            except Exception as error:  # noqa: BLE001 however it ended, we attach again
                why = f"the router died ({type(error).__name__})"
                logger.warning("%s: %s", why, str(error).splitlines()[0] if str(error) else "")
            self._lose(why)
            await asyncio.sleep(RECONNECT_S)

    def _lose(self, why: str) -> None:
        """Every request that the router held is over: its KV cache is gone."""
        self._attached = False
        self._lost = RouterLost(why)
        for inbox in self._inbox.values():
            inbox.put_nowait(self._lost)
