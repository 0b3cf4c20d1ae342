"""Outboxes: the outputs that each ingress has yet to fetch, and whether it still fetches them."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from deploy.engine.messages import MAX_BATCH_BYTES, Part, cut
from router.request import RequestOutput

logger = logging.getLogger(__name__)

TICK_S = 1.0
MAX_SILENT_TICKS = 10


@dataclass(eq=False)
class _Outbox:
    """The outputs that wait for one ingress, in the order in which they came, each with its bytes.

    changed: set when outputs have come, or the outbox was closed.
    """

    waiting: deque[tuple[RequestOutput | Part, int]] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_closed: bool = False
    requests: set[str] = field(default_factory=set)
    silent_ticks: int = 0


class Outboxes:
    """The outboxes of all ingresses, by name.

    They live in one event loop. on_abandoned: called with the id of every unfinished request whose ingress
    has gone.
    """

    def __init__(self, *, on_abandoned: Callable[[str], None]) -> None:
        self._on_abandoned = on_abandoned
        self._boxes: dict[str, _Outbox] = {}
        self._owner: dict[str, str] = {}  # ingress, by request

    def __contains__(self, ingress: str) -> bool:
        return ingress in self._boxes

    def __len__(self) -> int:
        """Return the number of requests whose last output has not come."""
        return len(self._owner)

    def open(self, ingress: str) -> None:
        """Start collecting outputs for an ingress."""
        self._boxes[ingress] = _Outbox()

    def close(self, ingress: str) -> None:
        """Drop an ingress: its requests are abandoned, and `next` returns None. Unknown names are ignored."""
        box = self._boxes.pop(ingress, None)
        if box is None:
            return
        box.is_closed = True
        box.changed.set()
        for request_id in box.requests:
            del self._owner[request_id]
            self._on_abandoned(request_id)

    def renew(self, ingress: str) -> None:
        """Note that the ingress lives. Unknown names are ignored."""
        if box := self._boxes.get(ingress):
            box.silent_ticks = 0

    async def close_silent(self) -> None:
        """Close, until cancelled, the outboxes of ingresses that have not renewed for MAX_SILENT_TICKS.

        Serve does not tell when the process that reads a stream dies. Silence is counted in ticks and not
        timed, so that an ingress does not count as silent while our own process stood still.
        """
        while True:
            await asyncio.sleep(TICK_S)
            for ingress, box in list(self._boxes.items()):
                box.silent_ticks += 1
                if box.silent_ticks > MAX_SILENT_TICKS:
                    logger.warning(
                        "%s has been silent for %.0f s: its %d requests are cancelled",
                        *(ingress, MAX_SILENT_TICKS * TICK_S, len(box.requests)),
                    )
                    self.close(ingress)

    def add(self, ingress: str, request_id: str) -> None:
        """Send the outputs of this request to that ingress, until one has a finish."""
        self._owner[request_id] = ingress
        self._boxes[ingress].requests.add(request_id)

    def remove(self, request_id: str) -> bool:
        """Stop sending the outputs of a request anywhere. Returns False if they went nowhere already."""
        ingress = self._owner.pop(request_id, None)
        if ingress is None:
            return False
        self._boxes[ingress].requests.remove(request_id)
        return True

    def put(self, outputs: Sequence[RequestOutput]) -> None:
        """Sort a step's outputs into the outboxes. Those of requests that were removed are dropped."""
        for output in outputs:
            if ingress := self._owner.get(output.id):
                box = self._boxes[ingress]
                box.waiting.extend(cut(output))
                box.changed.set()
                if output.finish:
                    self.remove(output.id)

    async def next(self, ingress: str) -> list[RequestOutput | Part] | None:
        """Wait for outputs and return all that fit one message, None once the ingress is dropped.

        A slow ingress so gets fewer, larger batches.
        """
        box = self._boxes.get(ingress)
        if box is None:
            return None
        while not box.waiting and not box.is_closed:
            box.changed.clear()
            await box.changed.wait()
        if box.is_closed:
            return None
        batch: list[RequestOutput | Part] = []
        room = MAX_BATCH_BYTES
        while box.waiting and (not batch or box.waiting[0][1] <= room):
            item, size = box.waiting.popleft()
            batch.append(item)
            room -= size
        return batch
