"""RunningRequest: a request inside the engine, waiting or running."""

import math
import time
from dataclasses import dataclass, field

from router.request import Request
from router.sampling.guidance import Guide
from router.schedule.answer import Answer


@dataclass(eq=False)
class RunningRequest:
    """tokens: prompt, then answer; num_computed of them are in the KV cache.

    seed: of its sampling noise, for its whole life. guide: of its grammar, if it has one. came_at, deadline: on the
    monotonic clock. began: it was let in, if only once. keys: of its full blocks, as far as
    anybody asked, see extend_keys. rank: its place among all others, lower ones first. row: of the block tables, None
    while it waits.
    """

    request: Request
    answer: Answer
    seed: int
    guide: Guide | None = None
    came_at: float = 0.0
    deadline: float = math.inf
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    began: bool = False
    keys: list[bytes] = field(default_factory=list)
    rank: tuple[int, int, int] = (0, 0, 0)
    row: int | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def num_left(self) -> int:
        """Tokens to compute until the next one can be sampled: 1 while it decodes."""
        return len(self.tokens) - self.num_computed

    def begin(self) -> None:
        """It is let in for the first time: what was computed already was found in the prefix cache."""
        self.began = True
        self.answer.begin(num_cached=self.num_computed, queued_s=time.monotonic() - self.came_at)
