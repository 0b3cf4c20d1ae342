"""CachedReadiness: the engine's readiness, asked for once a second however many want to know."""

import asyncio
import contextvars

from deploy.api.engine_client import EngineClient, Readiness, RouterLost

READY_TIMEOUT_S = 5.0

FRESH_S = 1.0
"""Seconds for which an answer counts."""


class CachedReadiness:
    """The readiness of an engine, no older than FRESH_S when it is returned. Lives in one event loop."""

    def __init__(self, client: EngineClient) -> None:
        self._client = client
        self._asking: asyncio.Task[Readiness] | None = None
        self._answered_at = 0.0

    async def get(self) -> Readiness:
        """Return the readiness. All who come before the engine has answered wait for one answer."""
        asking, loop = self._asking, asyncio.get_running_loop()
        if asking is None or (asking.done() and loop.time() - self._answered_at >= FRESH_S):
            # Outside of the request's context, with which Serve would cancel it for the others, too.
            asking = self._asking = loop.create_task(self._ask(), context=contextvars.Context())
        return await asyncio.shield(asking)

    async def _ask(self) -> Readiness:
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                return await self._client.ready()
        except RouterLost as error:
            return Readiness(ready=False, reason=str(error))
        except TimeoutError:
            return Readiness(ready=False, reason=f"the router did not answer within {READY_TIMEOUT_S} s")
        finally:
            self._answered_at = asyncio.get_running_loop().time()
