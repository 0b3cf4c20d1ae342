"""RunningRequest: a request inside the engine, waiting or running."""

import math
from dataclasses import dataclass, field

from router.answer import Answer
from router.guidance import Guide
from router.request import Request


@dataclass(eq=False)
class RunningRequest:
    """tokens: prompt, then answer; num_computed of them are in the KV cache.

    seed: of its sampling noise, for its whole life. guide: of its grammar, if it has one. deadline: on the monotonic
    clock. num_cached: tokens that the prefix cache had when it was first let in. keys: of its full blocks, as far as
    anybody asked, see extend_keys. rank: its place among all others, lower ones first. row: of the block tables, None
    while it waits.
    """

    request: Request
    answer: Answer
    seed: int
    guide: Guide | None = None
    deadline: float = math.inf
    tokens: list[int] = field(init=False)
    num_computed: int = 0
    num_cached: int | None = None
    keys: list[bytes] = field(default_factory=list)
    rank: tuple[int, int, int] = (0, 0, 0)
    row: int | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt)

    @property
    def num_left(self) -> int:
        """Tokens to compute until the next one can be sampled: 1 while it decodes."""
        return len(self.tokens) - self.num_computed
