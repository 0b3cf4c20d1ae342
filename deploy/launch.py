"""`sparkmoe serve`: bring a checked config up on Ray, wait for a token, and take everything down again."""

import contextlib
import json
import logging
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from types import FrameType
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve._private.api import serve_start
from ray.serve.schema import ServeDeploySchema

from deploy.config import ServeFile
from deploy.spec import NAMESPACE, fleet_name
from experts.checkpoint_index import CheckpointIndex
from router.model_config import check_family

POLL_S = 0.5


class LaunchError(Exception):
    """The server could not be started or reached; a sentence for the terminal."""


def launch(config: ServeFile, raw: dict[str, Any], *, address: str) -> None:
    """Serve until SIGINT or SIGTERM. Prints `ready URL` once a decode step has gone through every shard.

    Raises ValueError for a config that cannot work and LaunchError if it does not come up.
    """
    check(config)
    try:
        with _ray(address), _application(config, raw):
            signal.signal(
                signal.SIGTERM, _interrupt
            )  # Ray's own handler is set by ray.init and prints a stack
            _wait_until_ready(config)
            print(f"ready {config.url}", flush=True)
            while True:
                time.sleep(1)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)


def check(config: ServeFile) -> None:
    """What can be known before anything is started: the checkpoint and the port."""
    application = config.applications[0]
    check_family(application.args.model.path)
    with CheckpointIndex(application.args.model.path) as checkpoint:
        num_experts, num_shards = checkpoint.shape.num_experts, application.experts.shards
        if checkpoint.format == "dense":
            path = application.args.model.path
            raise ValueError(f"args.model.path: {path} is not quantised; run `sparkmoe quantize {path} DST`")
    if num_shards > num_experts:
        raise ValueError(
            f"experts.shards={num_shards} is more than the model's {num_experts} experts per layer: "
            "a shard without an expert would do nothing"
        )
    http = config.http_options
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            raise ValueError(
                f"http_options.port={http.port}: {error.strerror} on {http.host}; "
                f"is another server running? Choose one with --set http_options.port=NUMBER"
            ) from error


def readiness(url: str) -> tuple[bool, str, dict[str, Any]]:
    """(ready, why not, detail) of a server. Raises LaunchError if nothing answers."""
    try:
        with urllib.request.urlopen(f"{url}/ready", timeout=10) as response:
            report = json.load(response)
    except urllib.error.HTTPError as error:
        try:
            report = json.load(error)
        except json.JSONDecodeError:
            raise LaunchError(f"{url}/ready answered {error.code}, not ours") from error
    except OSError as error:
        raise LaunchError(f"nothing answers at {url}: {error}") from error
    return bool(report.get("ready")), str(report.get("reason", "")), report.get("detail", {})


@contextlib.contextmanager
def _ray(address: str) -> Iterator[None]:
    """A Ray cluster of our own, which ends with us, or one that runs already."""
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    try:
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            logging_level=logging.WARNING,
            **options,
        )
    except ConnectionError as error:
        raise LaunchError(f"no Ray cluster at {address}: {error}") from error
    try:
        yield
    finally:
        with _uninterrupted():
            ray.shutdown()


@contextlib.contextmanager
def _application(config: ServeFile, raw: dict[str, Any]) -> Iterator[None]:
    """The application on Serve; at the end it, its shards and its Fleet are gone."""
    name = config.applications[0].name
    # What `serve run FILE` calls; there is no public function that takes a file (ray is pinned to 2.60).
    schema = ServeDeploySchema.model_validate(raw)
    client: Any = serve_start(
        http_options=schema.http_options.model_dump(), proxy_location=schema.proxy_location
    )
    try:
        client.deploy_apps(schema)
        yield
    finally:
        with _uninterrupted():
            serve.delete(name)
            stop_fleet(name)


def stop_fleet(app: str) -> None:
    """Stop an application's shards now instead of when their lease lapses."""
    with contextlib.suppress(ValueError, RayActorError):  # there is no Fleet; its death is the answer
        fleet: Any = ray.get_actor(fleet_name(app), NAMESPACE)
        ray.get(fleet.shutdown.remote(), timeout=10)


def _wait_until_ready(config: ServeFile) -> None:
    name = config.applications[0].name
    told = ""
    while True:
        application = serve.status().applications.get(name)
        if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise LaunchError(
                f"the application did not start: {application.message.strip().splitlines()[-1]}"
            )
        with contextlib.suppress(LaunchError):
            ready, reason, detail = readiness(config.url)
            if ready:
                return
            if hopeless := detail.get("hopeless"):
                raise ValueError(hopeless)
            if reason != told:
                print(f"waiting: {reason}", file=sys.stderr, flush=True)
                told = reason
        time.sleep(POLL_S)


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """A second Ctrl-C must not leave half of it running."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
