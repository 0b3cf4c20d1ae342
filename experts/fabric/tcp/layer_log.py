"""LayerLog: how many layers a shard has answered, of how many rows, and how long that took."""

import threading
from typing import NamedTuple


class Layers(NamedTuple):
    """Since the start. seconds: from a layer that has been read to its answer on the host, which waits for the device."""

    num_layers: int = 0
    num_rows: int = 0
    seconds: float = 0.0


class LayerLog:
    """Any thread may add and read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._num_layers = self._num_rows = 0
        self._seconds = 0.0

    def add(self, num_rows: int, seconds: float) -> None:
        with self._lock:
            self._num_layers += 1
            self._num_rows += num_rows
            self._seconds += seconds

    def total(self) -> Layers:
        with self._lock:
            return Layers(self._num_layers, self._num_rows, self._seconds)
