"""RouterReplica around a fake engine and a fake Fleet: who is owed what, when it is ready, what it survives."""

import asyncio
import pickle
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.api.engine_client import Limits
from deploy.config import AppArgs, ExpertsConfig
from deploy.engine import build, outboxes, replica
from deploy.engine.messages import Joiner
from deploy.engine.replica import RouterReplica
from deploy.fleet.spec import FleetOverview, ShardStats
from experts.fabric import PeerLost
from router.engine import EngineStatus
from router.request import Request, RequestOutput, SamplingParams, TokenLogprob

pytestmark = pytest.mark.anyio

SHARDS = (ShardStats(0, 10, "n", 1, 1.0), ShardStats(1, 11, "n", 1, 1.0))
FINE = FleetOverview(pid=7, shards=SHARDS, problems={}, hopeless="", refused="")
LOSS = PeerLost((1,), epoch=1, step=1, layer=0, elapsed_s=0.1, why="EOF")
NO_SHARD = "shard 1 is being replaced"


@dataclass
class FakeEngine:
    """A stand-in for the engine.

    idle_s, linked: what status says. steps: whether a submitted request is answered.
    """

    on_outputs: Callable[[list[RequestOutput]], None]
    on_lost: Callable[[PeerLost], None]
    max_model_len: int = 99
    idle_s: float | None = 1.0
    linked: bool = True
    steps: bool = True
    submitted: list[str] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)

    def start(self) -> None: ...

    def stop(self) -> None:
        self.log.append("engine stops")
        self.on_lost(LOSS)

    def is_alive(self) -> bool:
        return True

    def prepare(self, request: Request) -> Request:
        return request

    def submit(self, request: Request) -> None:
        self.submitted.append(request.id)
        if self.steps and request.id.startswith("probe"):
            self.on_outputs([RequestOutput(request.id, tokens=(1,), finish="length")])

    def expire_all(self) -> None:
        self.log.append("all expire")

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)

    def status(self) -> EngineStatus:
        return EngineStatus(
            epoch=1,
            linked=self.linked,
            num_steps=1,
            idle_s=self.idle_s,
            num_running=0,
            num_waiting=0,
            num_free_blocks=1,
            num_blocks=1,
        )


