"""RouterReplica: the class of the Serve deployment `Router`, which holds the engine.

An ingress hands requests in by `submit`, and one `attach` stream carries the outputs of all of them back, in
a batch per engine step: a stream per request would cost a Ray message for every token.
"""

import asyncio
import logging
import math
import os
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import ray
from pydantic import ValidationError
from ray import serve

from deploy import logs
from deploy.api.engine_client import Limits
from deploy.config import AppArgs, RouterUserConfig
from deploy.engine.messages import Part
from deploy.engine.metrics import RouterMetrics
from deploy.engine.outboxes import Outboxes
from deploy.fleet.client import FleetClient
from deploy.fleet.spec import FleetSpec, Refusal
from deploy.kernel_caches import keep_kernels
from deploy.within import within
from experts.config import ExpertsConfig
from experts.progress import Progress, show, took
from router.request import QueueFull, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from experts.fabric import Membership, StepFailed, Waited
    from router.engine import Engine

logger = logging.getLogger(__name__)

PROBE_S = 3.0
"""Seconds that a readiness probe's decode step may take."""

MEASURE_S = 5.0
"""Seconds between two updates of the gauges, as often as Ray exports them."""

DRAIN_POLL_S = 0.05

T = TypeVar("T")


class RouterReplica:
    """A Serve replica with one engine.

    All methods run in the replica's event loop, which never waits for a step.
    """

    def __init__(self, args: AppArgs) -> None:
        """Build everything but the engine, which `reconfigure` builds, while the shards load.

        It needs the user_config first, which says what the shards shall be.
        """
        keep_kernels()
        logs.configure(args.api.log_format)
        self._args = args
        self._outboxes = Outboxes(on_abandoned=self._abandon)
        self._probes: dict[str, asyncio.Future[RequestOutput]] = {}
        # Of their own: many grammars must not keep everything else that needs a thread waiting.
        self._grammar_threads = ThreadPoolExecutor(2, "grammars")
        self._metrics = RouterMetrics()
        self._metrics_port: int | None = None
        self._engine: Engine | None = None
        self._waited: Callable[[], Mapping[int, Waited]] = dict
        self._experts: ExpertsConfig | None = None
        self._refused = ""  # why the newest user_config is refused, "" if it is not
        self._members: Membership | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopping = False
        self._draining = False
        self._fleet: FleetClient | None = None
        if args.fabric.kind != "local":
            self._fleet = FleetClient(
                serve.get_replica_context().app_name,
                f"router-{uuid.uuid4().hex[:8]}",
                lease_s=args.fleet.lease_s,
                log_format=args.api.log_format,
                on_members=self._adopt,
            )

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Adopt the deployment's `user_config`.

        Serve calls this before the replica is healthy and after every change. The first call raises
        ValueError for a bad config. A later one must not, for Serve would stop the router and every request
        with it: the bad config is refused, and /ready says so until a good one comes.
        """
        try:
            experts = RouterUserConfig.model_validate(user_config).experts
            await self._adopt_experts(experts)
        except ValueError as error:
            if self._engine is None:
                raise
            self._refused = _sentence(error)
            logger.warning("user_config is refused, what runs stays as it is: %s", self._refused)
        else:
            self._refused = ""

    # For ingresses

    async def attach(self, ingress: str) -> AsyncGenerator[Limits | list[RequestOutput | Part], None]:
        """Yield the engine's limits, then batches of outputs for this ingress, while it listens and renews.

        When the stream ends, the ingress's requests are cancelled: nobody would read their tokens.
        """
        assert self._engine is not None
        router = self._args.router
        self._outboxes.open(ingress)
        try:
            yield Limits(self._engine.max_model_len, max_requests=router.max_requests + router.max_queue)
            while (batch := await self._outboxes.next(ingress)) is not None:
                yield batch
        finally:
            self._outboxes.close(ingress)

    async def renew(self, ingress: str) -> None:
        """Note that an attached ingress lives, which it must tell every few seconds."""
        self._outboxes.renew(ingress)

    async def submit(self, ingress: str, request: Request) -> Refusal | None:
        """Queue a request. Returns None if it is queued, else why it is refused."""
        assert self._engine is not None
        if self._draining:
            return Refusal("draining", "the server is stopping")
        prepare = self._engine.prepare
        try:
            if request.params.grammar is None:
                prepared = prepare(request)
            else:
                # An ingress has seen it compile within limits; still it takes a while, and tokens of others go on.
                loop = asyncio.get_running_loop()
                prepared = await loop.run_in_executor(self._grammar_threads, prepare, request)
            if ingress not in self._outboxes:  # it attached to an earlier router, or was dropped
                return Refusal("lost", "the router was replaced, or did not hear from this ingress")
            self._engine.submit(prepared)
        except QueueFull:
            return Refusal("full", "the queue is full")
        except ValueError as error:
            return Refusal("invalid", str(error))
        self._outboxes.add(ingress, request.id)
        self._metrics.submitted(request)
        return None

    async def cancel(self, request_ids: list[str]) -> None:
        """Cancel requests. Unknown ids are ignored."""
        for request_id in request_ids:
            if self._outboxes.remove(request_id):
                self._abandon(request_id)

    async def drain(self) -> None:
        """Refuse new requests, and return when those that run have ended.

        After router.drain_s they are made to end.
        """
        assert self._engine is not None
        self._draining = True
        ends = time.monotonic() + self._args.router.drain_s
        while len(self._outboxes) and time.monotonic() < ends:
            await asyncio.sleep(DRAIN_POLL_S)
        self._engine.expire_all()
        logger.info("drained; %d requests had to end", len(self._outboxes))

    async def readiness(self) -> dict[str, Any]:
        """Return whether a decode step went through every shard within router.ready_within_s.

        If none did, one is made now. The result has the fields of deploy.api.engine_client.Readiness. The
        Fleet need not answer: what it says is only detail, and the cause where a step does not go through.
        """
        assert self._engine is not None
        overview = await self._fleet.overview() if self._fleet is not None else None
        in_doubt = overview is not None and bool(overview.problems)
        reason = await self._why_no_step(recent_is_enough=not in_doubt)
        detail: dict[str, Any] = {"router_pid": os.getpid(), **asdict(self._engine.status())}
        detail["metrics_port"] = self._metrics_port
        detail["took"] = {work: asdict(one) for work, one in took().items()}
        refused = self._refused
        if overview is not None:
            detail["fleet_pid"] = overview.pid
            detail["hopeless"] = overview.hopeless
            detail["shards"] = [asdict(shard) for shard in overview.shards]
            refused = refused or overview.refused
            causes = list(overview.problems.values()) or [overview.hopeless]
            reason = reason and "; ".join(filter(None, [reason, *causes]))
        elif self._fleet is not None:
            detail["fleet"] = "does not answer"
        if refused:
            detail["refused"] = refused
        return {"ready": not reason, "reason": reason, "detail": detail}

    def check_health(self) -> None:
        """Raise RuntimeError if the engine's thread has died; Serve then restarts this replica.

        Shards do not count: for the death of one, Serve would restart the router and lose every request.
        """
        if self._engine is not None and not self._engine.is_alive():
            raise RuntimeError("the engine's thread has died; its log says why")

    async def __del__(self) -> None:  # Serve awaits this when it stops a replica in order
        await self.stop()

    async def stop(self) -> None:
        """Leave the Fleet, then stop the engine.

        In this order, the links that the engine closes are no lost shards.
        """
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        try:
            if self._fleet is not None:
                await self._fleet.leave()
        finally:
            if self._engine is not None:
                await asyncio.to_thread(self._engine.stop)

    # The engine

    async def _adopt_experts(self, experts: ExpertsConfig) -> None:
        """Make the Fleet, and at first the engine, as `experts` says.

        Raises ValueError for what this router cannot do.
        """
        if self._fleet is not None:
            await self._fleet.want(_fleet_spec(serve.get_replica_context().app_name, self._args, experts))
        elif self._engine is not None and experts != self._experts:
            raise ValueError("fabric.kind=local: experts cannot change while the router runs; deploy it anew")
        if self._engine is None:
            await self._start_engine(experts)
        self._experts = experts

    async def _start_engine(self, experts: ExpertsConfig) -> None:
        # Imported here: torch and transformers take seconds, for which building the application need not wait.
        report = show("router")
        report(Progress(0, 1, "libraries"))
        from deploy.engine.build import build_engine

        report(Progress(1, 1, "libraries"))
        loop = asyncio.get_running_loop()

        def to_loop(call: Callable[[T], None]) -> Callable[[T], None]:
            return lambda argument: loop.call_soon_threadsafe(call, argument) and None

        engine, self._waited = await asyncio.to_thread(
            build_engine,
            self._args,
            experts=experts,
            shares_gpu=self._fleet is not None and _num_gpus() < 1,
            on_outputs=to_loop(self._deliver),
            on_lost=to_loop(self._report),
        )
        self._metrics_port = await asyncio.to_thread(_metrics_port)
        engine.start()
        self._engine = engine
        if self._members is not None:
            engine.adopt(self._members)
        self._tasks = [
            asyncio.create_task(self._measure()),
            asyncio.create_task(self._outboxes.close_silent()),
        ]

    def _adopt(self, members: "Membership") -> None:
        self._members = members
        if self._engine is not None:
            self._engine.adopt(members)

    async def _measure(self) -> None:
        """Update the metrics every MEASURE_S seconds, until cancelled."""
        assert self._engine is not None
        while True:
            await asyncio.sleep(MEASURE_S)
            try:
                overview = await self._fleet.overview() if self._fleet else None
                self._metrics.snapshot(
                    self._engine.status(),
                    overview.shards if overview else (),
                    self._waited(),
                    num_shards=len(self._members.shards) if self._members else 0,
                )
            except Exception:  # one failure must not stop the gauges for good
                logger.exception("the gauges are not up to date")

    # What the engine's thread hands to the loop

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        self._metrics.delivered(outputs)
        self._outboxes.put(outputs)
        for output in outputs:
            if output.finish and (probe := self._probes.get(output.id)) and not probe.done():
                probe.set_result(output)

    def _report(self, loss: "StepFailed") -> None:
        if self._fleet is not None and not self._stopping:
            self._fleet.report_lost(loss)

    def _abandon(self, request_id: str) -> None:
        """Cancel a request whose outputs nobody reads any more."""
        assert self._engine is not None
        self._engine.cancel(request_id)
        self._metrics.ended(request_id, "cancelled")

    async def _why_no_step(self, *, recent_is_enough: bool) -> str:
        """Return why a decode step does not go through every shard, "" if one does, or did not long ago."""
        assert self._engine is not None
        if self._draining:
            return "the server is stopping"
        status = self._engine.status()
        if not status.linked:
            return "the expert shards are not linked"
        idle_s = math.inf if status.idle_s is None else status.idle_s
        if recent_is_enough and idle_s < self._args.router.ready_within_s:
            return ""
        return await self._probe()

    async def _probe(self) -> str:
        """Decode one token through every shard; return why that fails, "" if it does not."""
        assert self._engine is not None
        request = Request(f"probe-{time.monotonic_ns()}", (0,), SamplingParams(max_tokens=1, temperature=0))
        answer = self._probes[request.id] = asyncio.get_running_loop().create_future()
        try:
            self._engine.submit(self._engine.prepare(request))
            output = await within(PROBE_S, answer)
        except QueueFull:
            return "the queue is full"
        except TimeoutError:
            self._engine.cancel(request.id)
            return f"a decode step did not go through every shard within {PROBE_S:.0f} s"
        finally:
            self._probes.pop(request.id, None)
        return output.error or ""


def _sentence(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())


def _fleet_spec(app: str, args: AppArgs, experts: ExpertsConfig) -> FleetSpec:
    return FleetSpec(
        app=app,
        checkpoint=str(args.model.path),
        experts=experts,
        dtype=args.router.dtype if args.fabric.wire_dtype == "auto" else args.fabric.wire_dtype,
        resources=tuple(sorted(args.fleet.shard_resources.items())),
        lease_s=args.fleet.lease_s,
        start_timeout_s=args.fleet.start_timeout_s,
        log_format=args.api.log_format,
    )


def _num_gpus() -> float:
    """Return the GPUs that Ray reserves for this process.

    If that is less than one, Ray may put a shard beside it.
    """
    return ray.get_runtime_context().get_assigned_resources().get("GPU", 0.0)


def _metrics_port() -> int:
    """Return the port on which this node's Ray serves metrics."""
    here = ray.get_runtime_context().get_node_id()
    return next(node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == here)
