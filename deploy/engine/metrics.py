"""The router's metrics, which Prometheus scrapes from the node's Ray metrics port with the prefix `ray_`.

They have vLLM's names where it has the same metric. deploy/grafana/sparkmoe.json shows them all.
"""

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from ray.util.metrics import Counter, Gauge, Histogram

from deploy.fleet.spec import ShardStats
from deploy.ray_private import record_zero
from router.request import FinishReason, Request, RequestOutput

if TYPE_CHECKING:
    from experts.fabric import Waited
    from router.engine import EngineStatus

_FIRST_TOKEN_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]
_TOKEN_S = [0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 5, 30]
_REQUEST_S = [0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600, 1800]
_TOKENS = [digit * 10**zeros for zeros in range(6) for digit in (1, 2, 5)]


@dataclass
class _Answer:
    """The answer to a user's request so far.

    num_tokens: generated tokens, the last of them at the time `latest`.
    """

    prompt_tokens: int
    began: float
    latest: float
    num_tokens: int = 0


class RouterMetrics:
    """The metrics of one router and its shards.

    Lives in the router's event loop; a step's outputs are one call.
    """

    def __init__(self) -> None:
        self._running = Gauge("sparkmoe_num_requests_running", "Requests in the batch.")
        self._waiting = Gauge("sparkmoe_num_requests_waiting", "Requests in the queue.")
        self._kv_usage = Gauge("sparkmoe_kv_cache_usage_perc", "Share of the KV blocks in use, 1 is all.")
        self._epoch = Gauge(
            "sparkmoe_epoch", "Of the expert shards' membership; it grows when one is replaced."
        )
        self._prompt = _counter("prompt_tokens_total", "Tokens of the prompts taken in.")
        self._generated = _counter("generation_tokens_total", "Tokens generated.")
        self._success = Counter("sparkmoe_request_success_total", "By how they ended.", ("finished_reason",))
        for reason in get_args(FinishReason):
            record_zero(self._success, {"finished_reason": reason})
        self._queued = Histogram("sparkmoe_request_queue_time_seconds", "", _FIRST_TOKEN_S)
        self._first = Histogram("sparkmoe_time_to_first_token_seconds", "", _FIRST_TOKEN_S)
        self._between = Histogram("sparkmoe_inter_token_latency_seconds", "", _TOKEN_S)
        self._whole = Histogram("sparkmoe_e2e_request_latency_seconds", "", _REQUEST_S)
        self._prompt_length = Histogram("sparkmoe_request_prompt_tokens", "Of a request.", _TOKENS)
        self._answer_length = Histogram("sparkmoe_request_generation_tokens", "Of a request.", _TOKENS)
        self._of_engine = {
            "num_preempted": _counter("num_preemptions_total", "Requests put back to be computed again."),
            "num_looked_up": _counter("prefix_cache_queries_total", "Tokens looked up in the prefix cache."),
            "num_cached": _counter("prefix_cache_hits_total", "Those of them that were found."),
        }
        self._of_shards = _ShardMetrics()
        self._growth = _Growth(dict.fromkeys(self._of_engine, 0))
        self._answers: dict[str, _Answer] = {}

    def submitted(self, request: Request) -> None:
        """Count a request that the engine has taken."""
        now = time.monotonic()
        self._prompt.inc(len(request.prompt))
        self._answers[request.id] = _Answer(len(request.prompt), began=now, latest=now)

    def delivered(self, outputs: Sequence[RequestOutput]) -> None:
        """Count a step's outputs. Those of our own readiness probes are left out."""
        now = time.monotonic()
        users = [output for output in outputs if output.id in self._answers]
        num_tokens = sum(len(output.tokens) for output in users)
        if num_tokens:
            self._generated.inc(num_tokens)
        for output in users:
            answer = self._answers[output.id]
            if output.tokens:
                if not answer.num_tokens:
                    self._queued.observe(output.queued_s)
                (self._between if answer.num_tokens else self._first).observe(now - answer.latest)
                answer.num_tokens += len(output.tokens)
                answer.latest = now
            if output.finish:
                self._whole.observe(now - answer.began)
                self.ended(output.id, output.finish)

    def ended(self, request_id: str, reason: FinishReason) -> None:
        """Count the end of a request. Unknown ids are ignored.

        The router calls it for a request that was cancelled, for which no output comes.
        """
        if answer := self._answers.pop(request_id, None):
            self._success.inc(tags={"finished_reason": reason})
            self._prompt_length.observe(answer.prompt_tokens)
            self._answer_length.observe(answer.num_tokens)

    def snapshot(
        self,
        status: "EngineStatus",
        shards: Sequence[ShardStats],
        waited: "Mapping[int, Waited]",
        *,
        num_shards: int,
    ) -> None:
        """Set the gauges, and add to the counters what the engine and its shards have counted since.

        shards: those that answer. The gauges of a shard that does not answer stay as they are, as long as its
        rank is below num_shards.
        """
        self._running.set(status.num_running)
        self._waiting.set(status.num_waiting)
        self._kv_usage.set(1 - status.num_free_blocks / status.num_blocks)
        self._epoch.set(status.epoch)
        for name, counter in self._of_engine.items():
            if grown := self._growth.of(name, getattr(status, name)):
                counter.inc(grown)
        self._of_shards.snapshot(shards, waited, num_shards=num_shards)


