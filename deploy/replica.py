"""What runs in the two Serve deployments: RouterReplica holds the engine, IngressReplica answers HTTP.

They talk by Serve handle: a request goes in by `submit`, and one `attach` stream carries the outputs of all of an
ingress's requests back, a batch per engine step: a stream per request would cost a Ray message for every token.
"""

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

import ray
import torch
from ray import serve
from ray.exceptions import RayError

from deploy.config import AppArgs, RouterUserConfig
from deploy.fleet import FleetOverview, checkpoint_placement, fleet_of
from deploy.metrics import RouterMetrics
from deploy.shard_actor import FleetSpec
from experts.backends import resolve_backend
from experts.checkpoint import ExpertCheckpoint
from experts.config import ExpertsConfig
from experts.fabric import Fabric, PeerLost
from experts.fabric.local import LocalFabric, local_membership
from experts.fabric.tcp import TcpFabric
from experts.shard import ExpertShard, load_shard
from router.engine import Engine
from router.request import QueueFull, Request, RequestOutput, SamplingParams
from router.tokenizer import Tokenizer, eos_token_ids
from router.trunk import Trunk

logger = logging.getLogger(__name__)

POLL_S = 30.0
"""Of the Fleet for a new membership, and so the longest that a dead Fleet goes unnoticed by it."""

LAST_WILL_S = 15.0
"""The lease that a router leaves when it is stopped in order: a redeployed one takes the shards over in time."""

PROBE_S = 3.0
"""How long a readiness probe's decode step may take."""

OVERVIEW_S = 1.5
MEASURE_S = 5.0