class FakeFleet:
    """A stand-in for the Fleet's client."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.says: FleetOverview | None = FINE
        self.lost: list[PeerLost] = []
        self.log: list[str] = []

    async def want(self, spec: Any) -> None: ...

    def report_lost(self, loss: PeerLost) -> None:
        self.lost.append(loss)

    async def overview(self) -> FleetOverview | None:
        return self.says

    async def leave(self) -> None:
        self.log.append("leaves the Fleet")


class Router(RouterReplica):
    def __del__(self) -> None:  # type: ignore[override]
        """Serve awaits the real one; here `stop` is enough."""


@dataclass
class Running:
    replica: Router
    engine: FakeEngine
    fleet: FakeFleet


@pytest.fixture
async def engines(monkeypatch: pytest.MonkeyPatch) -> list[FakeEngine]:
    """Replace all that a replica needs of Ray and return the list of the engines that it has built."""
    built: list[FakeEngine] = []

    def build_fake_engine(
        args: AppArgs, *, experts: ExpertsConfig, shares_gpu: bool, **callbacks: Any
    ) -> tuple[FakeEngine, Any]:
        built.append(FakeEngine(**callbacks))
        return built[-1], dict

    monkeypatch.setattr(build, "build_engine", build_fake_engine)
    monkeypatch.setattr(replica, "_metrics_port", lambda: 8080)
    monkeypatch.setattr(replica, "_num_gpus", lambda: 0.0)
    monkeypatch.setattr(replica, "keep_kernels", lambda: None)  # it changes this process's environment
    monkeypatch.setattr(replica, "FleetClient", FakeFleet)
    monkeypatch.setattr(replica.serve, "get_replica_context", lambda: SimpleNamespace(app_name="app"))
    monkeypatch.setattr(replica, "PROBE_S", 0.05)
    return built


def config(*, kind: str, **router: Any) -> AppArgs:
    model = {"path": "configs/demo-model", "name": "demo"}
    return AppArgs.model_validate(
        {"model": model, "fabric": {"kind": kind}, "router": {"max_requests": 3, **router}}
    )


def experts(**fields: Any) -> dict[str, Any]:
    return {"experts": {"shards": 2, **fields}}


@pytest.fixture
async def running(engines: list[FakeEngine]) -> AsyncIterator[Running]:
    """Yield a replica over fabric tcp in which all is well."""
    router = Router(config(kind="tcp"))
    await router.reconfigure(experts())
    fleet: Any = router._fleet
    yield Running(router, engines[0], fleet)
    await router.stop()


def request(name: str) -> Request:
    return Request(name, (1,), SamplingParams())


# Ingresses


async def test_an_ingress_gets_the_limits_and_then_what_is_its_own(running: Running) -> None:
    attached: Any = running.replica.attach("a")
    assert await anext(attached) == Limits(max_model_len=99, max_requests=3 + 256)
    other: Any = running.replica.attach("b")
    await anext(other)
    assert await running.replica.submit("a", request("1")) is None
    assert await running.replica.submit("b", request("2")) is None
    running.engine.on_outputs([RequestOutput("1", "x"), RequestOutput("2", "y", finish="stop")])
    running.engine.on_outputs([RequestOutput("1", "z", finish="stop")])
    assert [output.text for output in await anext(other)] == ["y"]
    assert [output.text for output in await anext(attached)] == ["x", "z"]
    await attached.aclose()
    assert not running.engine.cancelled


async def test_requests_of_an_ingress_that_leaves_are_cancelled(running: Running) -> None:
    attached = running.replica.attach("a")
    await anext(attached)
    await running.replica.submit("a", request("1"))
    await running.replica.submit("a", request("2"))
    await running.replica.cancel(["1", "1", "unknown"])
    assert running.engine.cancelled == ["1"]
    await attached.aclose()
    assert running.engine.cancelled == ["1", "2"]
    refusal = await running.replica.submit("a", request("3"))
    assert refusal is not None
    assert refusal.kind == "lost"


async def test_no_batch_is_larger_than_a_message_of_serve_may_be(running: Running) -> None:
    """Prompt logprobs of a long context, and an ingress that has not read for a while."""
    attached: Any = running.replica.attach("a")
    await anext(attached)
    for name in ("1", "2"):
        await running.replica.submit("a", request(name))
    scores = (TokenLogprob(1, -0.5, tuple((n, -n / 7) for n in range(20))),)
    running.engine.on_outputs([RequestOutput("1", prompt_logprobs=scores * 20_000)])
    for _ in range(2000):
        running.engine.on_outputs([RequestOutput("1", "a", (1,), scores), RequestOutput("2", "b", (2,))])
    running.engine.on_outputs([RequestOutput("2", finish="stop"), RequestOutput("1", finish="stop")])
    await asyncio.sleep(0)
    joiner, outputs = Joiner(), []
    while not outputs or outputs[-1].id == "2" or not outputs[-1].finish:
        batch = await asyncio.wait_for(anext(attached), 5)
        assert len(pickle.dumps(batch)) <= 2**20
        outputs += filter(None, map(joiner.take, batch))
    assert outputs[0].prompt_logprobs == scores * 20_000
    assert [sum(len(o.logprobs) for o in outputs if o.id == name) for name in ("1", "2")] == [2000, 0]
    assert "".join(o.text for o in outputs if o.id == "2") == "b" * 2000
    await attached.aclose()


@pytest.fixture
def _fast_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outboxes, "TICK_S", 0.01)


@pytest.mark.usefixtures("_fast_ticks")
async def test_an_ingress_that_falls_silent_is_dropped(running: Running) -> None:
    silent, alive = running.replica.attach("silent"), running.replica.attach("alive")
    await anext(silent)
    await anext(alive)
    await running.replica.submit("silent", request("1"))
    await running.replica.submit("alive", request("2"))
    ending = asyncio.ensure_future(anext(silent, "ended"))
    async with asyncio.timeout(5):
        while not ending.done():
            running.engine.on_outputs([RequestOutput("1", "x")])  # its box filling up is no sign of life
            await running.replica.renew("alive")
            await asyncio.sleep(0.01)
            if ending.done() and ending.result() != "ended":
                ending = asyncio.ensure_future(anext(silent, "ended"))
    assert running.engine.cancelled == ["1"]
    assert await running.replica.submit("alive", request("3")) is None


async def test_a_router_that_drains_takes_nothing_new_and_waits_for_what_runs(running: Running) -> None:
    attached: Any = running.replica.attach("a")
    await anext(attached)
    await running.replica.submit("a", request("1"))
    draining = asyncio.create_task(running.replica.drain())
    await asyncio.sleep(0)
    refusal = await running.replica.submit("a", request("2"))
    assert refusal is not None
    assert refusal.kind == "draining"
    assert (await running.replica.readiness())["reason"] == "the server is stopping"
    assert not draining.done()
    running.engine.on_outputs([RequestOutput("1", finish="stop")])
    await asyncio.wait_for(draining, 5)


async def test_a_drain_ends_what_takes_too_long(engines: list[FakeEngine]) -> None:
    router = Router(config(kind="local", drain_s=0.05))
    await router.reconfigure(experts())
    attached: Any = router.attach("a")
    await anext(attached)
    await router.submit("a", request("1"))
    await asyncio.wait_for(router.drain(), 5)
    assert engines[0].log == ["all expire"]
    await router.stop()


# user_config


async def test_a_first_config_that_is_wrong_raises(engines: list[FakeEngine]) -> None:
    with pytest.raises(ValueError, match="shards"):
        await Router(config(kind="tcp")).reconfigure(experts(shards=0))
    assert not engines


async def test_a_wrong_config_does_not_stop_a_running_router(running: Running) -> None:
    await running.replica.reconfigure(experts(shards=0, mistake=1))
    detail = (await running.replica.readiness())["detail"]
    assert "experts.shards: " in detail["refused"]
    assert "experts.mistake: " in detail["refused"]
    await running.replica.reconfigure(experts(shards=3))
    assert "refused" not in (await running.replica.readiness())["detail"]


async def test_local_experts_cannot_change_and_nothing_is_lost(engines: list[FakeEngine]) -> None:
    router = Router(config(kind="local"))
    await router.reconfigure(experts())
    await router.reconfigure(experts(shards=3))
    report = await router.readiness()
    assert report["ready"]
    assert "experts cannot change" in report["detail"]["refused"]
    await router.reconfigure(experts())
    assert "refused" not in (await router.readiness())["detail"]
    assert len(engines) == 1
    await router.stop()


async def test_what_the_fleet_refuses_is_shown(running: Running) -> None:
    running.fleet.says = replace(FINE, refused="33 shards are too many")
    report = await running.replica.readiness()
    assert report["ready"]
    assert report["detail"]["refused"] == "33 shards are too many"


# Readiness


async def test_steps_that_go_through_need_no_fleet(running: Running) -> None:
    running.fleet.says = None
    report = await running.replica.readiness()
    assert (report["ready"], report["reason"]) == (True, "")
    assert report["detail"]["fleet"] == "does not answer"
    assert not running.engine.submitted, "the last step was recent"
    running.engine.linked = False
    report = await running.replica.readiness()
    assert (report["ready"], report["reason"]) == (False, "the expert shards are not linked")


async def test_shards_that_are_not_linked_and_why(running: Running) -> None:
    running.engine.linked = False
    running.fleet.says = replace(FINE, hopeless="no such checkpoint")
    assert (await running.replica.readiness())["reason"].endswith("not linked; no such checkpoint")
    running.fleet.says = replace(FINE, problems={1: NO_SHARD}, hopeless="x")
    assert (await running.replica.readiness())["reason"].endswith(f"not linked; {NO_SHARD}")


@pytest.mark.parametrize(
    ("idle_s", "problems", "probed"),
    [(1.0, {}, False), (60.0, {}, True), (None, {}, True), (1.0, {1: NO_SHARD}, True)],
    ids=["recent step", "old step", "no step", "a shard is gone"],
)
async def test_a_step_is_made_where_none_tells(
    running: Running, idle_s: float | None, problems: dict[int, str], probed: bool
) -> None:
    running.engine.idle_s = idle_s
    running.fleet.says = replace(FINE, problems=problems)
    assert (await running.replica.readiness())["ready"]
    assert bool(running.engine.submitted) == probed
    running.engine.steps = False
    report = await running.replica.readiness()
    assert report["ready"] == (not probed)
    assert ("a decode step did not go through" in report["reason"]) == probed


async def test_the_metrics_port_is_asked_for_once_and_not_in_the_loop(
    monkeypatch: pytest.MonkeyPatch, engines: list[FakeEngine]
) -> None:
    asked: list[str] = []

    def ask() -> int:
        asked.append(threading.current_thread().name)
        return 9090

    monkeypatch.setattr(replica, "_metrics_port", ask)
    router = Router(config(kind="tcp"))
    await router.reconfigure(experts())
    for _ in range(2):
        assert (await router.readiness())["detail"]["metrics_port"] == 9090
    assert len(asked) == 1
    assert asked[0] != threading.current_thread().name
    await router.stop()


async def test_gauges_go_on_after_a_failure(
    monkeypatch: pytest.MonkeyPatch, engines: list[FakeEngine], caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(replica, "MEASURE_S", 0.01)
    calls: list[int] = []

    def snapshot(*args: Any, **kwargs: Any) -> None:
        calls.append(1)
        raise ZeroDivisionError

    router = Router(config(kind="tcp"))
    monkeypatch.setattr(router._metrics, "snapshot", snapshot)
    await router.reconfigure(experts())
    async with asyncio.timeout(5):
        while len(calls) < 2:
            await asyncio.sleep(0.01)
    assert "ZeroDivisionError" in caplog.text
    await router.stop()


# The end


async def test_a_router_that_stops_leaves_first_and_calls_no_shard_lost(running: Running) -> None:
    running.fleet.log = running.engine.log
    running.engine.on_lost(LOSS)
    await asyncio.sleep(0)
    assert len(running.fleet.lost) == 1
    await running.replica.stop()
    await asyncio.sleep(0)
    assert running.engine.log == ["leaves the Fleet", "engine stops"]
    assert len(running.fleet.lost) == 1


async def test_an_engine_stops_even_if_the_fleet_cannot_be_left(
    monkeypatch: pytest.MonkeyPatch, running: Running
) -> None:
    async def leave() -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(running.fleet, "leave", leave)
        with pytest.raises(ConnectionError):
            await running.replica.stop()
    assert running.engine.log == ["engine stops"]
