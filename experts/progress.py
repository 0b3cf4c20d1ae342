"""Progress of long work, shown as a bar on a terminal and as lines in a log elsewhere."""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from tqdm import tqdm

logger = logging.getLogger(__name__)

BAR_AFTER_S = 1.0
LINE_S = 5.0
"""The seconds between two lines, and before the first: work that is over by then leaves no trace in a log."""

T = TypeVar("T")


@dataclass(frozen=True)
class Progress:
    """The state of a long work: `done` of `total` pieces.

    work: what the pieces are, such as `experts`. now: the next piece, "" where it has no name worth showing.
    done_bytes, total_bytes: the same for bytes, 0 of 0 where they say nothing. seconds: since the work began.
    """

    done: int
    total: int
    work: str
    now: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return ", ".join(filter(None, [f"{self.work} {self.done}/{self.total}", self.amount]))

    @property
    def amount(self) -> str:
        """Return how many gigabytes are done, and how many a second; "" for a work that is no tenth of one."""
        if self.total_bytes < 10**8:
            return ""
        rate = self.done_bytes / self.seconds if self.seconds else 0.0
        return f"{self.done_bytes / 1e9:.1f} of {self.total_bytes / 1e9:.1f} GB, {rate / 1e9:.1f} GB/s"


Report = Callable[[Progress], None]
"""A function that is called with the Progress before every piece of a work, and at its end."""


def silent(progress: Progress) -> None:
    """A Report that shows nothing."""


@dataclass(frozen=True)
class Took:
    """The time that a finished work took, and the bytes that it was about, 0 where they say nothing."""

    seconds: float
    num_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s"


def took() -> dict[str, Took]:
    """Return what each work of this process took when it was last done, by `name: work`, in the order of their first ends.

    Only what was reported through show() is known.
    """
    return dict(_took)


_took: dict[str, Took] = {}


def show(name: str) -> Report:
    """Return a Report to a person, as a bar or as lines, which took() hears, too. name: whose work it is, such as `shard 1`."""
    return _Timed(name, _Bar(name) if sys.stderr.isatty() else _Lines(name))


def each(pieces: Sequence[T], work: str, report: Report, *, sizes: Sequence[int] = ()) -> Iterator[T]:
    """Yield the pieces one after the other, and report before each of them and at the end.

    sizes: the bytes of each piece, where they tell how far the work is.
    """
    began, total_bytes, done_bytes = time.monotonic(), sum(sizes), 0

    def progress(done: int) -> Progress:
        seconds = time.monotonic() - began if sizes else 0.0
        return Progress(
            done, len(pieces), work, done_bytes=done_bytes, total_bytes=total_bytes, seconds=seconds
        )

    for done, piece in enumerate(pieces):
        report(progress(done))
        yield piece
        done_bytes += sizes[done] if sizes else 0
    report(progress(len(pieces)))


class _Timed:
    """A Report that notes when each work ends how long it took, and passes everything on."""

    def __init__(self, name: str, onward: Report) -> None:
        self._name = name
        self._onward = onward
        self._began: dict[str, float] = {}

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        began = self._began.setdefault(progress.work, now)
        self._onward(progress)
        if progress.done == progress.total:
            _took[f"{self._name}: {progress.work}"] = Took(now - began, progress.total_bytes)
            del self._began[progress.work]


class _Bar:
    """A Report of one work after the other, each with a bar of its own that is gone at its end."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._bar: tqdm | None = None

    def __call__(self, progress: Progress) -> None:
        from tqdm import tqdm  # most processes have no terminal

        if self._bar is None:
            self._bar = tqdm(
                total=progress.total, desc=f"{self._name}: {progress.work}", delay=BAR_AFTER_S, leave=False
            )
        self._bar.set_postfix_str(", ".join(filter(None, [progress.amount, progress.now])), refresh=False)
        self._bar.update(progress.done - self._bar.n)
        if progress.done == progress.total:
            self._bar.close()
            self._bar = None


class _Lines:
    """A Report of one work after the other as a line of the log now and then."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._line_at: float | None = None
        self._told = False

    def __call__(self, progress: Progress) -> None:
        now = time.monotonic()
        if self._line_at is None:
            self._line_at = now + LINE_S
        over = progress.done == progress.total
        if now >= self._line_at or (over and self._told):
            logger.info("%s: %s", self._name, ", ".join(filter(None, [str(progress), progress.now])))
            self._told, self._line_at = True, now + LINE_S
        if over:
            self._told, self._line_at = False, None
