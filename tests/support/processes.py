"""Processes for tests and benchmarks, each at the other end of a pipe."""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

START_S = 60.0
END_S = 1.0


@contextmanager
def processes(target: Callable[..., None], arguments: Sequence[tuple]) -> Iterator[list[Any]]:
    """Run target(*values, pipe) in a process for each tuple of values; yields what each sent first.

    In the end their pipes are closed, after which they should end; those that do not are killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experts.fabric.tcp.shard_end"])  # torch, once for all of them
    with ExitStack() as stack:
        pipes: list[Connection] = []
        for values in arguments:
            ours, theirs = context.Pipe()
            with theirs:
                process = context.Process(target=target, args=(*values, theirs))
                process.start()
            stack.callback(_end, process, ours)
            pipes.append(ours)
        yield [_first_of(pipe) for pipe in pipes]


def _first_of(pipe: Connection) -> Any:
    if not pipe.poll(START_S):
        raise TimeoutError(f"a process that was started has sent nothing for {START_S:.0f} s")
    return pipe.recv()


def _end(process: BaseProcess, pipe: Connection) -> None:
    pipe.close()
    if process.pid is not None and process.is_alive():
        with suppress(ProcessLookupError):  # it has just ended
            os.kill(process.pid, signal.SIGCONT)  # a test may have stopped it
    process.join(END_S)
    process.kill()
    process.join(10)
