"""The Ray cluster and the Serve instance under `sparkmoe serve`: what it starts or finds, and how it leaves them."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.config import ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeDeploySchema

from deploy import ray_private
from deploy.cli.readiness import LaunchError
from deploy.fleet.spec import NAMESPACE, fleet_name
from deploy.within import within

ANSWER_S = 10.0
"""How long the Serve controller or the Fleet may take over one call."""

GONE_AFTER_S = 30.0
"""A cluster that has not answered for so long is given up; a Serve controller is back in a few seconds."""

DELETE_S = 60.0
POLL_S = 0.1


class ClusterGone(LaunchError):
    """Nothing of the cluster is left to be asked, or to be stopped."""


class Application:
    """Our application on a Serve instance. started: Serve was not there before."""

    def __init__(self, client: Any, name: str, *, started: bool) -> None:
        self._client = client
        self.name = name
        self._started = started

    def deploy(self, schema: ServeDeploySchema) -> None:
        """Deploy the application of a Serve config file. Raises LaunchError if Serve does not take it."""
        try:
            ray_private.deploy_file(self._client, schema)
        except RayError as error:
            raise LaunchError(f"Serve did not take the file: {first_and_last_line(str(error))}") from error

    def details(self) -> dict[str, Any] | None:
        """What Serve knows of it: `status`, `message`, `deployments`; None if it was deleted. Raises ClusterGone."""
        ends = time.monotonic() + GONE_AFTER_S
        while True:
            try:
                return self._ask()
            except (RayError, OSError) as error:
                if time.monotonic() > ends:
                    raise ClusterGone(
                        f"the Ray cluster is gone: {first_and_last_line(str(error))}"
                    ) from error
                time.sleep(POLL_S)

    def drain(self, *, limit_s: float) -> None:
        """Its running requests end, while new ones are refused. What goes wrong with it is told."""

        async def drain() -> None:  # in a loop: where Serve's handles live, see RAY_SETTINGS
            router: Any = serve.get_deployment_handle("Router", app_name=self.name)
            await within(limit_s, router.drain.remote())

        with _errors_printed("running requests are cut short"):
            asyncio.run(drain())
        logging.getLogger("ray.serve").setLevel(
            logging.CRITICAL
        )  # the handle complains that its loop has ended

    def remove(self) -> None:
        """It ends, and Serve does if it was started for it. A step that fails is told, and the next is taken."""
        with _errors_printed("Serve did not stop in order"):
            if self._started:
                ray_private.shut_serve_down(self._client, timeout_s=DELETE_S)
            else:
                ray_private.delete_applications(self._client, [self.name])
                self._wait_until_deleted()
        with _errors_printed("shards are left until their lease lapses (fleet.lease_s)"):
            stop_fleet(self.name)

    def _ask(self) -> dict[str, Any] | None:
        check_listening(
            ray.get_runtime_context().gcs_address
        )  # while it is away, Ray would wait, then end this process
        details = ray_private.serve_details(self._client, timeout_s=ANSWER_S)
        return details["applications"].get(self.name)

    def _wait_until_deleted(self) -> None:
        ends = time.monotonic() + DELETE_S
        while self._ask() is not None:
            if time.monotonic() > ends:
                raise TimeoutError(f"{self.name} was not deleted within {DELETE_S:.0f} s")
            time.sleep(POLL_S)


@contextlib.contextmanager
def cluster(address: str) -> Iterator[None]:
    """A Ray cluster of our own (`local`), which ends with us, or one that runs already."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # it would tell of each of our steps
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(
                address=address,
                namespace=NAMESPACE,
                log_to_driver=False,
                logging_level=logging.WARNING,
                **options,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:  # Ray has no error of its own for it
            did = "start a Ray cluster" if address == "local" else f"join a Ray cluster at {address}"
            raise LaunchError(f"cannot {did}: {first_and_last_line(str(error))}") from error
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler prints a stack
        yield
    finally:
        ignore_interrupts()
        ray.shutdown()


@contextlib.contextmanager
def application(name: str, schema: ServeDeploySchema) -> Iterator[Application]:
    """The application of a Serve config file, deployed; at the end it, its shards and its Fleet are gone.

    Serve ends with it, unless it ran before. Raises LaunchError if it ran for others or with other options.
    """
    running = ray_private.running_serve()
    if running is not None:
        details = ray_private.serve_details(running, timeout_s=None)
        refuse_to_share(details, ray_private.http_options(running), schema)
    app = Application(running or _start_serve(schema), name, started=running is None)
    gone = False
    try:
        app.deploy(schema)
        yield app
    except ClusterGone:
        gone = True
        raise
    finally:
        ignore_interrupts()
        if not gone:
            print_status("stopping")
            app.remove()


def refuse_to_share(
    details: Mapping[str, Any], http_options: Mapping[str, Any], schema: ServeDeploySchema
) -> None:
    """LaunchError if a Serve that runs already cannot be ours too: a file deletes what it does not name,
    and Serve takes its proxies' options once."""
    if names := ", ".join(details["applications"]):
        raise LaunchError(
            f"Serve on this cluster already runs {names}, which serving another file would delete; "
            "change it with `serve deploy`, or stop it first with `serve shutdown --yes`"
        )
    found = {"proxy_location": ProxyLocation(details["proxy_location"]).value, **http_options}
    wanted = {"proxy_location": schema.proxy_location.value, **schema.http_options.model_dump()}
    for key, value in wanted.items():
        if found[key] != value:
            where = key if key == "proxy_location" else f"http_options.{key}"
            raise LaunchError(
                f"Serve on this cluster already runs with {where}={found[key]}, not {value}; "
                "set the same, or stop it first with `serve shutdown --yes`"
            )


def stop_fleet(app: str) -> None:
    """Stop an application's shards now instead of when their lease lapses. RayError if they do not stop."""
    try:
        fleet: Any = ray.get_actor(fleet_name(app), NAMESPACE)
    except ValueError:
        return  # there is none
    try:
        # Its handle's calls are repeated until they succeed, which the actor that ends itself never does.
        ray.get(fleet.shutdown.options(max_task_retries=0).remote(), timeout=ANSWER_S)
    except RayTaskError:
        raise
    except RayActorError:
        return  # its death is the answer


def ignore_interrupts() -> None:
    """From now on: a second Ctrl-C must not leave half of it running."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def check_listening(address: str) -> None:
    """OSError if nothing listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()


def first_and_last_line(message: str) -> str:
    """One line of a message: what comes between its first and its last line is a stack or a long story."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:1] + lines[1:][-1:])


def print_status(line: str) -> None:
    """A line for the person at the terminal; stdout is for `ready` alone."""
    sys.stderr.write(f"{line}\n")


def _start_serve(schema: ServeDeploySchema) -> Any:
    try:
        return ray_private.start_serve(schema.http_options.model_dump(), schema.proxy_location)
    except BaseException as error:
        ignore_interrupts()
        with _errors_printed("Serve did not stop in order"):
            serve.shutdown()
        if isinstance(error, RayError | RayServeException | TimeoutError | RuntimeError):
            raise LaunchError(f"Serve did not start: {first_and_last_line(str(error))}") from error
        raise


@contextlib.contextmanager
def _errors_printed(what: str) -> Iterator[None]:
    """An error becomes a line: there is more to stop."""
    try:
        yield
    except (RayError, RayServeException, OSError) as error:  # TimeoutError is an OSError
        print_status(f"{what}: {first_and_last_line(str(error))}")
