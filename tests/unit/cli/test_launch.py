"""Tests of what `sparkmoe serve` makes of what Ray and Serve tell it, without either of them."""

import signal
from collections.abc import Callable
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayTaskError
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from deploy.cli import cluster, launch, loading
from deploy.cli.cluster import Application, ClusterGone, first_and_last_line, refuse_to_share, stop_fleet
from deploy.cli.readiness import LaunchError
from deploy.config import load
from tests.support.places import DEMO_CONFIG

CHECKED, RAW = load(DEMO_CONFIG)
SCHEMA = ServeDeploySchema.model_validate(RAW)
HTTP = SCHEMA.http_options.model_dump()


def serving(status: str = "RUNNING", message: str = "", **deployments: tuple[str, str]) -> dict[str, Any]:
    """Return Serve's details of an application; deployments: (status, message) by name."""
    told = {name: {"status": status, "message": message} for name, (status, message) in deployments.items()}
    return {"status": ApplicationStatus(status), "message": message, "deployments": told}


class FakeClock:
    """A stand-in for a module's time.monotonic and time.sleep, without the waiting."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class FakeApplication(Application):
    """An application that says its details one after the other, the last of them for ever; an exception is
    raised."""

    def __init__(self, *details: dict[str, Any] | Exception | None) -> None:
        super().__init__(None, "sparkmoe", started=True)
        self._details = list(details)

    def details(self) -> dict[str, Any] | None:
        found = self._details.pop(0) if len(self._details) > 1 else self._details[0]
        if isinstance(found, Exception):
            raise found
        return found


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(launch, "time", clock)
    monkeypatch.setattr(loading, "time", clock)
    monkeypatch.setattr(cluster, "time", clock)
    return clock


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make /ready answer these one after the other, the last of them for ever."""

    def set_answers(*answers: tuple[bool, str] | Exception) -> None:
        left = list(answers)

        def readiness(url: str) -> tuple[bool, str, dict[str, Any]]:
            answer = left.pop(0) if len(left) > 1 else left[0]
            if isinstance(answer, Exception):
                raise answer
            return (*answer, {})

        monkeypatch.setattr(launch, "readiness", readiness)

    return set_answers


NOT_THERE = LaunchError("nothing answers")
NO_GPU = "Deployment 'Router' has 1 replicas that have taken more than 30s to be scheduled."


