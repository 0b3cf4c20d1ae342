"""What Prometheus can scrape from the node's Ray metrics port, each name prefixed with `ray_`."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge, Histogram

from deploy.spec import ShardStats
from router.request import Request, RequestOutput

if TYPE_CHECKING:
    from router.engine import EngineStatus

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60]


class RouterMetrics:
    """Of one router. Lives in its event loop; a step's batch of outputs is one call."""

    def __init__(self) -> None:
        self._running = Gauge("sparkmoe_num_requests_running", "Requests in the batch.")
        self._waiting = Gauge("sparkmoe_num_requests_waiting", "Requests in the queue.")
        self._kv_usage = Gauge("sparkmoe_kv_cache_usage_ratio", "Share of the KV blocks in use.")
        self._epoch = Gauge(
            "sparkmoe_epoch", "Of the expert shards' membership; it grows when one is replaced."
        )
        self._prompt = Counter("sparkmoe_prompt_tokens_total", "Tokens of the prompts taken in.")
        self._generated = Counter("sparkmoe_generation_tokens_total", "Tokens generated.")
        self._finished = Counter("sparkmoe_requests_finished_total", "By how they ended.", ("reason",))
        self._first = Histogram("sparkmoe_time_to_first_token_seconds", "", _SECONDS)
        self._between = Histogram("sparkmoe_inter_token_latency_seconds", "", _SECONDS)
        self._whole = Histogram("sparkmoe_e2e_request_latency_seconds", "", _SECONDS)
        self._pairs = Gauge("sparkmoe_shard_pairs", "(token, expert) pairs a shard computed.", ("rank",))
        self._began: dict[str, float] = {}
        self._latest: dict[str, float] = {}
        self._num_shards = 0  # the most there have been

    def submitted(self, request: Request) -> None:
        self._prompt.inc(len(request.prompt))
        self._began[request.id] = time.monotonic()

    def delivered(self, outputs: Sequence[RequestOutput]) -> None:
        now = time.monotonic()
        users = [output for output in outputs if output.id in self._began]  # the others are of our own probes
        num_tokens = sum(len(output.tokens) for output in users)
        if num_tokens:
            self._generated.inc(num_tokens)
        for output in users:
            if output.id in self._latest:
                self._between.observe(now - self._latest[output.id])
            else:
                self._first.observe(now - self._began[output.id])
            self._latest[output.id] = now
            if output.finish:
                self._whole.observe(now - self._began[output.id])
                self.ended(output.id, output.finish)

    def ended(self, request_id: str, reason: str) -> None:
        """Also of a request that was cancelled, of which no output tells. Unknown ids are ignored."""
        if self._began.pop(request_id, None) is not None:
            self._finished.inc(tags={"reason": reason})
        self._latest.pop(request_id, None)

    def snapshot(self, status: "EngineStatus", shards: Sequence[ShardStats], *, num_shards: int) -> None:
        """shards: those that answer; the gauge of one that does not stays as it is while there are so many shards."""
        self._running.set(status.num_running)
        self._waiting.set(status.num_waiting)
        self._kv_usage.set(1 - status.num_free_blocks / status.num_blocks)
        self._epoch.set(status.epoch)
        computed = dict.fromkeys(range(num_shards, self._num_shards), 0)  # Ray cannot take a gauge back
        computed |= {shard.rank: shard.num_pairs for shard in shards}
        for rank, num_pairs in computed.items():
            self._pairs.set(num_pairs, tags={"rank": str(rank)})
        self._num_shards = max(self._num_shards, num_shards)
