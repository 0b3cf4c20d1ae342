"""A decode step can be followed: how many files of ours it enters, and how often it walks from one to another."""

import sys
from collections import Counter
from types import FrameType
from typing import Any

from tests.support.in_process import greedy, in_process
from tests.support.places import DEMO_MODEL, ROOT

ROOMS = tuple(f"{ROOT / room}/" for room in ("deploy", "router", "experts"))

MAX_FILES = 18
MAX_CROSSINGS = 100
"""Of six layers and two shards in the engine's process."""


class Walk:
    """A profiler that notes which files are entered, and the calls from one of our files into another.

    A call through torch or transformers counts from the file of ours that is nearest on the stack.
    """

    def __init__(self) -> None:
        self.files: set[str] = set()
        self.crossings: Counter[tuple[str, str]] = Counter()

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(ROOMS) or code.co_name.startswith("<"):
            return
        self.files.add(code.co_filename)
        caller = frame.f_back
        while caller is not None and not caller.f_code.co_filename.startswith(ROOMS):
            caller = caller.f_back
        if caller is not None and caller.f_code.co_filename != code.co_filename:
            self.crossings[caller.f_code.co_filename, code.co_filename] += 1


def test_a_decode_step_is_a_short_walk() -> None:
    with in_process(DEMO_MODEL, num_shards=2) as server:
        server.engine.checked = False
        server.submit(greedy("one", range(1, 20), num_tokens=50))
        for _ in range(5):  # the prompt, then decoding
            server.engine.turn(wait_s=1)
        walk = Walk()
        sys.setprofile(walk)
        try:
            server.engine.turn(wait_s=1)
        finally:
            sys.setprofile(None)
    assert 1 < len(walk.files) <= MAX_FILES, sorted(walk.files)
    assert 1 < walk.crossings.total() <= MAX_CROSSINGS, walk.crossings.most_common()
