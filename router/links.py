"""Links: whether the shards of the newest epoch are linked, and how long they have been away."""

import logging
import time
from collections.abc import Callable

from experts.fabric import Aborted, Membership, PeerLost, StepFailed
from router.dispatch import Dispatcher

logger = logging.getLogger(__name__)

LINK_TIMEOUT_S = 10.0
"""To open the links of a new epoch: its shards listen already when it is published."""


class Links:
    """Lives in the engine's thread."""

    def __init__(self, dispatcher: Dispatcher, *, on_lost: Callable[[StepFailed], None]) -> None:
        self.linked = False
        self._dispatcher = dispatcher
        self._on_lost = on_lost
        self._unlinked_at = time.monotonic()

    @property
    def away_s(self) -> float:
        """Seconds since they were lost, or since the start."""
        return 0.0 if self.linked else time.monotonic() - self._unlinked_at

    def open(self, members: Membership) -> None:
        """Enter an epoch; between steps only."""
        try:
            self._dispatcher.adopt(members, timeout_s=LINK_TIMEOUT_S)
        except PeerLost as loss:
            self.lose(loss)
            return
        except Aborted:
            return
        self.linked = True
        logger.info("epoch %d: %d shards linked", members.epoch, len(members.shards))

    def renew(self) -> None:
        """The same epoch again: links that still owe an answer are made anew."""
        self.open(self._dispatcher.members)

    def lose(self, loss: StepFailed) -> None:
        """Shards failed: no step is tried before the next epoch."""
        logger.warning("%s", loss)
        if self.linked:
            self._unlinked_at = time.monotonic()
        self.linked = False
        self._on_lost(loss)