def test_a_wait_tells_why_whenever_that_changes(
    answers: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    answers(NOT_THERE, NOT_THERE, (False, "no shards"), (False, "no shards"), (True, ""))
    app = FakeApplication(serving("DEPLOYING"), serving("DEPLOYING", Router=("UPDATING", NO_GPU)))
    launch._wait_until_ready(CHECKED, app)
    assert capsys.readouterr().err.splitlines() == [
        f"waiting: Router: {NO_GPU}",
        f"waiting: no shards; Router: {NO_GPU}",
    ]


def test_a_wait_shows_how_far_the_shards_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = iter(range(100))

    def readiness(url: str) -> tuple[bool, str, dict[str, Any]]:
        progress = {"done": next(done), "total": 99, "work": "experts", "now": ""}
        detail = {"shards": [{"rank": 0, "loading": progress}]}
        return progress["done"] == 99, "not linked", detail

    monkeypatch.setattr(launch, "readiness", readiness)
    launch._wait_until_ready(CHECKED, FakeApplication(serving("DEPLOYING")))
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["waiting: not linked", "loading: shard 0: experts 25/99"]
    assert len(lines) == 4


def test_a_wait_ends_with_its_reason(answers: Callable[..., None], clock: FakeClock) -> None:
    answers(NOT_THERE)
    limit_s = CHECKED.applications[0].args.fleet.start_timeout_s + launch.ROUTER_START_S
    with pytest.raises(LaunchError) as gave_up:
        launch._wait_until_ready(CHECKED, FakeApplication(serving("DEPLOYING", Router=("UPDATING", NO_GPU))))
    assert str(gave_up.value) == f"not ready within 1860 s: Router: {NO_GPU}"
    assert limit_s <= clock.now < limit_s + 1
    with pytest.raises(
        LaunchError, match=r"not ready within 1860 s: nothing answers at http://127\.0\.0\.1:8000"
    ):
        launch._wait_until_ready(CHECKED, FakeApplication(serving("DEPLOYING")))


def test_a_wait_ends_when_serve_gives_up(answers: Callable[..., None]) -> None:
    answers(NOT_THERE)
    failed = serving(
        "DEPLOY_FAILED", "Failed with exception:\nTraceback\n  File x\nValueError: no such kernel\n"
    )
    with pytest.raises(LaunchError) as gave_up:
        launch._wait_until_ready(CHECKED, FakeApplication(failed))
    assert str(gave_up.value) == (
        "the application did not start: Failed with exception: ValueError: no such kernel"
    )
    with pytest.raises(LaunchError, match="did not start: it was deleted"):
        launch._wait_until_ready(CHECKED, FakeApplication(None))


def test_a_replaced_router_is_reported_and_a_lost_cluster_is_the_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    ailing = serving("UNHEALTHY", "", Router=("UNHEALTHY", "A replica's health check failed."))
    app = FakeApplication(serving(), ailing, ailing, serving(), ClusterGone("the Ray cluster is gone"))
    with pytest.raises(ClusterGone):
        launch._watch(app)
    assert capsys.readouterr().err.splitlines() == [
        "sparkmoe is UNHEALTHY: Router: A replica's health check failed.",
        "sparkmoe is RUNNING",
    ]
    with pytest.raises(LaunchError, match="the application sparkmoe was deleted"):
        launch._watch(FakeApplication(serving(), None))


def test_a_cluster_is_gone_when_it_has_not_answered_for_a_while(
    monkeypatch: pytest.MonkeyPatch, clock: FakeClock
) -> None:
    def ask(self: Application) -> None:
        raise GetTimeoutError("Get timed out")

    monkeypatch.setattr(Application, "_ask", ask)
    with pytest.raises(ClusterGone, match="the Ray cluster is gone: Get timed out"):
        Application(None, "sparkmoe", started=True).details()
    assert cluster.GONE_AFTER_S <= clock.now < cluster.GONE_AFTER_S + 1


@pytest.mark.parametrize(
    ("applications", "http", "proxy_location", "why"),
    [
        ({}, {}, "HeadOnly", ""),
        (
            {"theirs": {}},
            {},
            "HeadOnly",
            "Serve on this cluster already runs theirs, which serving another file would delete; "
            "change it with `serve deploy`, or stop it first with `serve shutdown --yes`",
        ),
        (
            {},
            {"port": 8001},
            "HeadOnly",
            "Serve on this cluster already runs with http_options.port=8001, not 8000; "
            "set the same, or stop it first with `serve shutdown --yes`",
        ),
        (
            {},
            {},
            "EveryNode",
            "Serve on this cluster already runs with proxy_location=EveryNode, not HeadOnly; "
            "set the same, or stop it first with `serve shutdown --yes`",
        ),
    ],
    ids=["idle", "other applications", "another port", "other proxies"],
)
def test_a_serve_that_runs_already(
    applications: dict[str, Any], http: dict[str, Any], proxy_location: str, why: str
) -> None:
    details = {"applications": applications, "proxy_location": proxy_location}
    try:
        refuse_to_share(details, {**HTTP, "root_url": "", **http}, SCHEMA)
        said = ""
    except LaunchError as error:
        said = str(error)
    assert said == why


class FakeClient:
    """A Serve client and the handle of a Fleet whose shutdown ends with an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, fleet: Exception | None) -> None:
        self.calls: list[str] = []
        self.shutdown = self.graceful_shutdown = self._controller = self

        def get(call: object, timeout: float) -> None:
            if self.calls[-1] == "fleet" and fleet is not None:
                raise fleet

        def get_actor(name: str, namespace: str) -> "FakeClient":
            self.calls.append("fleet")
            return self

        monkeypatch.setattr(ray, "get", get)
        monkeypatch.setattr(ray, "get_actor", get_actor)

    def options(self, *, max_task_retries: int) -> "FakeClient":
        return self

    def remote(self) -> None:
        self.calls.append(self.calls[-1] if self.calls else "serve")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (None, ""),
        (ActorDiedError(), ""),
        (
            GetTimeoutError("Get timed out"),
            "shards are left until their lease lapses (fleet.lease_s): Get timed out\n",
        ),
        (
            RayTaskError("shutdown", "Traceback:\n  File x\nValueError: bad", ValueError("bad")),
            "shards are left until their lease lapses (fleet.lease_s): Traceback: ValueError: bad\n",
        ),
    ],
    ids=["stopped", "died", "hangs", "fails"],
)
def test_a_fleet_that_does_not_stop_is_told_in_a_line(
    error: Exception | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    client = FakeClient(monkeypatch, fleet=error)
    Application(client, "sparkmoe", started=True).remove()
    assert client.calls == ["serve", "fleet", "fleet"]
    assert capsys.readouterr().err == told


def test_no_fleet_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_actor(name: str, namespace: str) -> None:
        raise ValueError("Failed to look up actor")

    monkeypatch.setattr(ray, "get_actor", get_actor)
    stop_fleet("sparkmoe")


def test_the_gist_of_a_message_is_one_line() -> None:
    assert first_and_last_line("") == ""
    assert first_and_last_line("a\n") == "a"
    assert first_and_last_line("A replica failed. Error:\nTraceback\n  File x\n\nValueError: bad\n") == (
        "A replica failed. Error: ValueError: bad"
    )


def test_a_second_interrupt_is_ignored() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt):
            launch._interrupt(signal.SIGINT, None)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
