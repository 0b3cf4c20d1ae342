"""Tests of what a CUDA graph of a decode step reads, and which graph a step takes; graphs themselves need a
GPU."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experts.progress import silent
from router.cache.block_tables import BlockTables
from router.model.attention import Chunk, plan_attention
from router.model.decode_graphs import COARSE, DecodeGraphs, batch_sizes, graphs_of
from tests.support.paged import shape_of

CPU = torch.device("cpu")
SHAPE = shape_of(4, 2, 8)


class Recorded:
    """A graph that remembers what lay in the buffers when it ran."""

    def __init__(self, graphs: DecodeGraphs, size: int) -> None:
        self._graphs, self._size = graphs, size
        self.ran: list[tuple[list[list[int]], list[list[int]]]] = []

    def replay(self) -> None:
        rows, table = self._graphs._row_4B[:, : self._size], self._graphs._table_BN[: self._size, :2]
        self.ran.append((rows.tolist(), table.tolist()))


@given(st.integers(1, 300))
def test_batches_are_filled_up_by_a_few_rows(max_rows: int) -> None:
    sizes = batch_sizes(max_rows)
    assert sizes == sorted(set(sizes))
    for rows in range(1, max_rows + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < (1 if rows <= COARSE else COARSE)


def test_a_batch_is_filled_up_with_its_first_row() -> None:
    tables = BlockTables(num_blocks=8, block_size=4, max_requests=4, max_tokens=16)
    for length in (3, 6, 1):
        row = tables.take_row()
        assert row is not None
        assert tables.reserve(row, length)
    plan = plan_attention(
        [Chunk(0, 2, 1), Chunk(1, 5, 1), Chunk(2, 0, 1)], tables, shape=SHAPE, dtype=torch.float32, device=CPU
    )
    nothing: Any = None
    trunk: Any = SimpleNamespace(device=CPU)
    graphs = DecodeGraphs(trunk, nothing, nothing, sizes=[2, 4], max_blocks=4)
    assert not graphs.fits(plan), "there are none yet"
    recorded: Any = Recorded(graphs, 4)
    graphs._graphs = {4: (recorded, torch.arange(8).view(4, 2))}
    assert graphs.fits(plan)
    assert graphs.forward([7, 8, 9], [2, 5, 0], plan).tolist() == [[0, 1], [2, 3], [4, 5]]
    blocks = tables.table_RN[:3, :2].tolist()
    slots = [blocks[0][0] * 4 + 2, blocks[1][1] * 4 + 1, blocks[2][0] * 4]
    rows = [[7, 8, 9, 7], [2, 5, 0, 2], [*slots, slots[0]], [3, 6, 1, 3]]
    assert recorded.ran == [(rows, [*blocks, blocks[0]])]


def test_a_step_with_a_prompt_does_not_fit() -> None:
    tables = BlockTables(num_blocks=8, block_size=4, max_requests=4, max_tokens=16)
    row = tables.take_row()
    assert row is not None
    assert tables.reserve(row, 6)
    nothing: Any = None
    trunk: Any = SimpleNamespace(device=CPU)
    graphs = DecodeGraphs(trunk, nothing, nothing, sizes=[1], max_blocks=4)
    recorded: Any = Recorded(graphs, 1)
    graphs._graphs = {1: (recorded, torch.zeros(1, 2))}
    assert not graphs.fits(
        plan_attention([Chunk(0, 0, 6)], tables, shape=SHAPE, dtype=torch.float32, device=CPU)
    )


def test_there_are_none_on_a_cpu() -> None:
    nothing: Any = None
    trunk: Any = SimpleNamespace(device=CPU, dtype=torch.float32)
    dispatcher: Any = SimpleNamespace(in_graph=True)
    assert graphs_of(trunk, nothing, dispatcher, sizes=[1], max_blocks=4) is None


class OutOfResources(Exception):
    """As Triton's, which is no RuntimeError."""


def test_whatever_a_capture_raises_there_are_no_graphs_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OutOfResources("shared memory, 300000 of 232448 bytes")

    nothing: Any = None
    trunk: Any = SimpleNamespace(device=CPU)
    graphs = DecodeGraphs(trunk, nothing, nothing, sizes=[1], max_blocks=4)
    monkeypatch.setattr(graphs, "_capture_all", fail)
    graphs.capture(report=silent)
    assert not graphs._graphs
    [warning] = [record.getMessage() for record in caplog.records]
    assert "shared memory, 300000 of 232448 bytes" in warning
