"""Flags and stop words: read with acquire, written with release, waited for without the GIL."""

import re
import threading

import pytest

from experts.fabric.mailbox import words
from experts.fabric.mailbox.words import StopWord


@pytest.fixture
def flag() -> StopWord:
    """Any word of 64 bits in a cache line of its own."""
    return StopWord(pinned=False)


@pytest.fixture
def stop() -> StopWord:
    return StopWord(pinned=False)


@pytest.mark.parametrize(
    ("function", "operation"),
    [
        (words.read, r"load atomic i64, .* acquire"),
        (words.write, r"store atomic i64 .* release"),
        (words.wait, r"load atomic i64, .* acquire"),
    ],
    ids=["read", "write", "wait"],
)
def test_llvm_gets_atomic_operations(function: object, operation: str) -> None:
    """Plain ones pass every test on x86, and fail on the Arm cores of a Spark."""
    [code] = function.inspect_llvm().values()  # type: ignore[attr-defined]
    assert re.search(operation, code)


def test_a_wait_returns_once_the_flag_is_there(flag: StopWord, stop: StopWord) -> None:
    found: list[bool] = []
    waiter = threading.Thread(target=lambda: found.append(words.wait(flag.address, stop.address, 5)))
    waiter.start()
    words.write(flag.address, 4)
    assert words.wait(flag.address, stop.address, 4), "this thread has the GIL while the other one waits"
    assert waiter.is_alive()
    words.write(flag.address, 6)
    waiter.join(10)
    assert found == [True]


def test_a_stop_ends_waits_at_or_below_it_and_no_others(flag: StopWord, stop: StopWord) -> None:
    stop.raise_to(7)
    assert not words.wait(flag.address, stop.address, 7)
    words.write(flag.address, 7)
    assert words.wait(flag.address, stop.address, 7), "what is there counts"
    words.write(flag.address, 8)
    assert words.wait(flag.address, stop.address, 8)


def test_a_stop_never_falls(stop: StopWord) -> None:
    stop.raise_to(2**40)
    stop.raise_to(3)
    assert stop.value == 2**40