class _ShardMetrics:
    """The metrics of every shard, by the tag `rank`."""

    def __init__(self) -> None:
        self._resident = Gauge("sparkmoe_shard_resident_bytes", "Memory of its process.", ("rank",))
        self._of_stats = {
            "num_rows": _by_rank("shard_rows_total", "Tokens received, in every layer."),
            "num_pairs": _by_rank("shard_pairs_total", "(token, expert) pairs computed."),
            "num_activated": _by_rank(
                "shard_activated_experts_total", "Experts with a token, in every layer."
            ),
            "num_layers": _by_rank("shard_layers_total", "Layers computed."),
            "layer_s": _by_rank("shard_layer_seconds_total", "Time for them, without the wire."),
        }
        self._of_waited = {
            "num_answers": _by_rank("shard_answers_total", "Layers that the router has had answers to."),
            "seconds": _by_rank(
                "shard_wait_seconds_total", "Time that the router waited for them, after lower ranks'."
            ),
        }
        self._growth = _Growth({})
        self._num_shards = 0  # the most that there have been

    def snapshot(
        self, shards: Sequence[ShardStats], waited: "Mapping[int, Waited]", *, num_shards: int
    ) -> None:
        resident = dict.fromkeys(range(num_shards, self._num_shards), 0.0)  # Ray cannot take a gauge back
        resident |= {shard.rank: shard.resident_mib * 2**20 for shard in shards}
        for rank, num_bytes in resident.items():
            self._resident.set(num_bytes, tags={"rank": str(rank)})
        self._num_shards = max(self._num_shards, num_shards)
        self._count(self._of_stats, {shard.rank: shard for shard in shards})
        self._count(self._of_waited, waited)

    def _count(self, counters: Mapping[str, Counter], found: "Mapping[int, ShardStats | Waited]") -> None:
        """Add to the counters what grew. found: by rank, the objects whose attributes are counted."""
        for name, counter in counters.items():
            for rank, numbers in found.items():
                tags = {"rank": str(rank)}
                if (name, rank) not in self._growth:
                    record_zero(counter, tags)
                if grown := self._growth.of((name, rank), getattr(numbers, name)):
                    counter.inc(grown, tags=tags)


class _Growth:
    """The growth of numbers that count from the start of a process; counters go on when it is replaced."""

    def __init__(self, before: Mapping[Hashable, float]) -> None:
        self._before = dict(before)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._before

    def of(self, key: Hashable, number: float) -> float:
        """Return by how much a number grew since the last call for this key.

        The first call returns 0. A number lower than before began anew and counts whole.
        """
        before = self._before.get(key, number)
        self._before[key] = number
        return number - before if number >= before else number


def _by_rank(name: str, description: str) -> Counter:
    return Counter(f"sparkmoe_{name}", description, ("rank",))


def _counter(name: str, description: str) -> Counter:
    counter = Counter(f"sparkmoe_{name}", description)
    record_zero(counter, {})
    return counter
