"""RouterMetrics on meters that only remember."""

from collections import defaultdict
from typing import Any

import pytest

from deploy import metrics
from deploy.metrics import RouterMetrics
from deploy.spec import ShardStats
from router.engine import EngineStatus
from router.request import Request, RequestOutput, SamplingParams

STATUS = EngineStatus(
    epoch=1,
    linked=True,
    num_steps=1,
    idle_s=0.0,
    num_running=0,
    num_waiting=0,
    num_free_blocks=1,
    num_blocks=2,
)


class Meter:
    """A Counter, Gauge or Histogram. values: by its tags."""

    def __init__(self, name: str, *args: Any) -> None:
        self.values: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[tuple((tags or {}).values())] = [value]

    def inc(self, value: float = 1, tags: dict[str, str] | None = None) -> None:
        self.values[tuple((tags or {}).values())].append(value)

    def observe(self, value: float) -> None:
        self.values[()].append(value)


@pytest.fixture
def meters(monkeypatch: pytest.MonkeyPatch) -> dict[str, Meter]:
    """By name."""
    made: dict[str, Meter] = {}

    def make(name: str, *args: Any) -> Meter:
        return made.setdefault(name.removeprefix("sparkmoe_"), Meter(name))

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, make)
    return made


def test_probes_are_not_counted(meters: dict[str, Meter]) -> None:
    router = RouterMetrics()
    router.submitted(Request("users", (1, 2, 3), SamplingParams()))
    router.delivered([RequestOutput("users", tokens=(4,)), RequestOutput("probe-1", tokens=(5,))])
    router.delivered([RequestOutput("probe-1", finish="length")])
    router.delivered([RequestOutput("users", tokens=(6, 7), finish="stop")])
    assert sum(meters["prompt_tokens_total"].values[()]) == 3
    assert sum(meters["generation_tokens_total"].values[()]) == 3
    assert meters["requests_finished_total"].values == {("stop",): [1]}
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
        assert len(meters[name].values[()]) == 1


def test_a_shard_that_is_gone_counts_nothing_more(meters: dict[str, Meter]) -> None:
    router = RouterMetrics()
    pairs = meters["shard_pairs"].values
    router.snapshot(STATUS, [shard(0), shard(1), shard(2)], num_shards=3)
    router.snapshot(STATUS, [shard(0)], num_shards=3)
    assert pairs == {("0",): [100], ("1",): [101], ("2",): [102]}, "one that does not answer for a moment"
    router.snapshot(STATUS, [shard(0), shard(1)], num_shards=2)
    assert pairs == {("0",): [100], ("1",): [101], ("2",): [0]}


def shard(rank: int) -> ShardStats:
    return ShardStats(rank=rank, pid=1, node="n", num_pairs=100 + rank, resident_mib=1.0)
