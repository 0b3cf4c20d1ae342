"""LayerLog counts the layers that a shard has answered, their rows, and the seconds that they took."""

import threading
from typing import NamedTuple


class Layers(NamedTuple):
    """Totals since the start.

    seconds: from a layer that has been read to its answer on the host, device included.
    """

    num_layers: int = 0
    num_rows: int = 0
    seconds: float = 0.0


class LayerLog:
    """The running totals of a shard; any thread may add to them and read them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_layers = self._num_rows = 0
        self._seconds = 0.0

    def add(self, num_rows: int, seconds: float) -> None:
        """Count one answered layer."""
        with self._lock:
            self._num_layers += 1
            self._num_rows += num_rows
            self._seconds += seconds

    def total(self) -> Layers:
        """Return the totals since the start."""
        with self._lock:
            return Layers(self._num_layers, self._num_rows, self._seconds)
