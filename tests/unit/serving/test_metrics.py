"""RouterMetrics on meters that only remember."""

from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from deploy.engine import metrics
from deploy.engine.metrics import RouterMetrics
from deploy.fleet.spec import ShardStats
from experts.fabric import Waited
from router.engine import EngineStatus
from router.request import Request, RequestOutput, SamplingParams
from tests.support.dashboard import metrics_shown

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


MIB = 2**20


class Meter:
    """A stand-in for Ray's Counter, Gauge or Histogram.

    values: by its tags. exported: the name that Prometheus knows it by.
    """

    def __init__(self, kind: str, name: str) -> None:
        assert (kind == "Counter") == name.endswith("_total"), "Ray would add it to a counter's name"
        self.exported = f"ray_{name}_bucket" if kind == "Histogram" else f"ray_{name}"
        self.values: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)

    def set(self, value: float, tags: dict[str, str] | None = None) -> None:
        self.values[tuple((tags or {}).values())] = [value]

    def inc(self, value: float = 1, tags: dict[str, str] | None = None) -> None:
        self.values[tuple((tags or {}).values())].append(value)

    def _record(self, value: float, tags: dict[str, str]) -> None:
        """Record the value that a counter begins with."""
        assert value == 0
        self.inc(value, tags)

    def observe(self, value: float) -> None:
        self.values[()].append(value)

    def total(self, *tags: str) -> float:
        return sum(self.values[tags])


@pytest.fixture
def meters(monkeypatch: pytest.MonkeyPatch) -> dict[str, Meter]:
    """Return all meters by name."""
    made: dict[str, Meter] = {}

    def make(kind: str, name: str, *args: Any) -> Meter:
        assert name not in made
        return made.setdefault(name.removeprefix("sparkmoe_"), Meter(kind, name))

    for kind in ("Counter", "Gauge", "Histogram"):
        monkeypatch.setattr(metrics, kind, partial(make, kind))
    return made


def test_the_dashboard_shows_every_metric_and_no_other(meters: dict[str, Meter]) -> None:
    RouterMetrics()
    assert metrics_shown() == {meter.exported for meter in meters.values()}


def test_probes_are_not_counted(meters: dict[str, Meter]) -> None:
    router = RouterMetrics()
    router.submitted(Request("users", (1, 2, 3), SamplingParams()))
    router.delivered([RequestOutput("users", tokens=(4,)), RequestOutput("probe-1", tokens=(5,))])
    router.delivered([RequestOutput("probe-1", finish="length")])
    router.delivered([RequestOutput("users", tokens=(6, 7), finish="stop")])
    assert meters["prompt_tokens_total"].total() == 3
    assert meters["generation_tokens_total"].total() == 3
    success = meters["request_success_total"]
    assert {tags: sum(values) for tags, values in success.values.items() if any(values)} == {("stop",): 1}
    for name in ("time_to_first_token_seconds", "inter_token_latency_seconds", "e2e_request_latency_seconds"):
        assert len(meters[name].values[()]) == 1
    assert meters["request_prompt_tokens"].values[()] == [3]
    assert meters["request_generation_tokens"].values[()] == [3]


def test_a_request_that_fails_before_its_first_token_has_no_time_of_it(meters: dict[str, Meter]) -> None:
    router = RouterMetrics()
    router.submitted(Request("users", (1, 2, 3), SamplingParams()))
    router.delivered([RequestOutput("users", finish="error", error="no shards")])
    assert not meters["time_to_first_token_seconds"].values
    assert meters["request_success_total"].total("error") == 1
    assert meters["request_generation_tokens"].values[()] == [0]


def test_what_the_engine_counts_since_its_start(meters: dict[str, Meter]) -> None:
    router = RouterMetrics()
    for num_preempted, num_looked_up, num_cached in ((1, 100, 0), (1, 164, 48)):
        router.snapshot(
            replace(STATUS, num_preempted=num_preempted, num_looked_up=num_looked_up, num_cached=num_cached),
            [],
            {},
            num_shards=0,
        )
    assert meters["num_preemptions_total"].total() == 1
    assert meters["prefix_cache_queries_total"].total() == 164
    assert meters["prefix_cache_hits_total"].total() == 48


def test_a_shard_that_is_gone_has_no_memory(meters: dict[str, Meter]) -> None:
    router = RouterMetrics()
    resident = meters["shard_resident_bytes"].values
    router.snapshot(STATUS, [shard(0), shard(1), shard(2)], {}, num_shards=3)
    router.snapshot(STATUS, [shard(0)], {}, num_shards=3)
    assert resident == {("0",): [MIB], ("1",): [MIB], ("2",): [MIB]}, "one that does not answer for a moment"
    router.snapshot(STATUS, [shard(0), shard(1)], {}, num_shards=2)
    assert resident == {("0",): [MIB], ("1",): [MIB], ("2",): [0]}


def test_counters_of_a_rank_only_grow_whoever_is_replaced(meters: dict[str, Meter]) -> None:
    router = RouterMetrics()
    for num_pairs, num_answers, waited_s in ((100, 10, 1.0), (130, 15, 1.5), (7, 2, 0.25), (7, 2, 0.25)):
        stats = replace(shard(0), num_pairs=num_pairs)
        router.snapshot(STATUS, [stats], {0: Waited(num_answers, waited_s)}, num_shards=1)
    assert meters["shard_pairs_total"].values[("0",)] == [0, 30, 7], "from what this router found"
    assert meters["shard_answers_total"].total("0") == 5 + 2
    assert meters["shard_wait_seconds_total"].total("0") == 0.5 + 0.25


def shard(rank: int) -> ShardStats:
    return ShardStats(rank=rank, pid=1, node="n", num_pairs=100 + rank, resident_mib=1.0)
