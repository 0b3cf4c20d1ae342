"""GrammarPool: child processes that compile clients' grammars, and a cache of what they found.

A thread of its own keeps each child: it starts it, waits for its answers, and kills and replaces it when a grammar
takes too long or has killed it.
"""

import asyncio
import json
import logging
import math
import os
import queue
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from deploy.api.grammars import child
from deploy.api.grammars.wanted import UserGrammars, WantedGrammar
from deploy.paths import ROOT
from router.request import QueueFull

logger = logging.getLogger(__name__)

NUM_CHILDREN = 2
MAX_WAITING = 64
DEADLINE_S = 2.0
"""Seconds that a grammar may take to compile; ordinary ones take milliseconds."""

START_S = 60.0
WAIT_S = 10.0
"""Seconds that a grammar waits for the others before its client is told to come again, and in Retry-After."""

REFUSED_S = 60.0
"""Seconds for which a refusal is remembered: it may have been the machine that was slow."""

CACHE_BYTES = 16 * 2**20


class GrammarRefused(ValueError):
    """A client's grammar cannot be used; str() is a sentence for the client."""


@dataclass(order=True)
class _Job:
    """A grammar to compile, and who waits for it.

    weight, number: the lightest is compiled first, and of equals the one that came first.
    result: the grammar, or GrammarRefused. expires: of what is known, on the monotonic clock; None for never.
    """

    weight: float
    number: int
    order: str = field(compare=False)
    result: "Future[str]" = field(default_factory=Future, compare=False)
    num_waiting: int = field(default=0, compare=False)
    expires: float | None = field(default=None, compare=False)
    num_bytes: int = field(default=0, compare=False)


_Queue = queue.PriorityQueue[_Job]
_END = _Job(math.inf, 0, "")


class GrammarPool:
    """Compiles grammars for one event loop at a time. The children start with the first grammar."""

    def __init__(self, tokenizer_json: str, *, vocab_size: int, served: UserGrammars) -> None:
        """Prepare, but do not start, the children.

        tokenizer_json: as Tokenizer.to_json writes it, or child.BYTES. vocab_size: rows of the model's head. served:
        which grammars clients may ask for.
        """
        self._served: UserGrammars = served
        self._vocabulary = {"tokenizer": tokenizer_json, "vocab_size": vocab_size}
        self._jobs: _Queue = queue.PriorityQueue()
        self._num_jobs = 0
        self._known: OrderedDict[str, _Job] = OrderedDict()
        self._known_bytes = 0
        self._keepers: list[threading.Thread] = []
        self._close = weakref.finalize(self, _end, self._jobs)

    @property
    def started(self) -> bool:
        """Whether a child was ever needed."""
        return bool(self._keepers)

    @property
    def known_bytes(self) -> int:
        """Bytes of the grammars that are remembered, about."""
        return self._known_bytes

    async def compile(self, wanted: WantedGrammar) -> str:
        """Return the grammar, which some process of ours has compiled within limits.

        Raises GrammarRefused, and QueueFull if too many wait already or it waited too long itself.
        """
        job = self._job(*await asyncio.to_thread(self._order, wanted))
        job.num_waiting += 1
        try:
            async with asyncio.timeout(WAIT_S):
                return await asyncio.shield(asyncio.wrap_future(job.result))
        except TimeoutError as error:
            raise QueueFull(WAIT_S) from error
        finally:
            job.num_waiting -= 1
            if not job.num_waiting and job.result.cancel():  # nobody waits for it, and no child has begun
                self._forget(job)

    def close(self) -> None:
        """End the children."""
        self._close()

    def _order(self, wanted: WantedGrammar) -> tuple[str, int]:
        """Return what a child is sent, and its weight."""
        try:
            wanted.check(self._served)
        except ValueError as error:
            raise GrammarRefused(str(error)) from error
        order = wanted.to_json()
        return order, wanted.weight(order)

    def _job(self, order: str, weight: int) -> _Job:
        """Return the job of a grammar: a new one, or one that other clients wait for or have waited for."""
        job = self._known.get(order)
        if job is not None and (job.expires is None or time.monotonic() < job.expires):
            self._known.move_to_end(order)
            return job
        if job is not None:
            self._forget(job)
        if self._jobs.qsize() >= MAX_WAITING:
            raise QueueFull(WAIT_S)
        self._num_jobs += 1
        job = _Job(weight, self._num_jobs, order, num_bytes=2 * len(order))  # the grammar is about as long
        self._known[order] = job
        self._known_bytes += job.num_bytes
        while self._known_bytes > CACHE_BYTES and len(self._known) > 1:
            self._forget(next(iter(self._known.values())))
        self._start()
        self._jobs.put(job)
        return job

    def _forget(self, job: _Job) -> None:
        if self._known.get(job.order) is job:
            del self._known[job.order]
            self._known_bytes -= job.num_bytes

    def _start(self) -> None:
        while len(self._keepers) < NUM_CHILDREN:
            keeper = threading.Thread(
                target=_keep, args=(self._jobs, self._vocabulary), name="grammars", daemon=True
            )
            keeper.start()
            self._keepers.append(keeper)