class RouterReplica:
    """One engine and its thread. Everything here runs in the replica's event loop, which never waits for a step."""

    def __init__(self, args: AppArgs) -> None:
        self._app = serve.get_replica_context().app_name
        self._args = args
        self._name = f"router-{uuid.uuid4().hex[:8]}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outbox: dict[str, asyncio.Queue[list[RequestOutput]]] = {}  # by ingress
        self._owner: dict[str, str] = {}  # ingress, by request
        self._probes: dict[str, asyncio.Future[RequestOutput]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._spec: FleetSpec | None = None
        self._metrics = RouterMetrics()

        torch.set_num_threads(args.router.threads or os.cpu_count() or 1)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = _dtype(args.router.dtype, auto=torch.float32 if device.type == "cpu" else torch.bfloat16)
        self._wire_dtype = _dtype(args.fabric.wire_dtype, auto=dtype)
        self._trunk = Trunk(args.model.path, dtype=dtype, device=device)
        self._engine: Engine | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve calls it once before the replica is healthy and again whenever `user_config` changes."""
        experts = RouterUserConfig.model_validate(user_config).experts
        self._loop = asyncio.get_running_loop()
        if self._args.fabric.kind == "local":
            self._start_local(experts)
            return
        self._spec = self._fleet_spec(experts)
        if self._engine is None:
            self._start_engine(self._tcp_fabric())
            work = (self._hold_fleet(), self._follow_epochs(), self._measure())
            self._tasks = [asyncio.create_task(one) for one in work]
        else:
            await fleet_of(self._app).reconcile.remote(self._spec)

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

    async def submit(self, ingress: str, request: Request) -> tuple[str, float] | None:
        """None if the request is queued; else why not, and after how many seconds to try again (0: never)."""
        assert self._engine is not None
        if ingress not in self._outbox:
            return "the stream of outputs is not attached", 1.0
        try:
            self._engine.submit(request)
        except QueueFull as error:
            return "the queue is full", error.retry_after_s
        except ValueError as error:
            return str(error), 0.0
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
        if self._spec is not None:
            overview = await self._overview()
            if overview is None:
                return {"ready": False, "reason": "the Fleet does not answer", "detail": detail}
            detail["fleet_pid"] = overview.pid
            detail["hopeless"] = overview.hopeless
            detail["shards"] = [asdict(shard) for shard in overview.shards]
            reason = "; ".join([*([reason] if reason else []), *overview.problems.values()])
        return {"ready": not reason, "reason": reason, "detail": detail}

    def check_health(self) -> None:
        """Blind to shards: Serve would restart the router, and lose every request, for a shard's death."""
        if self._engine is not None and not self._engine.is_alive():
            raise RuntimeError("the engine's thread has died; its log says why")

    async def __del__(self) -> None:  # Serve awaits it when it stops a replica in order
        for task in self._tasks:
            task.cancel()
        if self._spec is not None:
            await fleet_of(self._app).renew.remote(self._name, ttl_s=LAST_WILL_S)
        if self._engine is not None:
            await asyncio.to_thread(self._engine.stop)

    # Engine and shards

    def _start_engine(self, fabric: Fabric) -> None:
        path = self._args.model.path
        self._engine = Engine(
            self._trunk,
            fabric,
            Tokenizer(path),
            config=self._args.router,
            eos=eos_token_ids(path),
            on_outputs=lambda outputs: self._from_engine(self._deliver, outputs),
            on_lost=lambda loss: self._from_engine(self._report, loss),
        )
        self._engine.start()

    def _start_local(self, experts: ExpertsConfig) -> None:
        if self._engine is not None:
            raise ValueError("fabric.kind=local: experts cannot change while the router runs; deploy it anew")
        with ExpertCheckpoint(self._args.model.path) as checkpoint:
            placement = checkpoint_placement(checkpoint, num_ranks=experts.shards)
            shards = [
                load_shard(
                    checkpoint,
                    placement,
                    rank=rank,
                    backend=resolve_backend(experts.backend),
                    dtype=self._wire_dtype,
                    device=self._trunk.device,
                )
                for rank in range(experts.shards)
            ]
        self._local_shards: list[ExpertShard] = shards
        self._start_engine(LocalFabric(shards))
        assert self._engine is not None
        self._engine.adopt(local_membership(placement))
        self._tasks = [asyncio.create_task(self._measure())]

    def _tcp_fabric(self) -> TcpFabric:
        return TcpFabric(
            hidden=self._trunk.shape.hidden,
            wire_dtype=self._wire_dtype,
            slow_after_s=self._args.fabric.slow_after_s,
            dead_after_s=self._args.fabric.dead_after_s,
        )

    def _fleet_spec(self, experts: ExpertsConfig) -> FleetSpec:
        fleet = self._args.fleet
        return FleetSpec(
            app=self._app,
            checkpoint=str(self._args.model.path),
            num_shards=experts.shards,
            backend=experts.backend,
            dtype=self._wire_dtype,
            threads=experts.threads,
            strategy=experts.strategy,
            resources=tuple(sorted(fleet.shard_resources.items())),
            lease_s=fleet.lease_s,
            start_timeout_s=fleet.start_timeout_s,
        )

    async def _overview(self) -> FleetOverview | None:
        """None if the Fleet is being restarted."""
        try:
            return await asyncio.wait_for(fleet_of(self._app).overview.remote(), OVERVIEW_S)
        except (RayError, TimeoutError):
            return None

    async def _measure(self) -> None:
        """Gauges for Prometheus, as often as Ray exports them."""
        while True:
            await asyncio.sleep(MEASURE_S)
            overview = await self._overview() if self._spec is not None else None
            assert self._engine is not None
            self._metrics.snapshot(self._engine.status(), overview.shards if overview else ())

    async def _hold_fleet(self) -> None:
        """Renew our lease for as long as we live; tell a Fleet that does not know us what we want."""
        lease_s = self._args.fleet.lease_s
        while True:
            try:
                fleet = fleet_of(self._app)
                if not await asyncio.wait_for(fleet.renew.remote(self._name, ttl_s=lease_s), POLL_S):
                    await fleet.reconcile.remote(self._spec)
            except Exception:
                logger.exception("the Fleet did not take our lease; trying again")
                await asyncio.sleep(1.0)
                continue
            await asyncio.sleep(lease_s / 4)

    async def _follow_epochs(self) -> None:
        """Hand every new membership to the engine."""
        epoch = 0
        while True:
            try:
                call = fleet_of(self._app).next_membership.remote(after=epoch, timeout_s=POLL_S)
                members = await asyncio.wait_for(call, 2 * POLL_S)
            except Exception:
                logger.exception("the Fleet did not say who its shards are; asking again")
                await asyncio.sleep(1.0)
                continue
            if members is not None:
                epoch = members.epoch
                assert self._engine is not None
                self._engine.adopt(members)

    # From the engine's thread to the loop

    def _from_engine(self, call: Any, argument: Any) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(call, argument)

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

    def _report(self, loss: PeerLost) -> None:
        fleet_of(self._app).report_lost.remote(self._name, loss.epoch, loss.ranks)

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


def _dtype(name: str, *, auto: torch.dtype) -> torch.dtype:
    return auto if name == "auto" else getattr(torch, name)


def _metrics_port() -> int:
    """Where this node's Ray serves metrics."""
    here = ray.get_runtime_context().get_node_id()
    return next(node["MetricsExportPort"] for node in ray.nodes() if node["NodeID"] == here)
