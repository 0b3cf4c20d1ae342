"""The contracts of the kernels that compute the local experts of one shard: ExpertBackend, its settings, its pairs.

T tokens, D hidden, K top-k, e local slots, I intermediate. A pair is a (token, expert) of the routing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from experts.config import ExpertsConfig
from experts.progress import Progress
from experts.weights import ExpertWeights

Scales = Literal["exact", "baked"]
"""The treatment of a checkpoint's multipliers (scale_2, input scales) by backends of the b12x kind.

exact: they stay as they are, in float32.
baked: scale_2 is multiplied into the e4m3 block scales, which rounds them (and below 2^-10 loses them), and every
    multiplier is 1. vLLM's FlashInferB12xExperts does it so; this is for parity with vLLM only.
"""


@dataclass(frozen=True)
class KernelSettings:
    """The settings of a kernel that a user may choose, see ExpertsConfig.

    A backend ignores those that it does not have.
    """

    scales: Scales = "exact"
    micro: bool = False

    @classmethod
    def of(cls, experts: ExpertsConfig) -> "KernelSettings":
        """Return the settings that this config states."""
        return cls(scales=experts.scales, micro=experts.micro)


DEFAULTS = KernelSettings()


class PairCounts(NamedTuple):
    """Totals of a shard since its start.

    num_pairs: pairs of local experts that were computed.
    num_activated: the number of experts that had a pair in a forward, added up over all forwards.
    """

    num_pairs: int = 0
    num_activated: int = 0


class LocalPairs(Protocol):
    """The way in which a shard finds the pairs of its own experts in the routing of a forward, and counts them.

    The caller sees to it that one thread at a time is in `local` or `totals`.
    in_graph: a CUDA graph may hold `local`.
    """

    in_graph: bool = False

    def local(self, phys_TK: Tensor) -> Tensor:
        """Return int32 [T, K] local slots for physical ids, EMPTY where an expert is elsewhere, and count the pairs.

        Waits for no device.
        """
        ...

    def totals(self) -> Tensor:
        """Return the PairCounts as int64 [2] on the device, so that the caller can wait for them without holding a lock."""
        ...


class ExpertBackend(Protocol):
    """A kernel and the weights of `num_slots` experts in every MoE layer. It runs one forward at a time.

    in_graph: a CUDA graph may hold a forward: it starts the same kernels for the same sizes, whatever the routing.
    """

    in_graph: bool = False

    def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        """Write an expert's weights into a local slot, in place: no pointer that a captured graph holds may move."""
        ...

    def forward(self, layer: int, x_TD: Tensor, ids_TK: Tensor, w_TK: Tensor, *, out_TD: Tensor) -> None:
        """Set every row of out_TD to the sum of w * expert(x) over its local experts; zero if it has none.

        x_TD, out_TD: the backend's dtype, contiguous, T >= 1; out_TD is the caller's and is overwritten.
        ids_TK: int32 local slots in [0, num_slots), or -1 where the expert is elsewhere: costs nothing. After
            take_physical: physical ids of any rank, contiguous or not.
        w_TK: float32 top-k weights. Sums are accumulated in float32.
        """
        ...

    def take_physical(self, first_slot: int) -> Callable[[], Tensor] | None:
        """Have `forward` take physical ids from now on, of which [first_slot, first_slot + num_slots) are local.

        The backend then finds the local pairs and counts them. Returns a function that reads the counts, with the
        contract of LocalPairs.totals; it is never called during a forward. Most backends cannot do this and return None:
        their `forward` keeps taking local slots.
        """
        return None

    def warm(self, *, top_k: int) -> Iterable[Progress]:
        """Compile and set up what forwards with this top_k need, step by step; most backends need nothing.

        After that, forwards of a backend that has such work neither compile nor allocate.
        """
        return ()
