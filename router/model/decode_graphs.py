"""DecodeGraphs: one CUDA graph of a whole decode step for every batch size, so that a step starts in one call.

B rows, N blocks of a table, V vocabulary.
"""

import logging
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor

from experts.progress import Report, each
from router.dispatch import Dispatcher
from router.kernels import our_kernels_run
from router.model.attention import AttentionPlan, PagedAttention
from router.model.trunk import RoutedExperts, Trunk

logger = logging.getLogger(__name__)

COARSE = 8
"""Batches larger than this are filled up to a multiple of it."""


def batch_sizes(max_rows: int) -> list[int]:
    """Return the batch sizes to capture, ascending; the last holds max_rows."""
    fine = range(1, min(max_rows, COARSE) + 1)
    return [*fine, *range(2 * COARSE, max_rows + COARSE, COARSE)] if max_rows > COARSE else [*fine]


def graphs_of(
    trunk: Trunk,
    attention: PagedAttention,
    dispatcher: Dispatcher,
    *,
    sizes: Sequence[int],
    max_blocks: int,
) -> "DecodeGraphs | None":
    """Return graphs if a graph can hold this GPU's kernels and experts; None if every step must be started call by call."""
    if trunk.device.type == "cuda" and our_kernels_run(trunk.dtype, trunk.device) and dispatcher.in_graph:
        return DecodeGraphs(trunk, attention, dispatcher, sizes=sizes, max_blocks=max_blocks)
    return None


class DecodeGraphs:
    """The graphs, and the tensors that they read: tokens, positions, slots and contexts of a batch.

    A batch is filled up with copies of its first row: they choose the same experts, and write the same keys and values
    to the same place, so they cost little and change nothing.
    """

    def __init__(
        self,
        trunk: Trunk,
        attention: PagedAttention,
        experts: RoutedExperts,
        *,
        sizes: Sequence[int],
        max_blocks: int,
    ) -> None:
        """Allocate the inputs. sizes: batch sizes, ascending. max_blocks: the most blocks of a context."""
        self._trunk, self._attention, self._experts = trunk, attention, experts
        self._sizes = sizes
        rows, device = self._sizes[-1], trunk.device
        with torch.inference_mode():
            self._row_4B = torch.zeros(4, rows, dtype=torch.int64, device=device)
            self._table_BN = torch.zeros(rows, max_blocks, dtype=torch.int64, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def capture(self, *, report: Report) -> None:
        """Capture all graphs anew, in the engine's thread, between steps; nothing is written into the KV cache.

        Where that fails, the log says why, and no plan fits.
        """
        self._graphs.clear()
        try:
            self._capture_all(report)
        except Exception as error:  # noqa: BLE001 a driver's and Triton's errors are of any class
            self._graphs.clear()
            logger.warning("steps run without CUDA graphs, which could not be captured: %s", error)

    def fits(self, plan: AttentionPlan) -> bool:
        """Return whether a graph can compute a step: it only decodes, and is no larger than the largest graph."""
        return bool(self._graphs) and not plan.prompts and plan.num_decoding <= self._sizes[-1]

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int], positions: Sequence[int], plan: AttentionPlan) -> Tensor:
        """Replay a step that fits: return the logits [B, V] of every row, which the next step overwrites."""
        num_rows, num_blocks = plan.table_BN.shape
        size = self._sizes[bisect_left(self._sizes, num_rows)]
        ids = torch.tensor([tokens, positions], device=self._trunk.device)
        row_4B = torch.cat([ids, plan.slots_T[None], plan.length_B[None]])
        self._row_4B[:, :num_rows].copy_(row_4B)
        self._table_BN[:num_rows, :num_blocks].copy_(plan.table_BN)
        if size > num_rows:
            self._row_4B[:, num_rows:size].copy_(row_4B[:, :1].expand(-1, size - num_rows))
            self._table_BN[num_rows:size, :num_blocks].copy_(plan.table_BN[:1].expand(size - num_rows, -1))
        graph, logits_BV = self._graphs[size]
        graph.replay()
        return logits_BV[:num_rows]

    @torch.inference_mode()
    def _capture_all(self, report: Report) -> None:
        self._table_BN.zero_()
        self._row_4B.copy_(torch.tensor([0, 0, -1, 1])[:, None])  # token, position, slot, length
        pool = torch.cuda.graph_pool_handle()
        largest_first = self._sizes[::-1]  # the others fit into its memory
        for size in each(largest_first, "graphs", report):
            stream = torch.cuda.Stream(self._trunk.device)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                self._run(size)  # kernels are compiled and libraries set up, which no graph can hold
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits_BV = self._run(size)
            self._graphs[size] = graph, logits_BV

    def _run(self, size: int) -> Tensor:
        token_B, position_B, slot_B, length_B = self._row_4B[:, :size]
        plan = AttentionPlan(
            slots_T=slot_B, table_BN=self._table_BN[:size], length_B=length_B, mask_B11S=None, prompts=()
        )
        return self._trunk.forward(
            token_B, position_B, keep_N=None, attention=self._attention, plan=plan, experts=self._experts
        )