def _end(jobs: _Queue) -> None:
    for _ in range(NUM_CHILDREN):
        jobs.put(_END)


def _keep(jobs: _Queue, vocabulary: dict[str, Any]) -> None:
    """Keep one child at work until _END comes, as a thread.

    The child ends with this thread, whose death is what the kernel tells it.
    """
    ours: _Child | None = None
    while (job := jobs.get()) is not _END:
        if not job.result.set_running_or_notify_cancel():
            continue
        try:
            ours = ours or _Child(vocabulary)
            try:
                grammar = ours.compile(job.order)
            except _ChildKilled:  # once may be anybody's doing, and is not held against the grammar
                ours.end()
                ours = _Child(vocabulary)
                grammar = ours.compile(job.order)
        except GrammarRefused as refusal:
            job.expires = time.monotonic() + REFUSED_S
            job.result.set_exception(refusal)
        except Exception as error:  # of ours: the client gets a 500, the next grammar a new child
            logger.exception("a child process for grammars failed")
            job.expires = 0.0
            job.result.set_exception(error)
            if ours is not None:
                ours.spent = True
        else:
            job.result.set_result(grammar)
        del job  # with its grammar
        if ours is not None and ours.spent:
            ours.end()
            ours = None
    if ours is not None:
        ours.end()


class _ChildKilled(Exception):
    """Somebody else killed a child process: an operator, or the kernel that ran out of memory."""


class _Child:
    """One child process and the pipes to it."""

    def __init__(self, vocabulary: dict[str, Any]) -> None:
        """Start it and wait until it can compile. Raises RuntimeError if it cannot."""
        self.spent = False
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", child.__name__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # Modules are ours, not the working directory's. One arena, because each reserves 64 MiB of what the
            # memory's limit counts.
            env=os.environ
            | {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "MALLOC_ARENA_MAX": "1", "RUST_BACKTRACE": "0"},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)
        try:
            self._ask(json.dumps(vocabulary), within_s=START_S)
        except (TimeoutError, EOFError, OSError) as error:
            self.end()
            raise RuntimeError(
                f"a child process for grammars did not start within {START_S:.0f} s"
            ) from error

    def compile(self, order: str) -> str:
        """Return the grammar of a WantedGrammar's JSON. Raises GrammarRefused, and _ChildKilled; `spent` if the child is gone."""
        try:
            answer = self._ask(order, within_s=DEADLINE_S)
        except TimeoutError as error:
            self.spent = True
            raise GrammarRefused(f"it takes more than {DEADLINE_S:.0f} s to compile") from error
        except (EOFError, OSError) as error:
            self.spent = True
            code = self._process.wait(START_S)
            if code == -signal.SIGKILL:  # what a grammar does ends in another signal, or in an answer
                raise _ChildKilled("a child process for grammars was killed") from error
            logger.warning("a client's grammar of %d bytes ended its child process: %d", len(order), code)
            raise GrammarRefused("it needs too much memory or nests too deeply to compile") from error
        if refused := answer.get("refused"):
            raise GrammarRefused(refused)
        return answer["grammar"]

    def end(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.wait(START_S)
        self._stdin.close()
        self._stdout.close()

    def _ask(self, message: str, *, within_s: float) -> dict[str, Any]:
        """Send a message and return the answer. Raises TimeoutError, and EOFError or OSError if the process is gone."""
        ends = time.monotonic() + within_s
        body = message.encode()
        self._write(struct.pack("<I", len(body)) + body, ends)
        (length,) = struct.unpack("<I", self._read(4, ends))
        return json.loads(self._read(length, ends))

    def _write(self, message: bytes, ends: float) -> None:
        pipe, rest = self._stdin.fileno(), memoryview(message)
        while rest:
            _wait(pipe, select.POLLOUT, ends)
            rest = rest[os.write(pipe, rest) :]

    def _read(self, length: int, ends: float) -> bytes:
        pipe, parts = self._stdout.fileno(), b""
        while len(parts) < length:
            _wait(pipe, select.POLLIN, ends)
            part = os.read(pipe, length - len(parts))
            if not part:
                raise EOFError
            parts += part
        return parts


def _wait(pipe: int, event: int, ends: float) -> None:
    """Wait until a pipe can be read or written, or is closed. Raises TimeoutError when `ends` has come."""
    poll = select.poll()  # select takes no descriptors above 1023
    poll.register(pipe, event)
    if not poll.poll(max(0.0, ends - time.monotonic()) * 1000):
        raise TimeoutError
