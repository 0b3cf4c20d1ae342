"""The progress of the shards' loading, shown on the terminal of `sparkmoe serve`."""

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Self

from deploy.cli.cluster import print_status
from deploy.cli.readiness import loading_of
from experts.progress import LINE_S, Progress


class Loading:
    """The display of the shards' progress.

    On a terminal it is one line, which is rewritten and cleared at the end of this context; elsewhere a line
    now and then.
    """

    def __init__(self) -> None:
        self._on_terminal = sys.stderr.isatty()
        self._written = False
        self._told: dict[int, tuple[str, int]] = {}
        self._line_at: float | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()

    def show(self, shards: Sequence[Mapping[str, Any]]) -> None:
        """Show how far the shards are that load. shards: as in the detail of /ready."""
        loading = {shard["rank"]: progress for shard in shards if (progress := loading_of(shard))}
        if not loading:
            self.clear()
        elif self._on_terminal:
            self._write(_sentence(loading)[: shutil.get_terminal_size().columns - 1])
        else:
            self._tell(loading)

    def clear(self) -> None:
        """Erase the line on the terminal, so that another one can be printed."""
        if self._written:
            self._write("")
            self._written = False

    def _write(self, line: str) -> None:
        sys.stderr.write(f"\r{line}\x1b[K")
        sys.stderr.flush()
        self._written = True

    def _tell(self, loading: Mapping[int, Progress]) -> None:
        """Print a line if a shard has come a tenth further.

        None is printed in the first LINE_S, nor sooner than LINE_S after another.
        """
        now = time.monotonic()
        if self._line_at is None:
            self._line_at = now + LINE_S
        tenths = {rank: (one.work, 10 * one.done // one.total) for rank, one in loading.items()}
        if now >= self._line_at and tenths != self._told:
            print_status(_sentence(loading))
            self._told, self._line_at = tenths, now + LINE_S


def _sentence(loading: Mapping[int, Progress]) -> str:
    return "loading: " + "; ".join(f"shard {rank}: {progress}" for rank, progress in loading.items())
