"""A child process that compiles grammars, one after the other, and may die of one: `python -m` this module.

Messages are JSON after their length, four bytes: first {"tokenizer", "vocab_size"}, answered by {}; then
WantedGrammars, each answered by {"grammar"} or {"refused": a sentence}. It ends when its input does, or its parent.
"""

import ctypes
import json
import os
import resource
import signal
import struct
import sys
import threading
from typing import Any, BinaryIO

from deploy.api.grammars.wanted import WantedGrammar
from router.sampling.grammar import Grammars, sentence

MEMORY = 96 * 2**20
"""Bytes by which a grammar may make the process grow."""

STACK = 2**20
"""Bytes of the stack: an eighth of that which the router's threads have, half of that of llguidance's."""

BYTES = "byte"
"""The vocabulary of tests, sent in place of a tokenizer's JSON: a token for each byte."""

_PR_SET_PDEATHSIG = 1
_TOO_MUCH = "it needs too much memory to compile"


def send(pipe: BinaryIO, message: dict[str, Any]) -> None:
    """Write a message to the other end."""
    body = json.dumps(message).encode()
    pipe.write(struct.pack("<I", len(body)) + body)
    pipe.flush()


def main() -> None:
    """Serve until the input ends. argv[1]: the parent's process id."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return  # it died before it could take us with it
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is for the parent, which closes our input
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that prints may write between the answers
    threading.stack_size(STACK)
    serving = threading.Thread(target=_serve, args=(sys.stdin.buffer, answers), daemon=True)
    serving.start()
    serving.join()


def _serve(orders: BinaryIO, answers: BinaryIO) -> None:
    first = _receive(orders)
    if first is None:
        return
    grammars = Grammars(first["tokenizer"], vocab_size=first["vocab_size"], eos=frozenset())
    send(answers, {})
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what Rust says of a panic is the client's doing
    while (order := _receive(orders)) is not None:
        _allow_memory(MEMORY)
        send(answers, _judge(grammars, WantedGrammar(**order)))


def _judge(grammars: Grammars, wanted: WantedGrammar) -> dict[str, str]:
    try:
        made = wanted.make()
        grammars.guide(made)
    except MemoryError:
        return {"refused": _TOO_MUCH}
    except ValueError as error:
        return {"refused": sentence(str(error).removeprefix("grammar: "))}
    except BaseException:  # noqa: BLE001 Rust's panics are no Exceptions; whatever it is, the grammar is why
        return {"refused": "it is too complex"}
    return {"grammar": made}


def _allow_memory(more: int) -> None:
    """Limit the address space to what it is now and so many bytes more."""
    pages = int(open("/proc/self/statm").read().split()[0])  # noqa: SIM115 closed by the reference count
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, hard))


def _receive(pipe: BinaryIO) -> dict[str, Any] | None:
    """Return the next message, None at the end."""
    head = pipe.read(4)
    if len(head) < 4:
        return None
    return json.loads(pipe.read(*struct.unpack("<I", head)))


if __name__ == "__main__":
    main()
