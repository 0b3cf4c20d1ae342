"""RouterReplica: what runs in the Serve deployment `Router`. It holds the engine.

An ingress hands a request in by `submit`, and one `attach` stream carries the outputs of all of its requests back, a
batch per engine step: a stream per request would cost a Ray message for every token.
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from ray import serve

from deploy.config import AppArgs, RouterUserConfig
from deploy.fleet_link import FleetLink
from deploy.metrics import RouterMetrics
from deploy.spec import FleetSpec, Refusal
from experts.config import ExpertsConfig
from router.request import QueueFull, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from experts.fabric import Membership, PeerLost
    from router.engine import Engine

logger = logging.getLogger(__name__)

PROBE_S = 3.0
"""How long a readiness probe's decode step may take."""

MEASURE_S = 5.0

T = TypeVar("T")


class RouterReplica:
    """One engine and its thread. Everything here runs in the replica's event loop, which never waits for a step."""

    def __init__(self, args: AppArgs) -> None:
        """Light: the engine is built when `reconfigure` has said what the shards shall be, while they load."""
        self._args = args
        self._outbox: dict[str, asyncio.Queue[list[RequestOutput]]] = {}  # by ingress
        self._owner: dict[str, str] = {}  # ingress, by request
        self._probes: dict[str, asyncio.Future[RequestOutput]] = {}
        self._metrics = RouterMetrics()
        self._engine: Engine | None = None
        self._members: Membership | None = None
        self._measuring: asyncio.Task[None] | None = None
        self._fleet: FleetLink | None = None
        if args.fabric.kind != "local":
            self._fleet = FleetLink(
                serve.get_replica_context().app_name,
                f"router-{uuid.uuid4().hex[:8]}",
                lease_s=args.fleet.lease_s,
                on_members=self._adopt,
            )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls it once before the replica is healthy and again whenever `user_config` changes."""
        experts = RouterUserConfig.model_validate(user_config).experts
        if self._fleet is not None:
            await self._fleet.want(_fleet_spec(serve.get_replica_context().app_name, self._args, experts))
        elif self._engine is not None:
            raise ValueError("fabric.kind=local: experts cannot change while the router runs; deploy it anew")
        if self._engine is None:
            await self._start_engine(experts)

    # For ingresses

    async def attach(self, ingress: str) -> AsyncGenerator[list[RequestOutput], None]:
        """The outputs of this ingress's requests, for as long as it listens; the first batch is empty.

        When the stream is closed its requests are cancelled: nobody would read their tokens.
        """
        outbox = self._outbox[ingress] = asyncio.Queue()
        try:
            yield []
            while True:
                batch = await outbox.get()
                while not outbox.empty():  # a slow ingress gets fewer, larger batches
                    batch += outbox.get_nowait()
                yield batch
        finally:
            del self._outbox[ingress]
            for request_id in [r for r, owner in self._owner.items() if owner == ingress]:
                self._cancel(request_id)

    async def submit(self, ingress: str, request: Request) -> Refusal | None:
        """None if the request is queued."""
        assert self._engine is not None
        if ingress not in self._outbox:  # it attached to a router before this one
            return Refusal("lost", "the router was replaced")
        try:
            self._engine.submit(request)
        except QueueFull as error:
            return Refusal("full", "the queue is full", retry_after_s=error.retry_after_s)
        except ValueError as error:
            return Refusal("invalid", str(error))
        self._owner[request.id] = ingress
        self._metrics.submitted(request)
        return None

    async def cancel(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._cancel(request_id)

    async def readiness(self) -> dict[str, Any]:
        """Whether a decode step went through every shard within router.ready_within_s; makes one if none did."""
        assert self._engine is not None
        status = self._engine.status()
        fresh = status.idle_s is not None and status.idle_s < self._args.router.ready_within_s
        reason = "" if status.linked else "the expert shards are not linked"
        if status.linked and not fresh:
            reason = await self._probe()
        detail: dict[str, Any] = {"router_pid": os.getpid(), **asdict(self._engine.status())}
        detail["metrics_port"] = _metrics_port()
        if self._fleet is not None:
            overview = await self._fleet.overview()
            if overview is None:
                return {"ready": False, "reason": "the Fleet does not answer", "detail": detail}
            detail["fleet_pid"] = overview.pid
            detail["hopeless"] = overview.hopeless
            detail["shards"] = [asdict(shard) for shard in overview.shards]
            reasons = [
                reason,
                *overview.problems.values(),
                *([] if overview.problems else [overview.hopeless]),
            ]
            reason = "; ".join(filter(None, reasons))
        return {"ready": not reason, "reason": reason, "detail": detail}

    def check_health(self) -> None:
        """Blind to shards: Serve would restart the router, and lose every request, for a shard's death."""
        if self._engine is not None and not self._engine.is_alive():
            raise RuntimeError("the engine's thread has died; its log says why")

    async def __del__(self) -> None:  # Serve awaits it when it stops a replica in order
        if self._measuring is not None:
            self._measuring.cancel()
        if self._fleet is not None:
            await self._fleet.leave()
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)

    # The engine

    async def _start_engine(self, experts: ExpertsConfig) -> None:
        # Here, because torch and transformers take seconds that building the application need not wait.
        from deploy.engine_room import build_engine

        loop = asyncio.get_running_loop()

        def to_loop(call: Callable[[T], None]) -> Callable[[T], None]:
            return lambda argument: loop.call_soon_threadsafe(call, argument) and None

        engine = await asyncio.to_thread(
            build_engine,
            self._args,
            local=experts if self._fleet is None else None,
            on_outputs=to_loop(self._deliver),
            on_lost=to_loop(self._report),
        )
        engine.start()
        self._engine = engine
        if self._members is not None:
            engine.adopt(self._members)
        self._measuring = asyncio.create_task(self._measure())

    def _adopt(self, members: "Membership") -> None:
        self._members = members
        if self._engine is not None:
            self._engine.adopt(members)

    async def _measure(self) -> None:
        """Gauges for Prometheus, as often as Ray exports them."""
        assert self._engine is not None
        while True:
            await asyncio.sleep(MEASURE_S)
            overview = await self._fleet.overview() if self._fleet else None
            self._metrics.snapshot(self._engine.status(), overview.shards if overview else ())

    # What the engine's thread hands to the loop

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        self._metrics.delivered(outputs)
        batches: dict[str, list[RequestOutput]] = {}
        for output in outputs:
            owner = self._owner.get(output.id)
            if owner is not None:
                batches.setdefault(owner, []).append(output)
            if output.finish:
                self._owner.pop(output.id, None)
                if (probe := self._probes.pop(output.id, None)) and not probe.done():
                    probe.set_result(output)
        for owner, batch in batches.items():
            if owner in self._outbox:
                self._outbox[owner].put_nowait(batch)

    def _report(self, loss: "PeerLost") -> None:
        if self._fleet is not None:
            self._fleet.report_lost(loss)

    def _cancel(self, request_id: str) -> None:
        assert self._engine is not None
        if self._owner.pop(request_id, None) is not None:
            self._engine.cancel(request_id)
            self._metrics.ended(request_id, "cancelled")

    async def _probe(self) -> str:
        """Decode one token through every shard; the reason if that fails."""
        assert self._engine is not None
        request = Request(f"probe-{time.monotonic_ns()}", (0,), SamplingParams(max_tokens=1, temperature=0))
        answer = self._probes[request.id] = asyncio.get_running_loop().create_future()
        try:
            self._engine.submit(request)
            output = await asyncio.wait_for(answer, PROBE_S)
        except QueueFull:
            return "the queue is full"
        except TimeoutError:
            self._engine.cancel(request.id)
            return f"a decode step did not go through every shard within {PROBE_S:.0f} s"
        finally:
            self._probes.pop(request.id, None)
        return output.error or ""


def _fleet_spec(app: str, args: AppArgs, experts: ExpertsConfig) -> FleetSpec:
    return FleetSpec(
        app=app,
        checkpoint=str(args.model.path),
        num_shards=experts.shards,
        backend=experts.backend,
        dtype=args.router.dtype if args.fabric.wire_dtype == "auto" else args.fabric.wire_dtype,
        threads=experts.threads,
        strategy=experts.strategy,
        resources=tuple(sorted(args.fleet.shard_resources.items())),
        lease_s=args.fleet.lease_s,
        start_timeout_s=args.fleet.start_timeout_s,
    )


def _metrics_port() -> int:
    """Where this node's Ray serves metrics."""
    here = ray.get_runtime_context().get_node_id()
    return next(node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == here)
