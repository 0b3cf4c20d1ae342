"""The work of `sparkmoe serve`: start a checked config on Ray, watch it, and stop everything again."""

import re
import signal
import socket
import time
from types import FrameType
from typing import Any, NoReturn

from pydantic import ValidationError
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from deploy.api.http.keys import read_keys
from deploy.cli.cluster import (
    Application,
    application,
    check_listening,
    cluster,
    first_and_last_line,
    ignore_interrupts,
    print_status,
)
from deploy.cli.loading import Loading
from deploy.cli.readiness import LaunchError, readiness
from deploy.config import HttpOptions, ServeFile, explain
from experts.checkpoint.index import CheckpointIndex
from router.model_config import check_family

POLL_S = 0.2
WATCH_S = 3.0

DRAIN_S = 5.0
"""Seconds that draining may take beyond router.drain_s."""

ROUTER_START_S = 60.0
"""Seconds that the start may take beyond fleet.start_timeout_s."""


def launch(config: ServeFile, raw: dict[str, Any], *, address: str) -> None:
    """Serve until SIGINT or SIGTERM. Prints `ready URL` once a decode step has gone through every shard.

    After the signal running requests have router.drain_s to end, while new ones are refused; a second one
    cuts them short.

    Raises ValueError for a config that cannot work, and LaunchError if it does not come up or is lost. Once
    it stops, it ignores both signals for good, for the process is to end.
    """
    check(config, address=address)
    schema = _schema(raw)
    _heed_interrupts()
    try:
        with cluster(address), application(config.applications[0].name, schema) as app:
            _wait_until_ready(config, app)
            print(f"ready {config.url}", flush=True)
            try:
                _watch(app)
            except KeyboardInterrupt:
                _drain(app, within_s=config.applications[0].args.router.drain_s)
                raise
    except KeyboardInterrupt:
        print_status("stopped")


def check(config: ServeFile, *, address: str) -> None:
    """Raise ValueError or LaunchError for what can be known to fail before anything is started.

    It looks at the checkpoint, the API keys, the port (unless a Serve that runs may hold it), and whether a
    cluster answers at the address.
    """
    application = config.applications[0]
    path, num_shards = application.args.model.path, application.experts.shards
    check_family(path)
    if application.args.api.keys_file is not None:
        read_keys(application.args.api.keys_file)
    with CheckpointIndex(path) as checkpoint:
        num_experts = checkpoint.shape.num_experts
        if checkpoint.format == "dense":
            raise ValueError(f"args.model.path: {path} is not quantised; run `sparkmoe quantize {path} DST`")
    if num_shards > num_experts:
        raise ValueError(
            f"experts.shards={num_shards} is more than the model's {num_experts} experts per layer: "
            "a shard without an expert would do nothing"
        )
    if address == "local":
        _check_port(config.http_options)
    elif re.fullmatch(r"[^/]+:\d+", address):
        _check_cluster(address)


def why_not_healthy(details: dict[str, Any]) -> str:
    """Return in one line what Serve finds wrong with an application, "" if nothing."""
    ailing = {
        name: deployment["message"]
        for name, deployment in details["deployments"].items()
        if deployment["status"] != "HEALTHY"
    }
    parts = [details["message"], *(f"{name}: {message}" for name, message in ailing.items() if message)]
    return "; ".join(filter(None, map(first_and_last_line, parts)))


def _wait_until_ready(config: ServeFile, app: Application) -> None:
    """Wait until the server is ready, and print why it is not whenever that changes.

    How far the shards have loaded is shown, too. Raises LaunchError if Serve gives up or it takes too long,
    and ValueError for what only the user can mend.
    """
    limit_s = config.applications[0].args.fleet.start_timeout_s + ROUTER_START_S
    ends = time.monotonic() + limit_s
    told = ""
    with Loading() as loading:
        while True:
            details = app.details()
            if details is None or details["status"] == "DEPLOY_FAILED":
                why = "it was deleted" if details is None else why_not_healthy(details)
                raise LaunchError(f"the application did not start: {why}")
            ready, reason, more = _readiness(config.url)
            if ready:
                return
            if hopeless := more.get("hopeless"):
                raise ValueError(hopeless)
            why = "; ".join(filter(None, [reason, why_not_healthy(details)]))
            if time.monotonic() > ends:
                raise LaunchError(
                    f"not ready within {limit_s:.0f} s: {why or f'nothing answers at {config.url}'}"
                )
            if why not in ("", told):
                loading.clear()
                print_status(f"waiting: {why}")
                told = why
            loading.show(more.get("shards", ()))
            time.sleep(POLL_S)


def _readiness(url: str) -> tuple[bool, str, dict[str, Any]]:
    """Return what `readiness` does, and "not ready" for a server that does not answer HTTP yet."""
    try:
        return readiness(url)
    except LaunchError:
        return False, "", {}


def _watch(app: Application) -> NoReturn:
    """Print the application's status whenever it changes, e.g. while Serve replaces a router that died.

    Raises LaunchError when the application was deleted or the cluster is gone.
    """
    told = "RUNNING"
    while True:
        time.sleep(WATCH_S)
        details = app.details()
        if details is None:
            raise LaunchError(f"the application {app.name} was deleted")
        status = ApplicationStatus(details["status"]).value
        news = ": ".join(filter(None, [status, why_not_healthy(details)]))
        if news != told:
            print_status(f"{app.name} is {news}")
            told = news


def _drain(app: Application, *, within_s: float) -> None:
    print_status("stopping: running requests may end; interrupt again to cut them short")
    _heed_interrupts()
    try:
        app.drain(limit_s=within_s + DRAIN_S)
    except KeyboardInterrupt:
        print_status("running requests are cut short")


def _schema(raw: dict[str, Any]) -> ServeDeploySchema:
    """Return Serve's own object for the file.

    Raises ValueError with a sentence, as `load` does, if Serve refuses it.
    """
    try:
        return ServeDeploySchema.model_validate(raw)
    except ValidationError as error:
        raise ValueError(explain(error)) from error


def _check_port(http: HttpOptions) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise ValueError(
                f"http_options.port={http.port}: {error.strerror} on {http.host}; "
                f"is another server running? Choose one with --set http_options.port=NUMBER"
            ) from error


def _check_cluster(address: str) -> None:
    """Raise LaunchError if nothing listens at the address.

    Ray itself would try for minutes, and log each attempt.
    """
    try:
        check_listening(address)
    except OSError as error:
        raise LaunchError(f"no Ray cluster answers at {address}: {error.strerror or error}") from error


def _heed_interrupts() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    ignore_interrupts()
    raise KeyboardInterrupt
