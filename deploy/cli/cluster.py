"""The Ray cluster and the Serve instance that `sparkmoe serve` starts or joins, and how it leaves them."""

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
"""Seconds that the Serve controller or the Fleet may take to answer one call."""

GONE_AFTER_S = 30.0
"""Seconds after which a cluster that does not answer is given up.

A Serve controller that died is back in a few seconds.
"""

DELETE_S = 60.0
POLL_S = 0.1


class ClusterGone(LaunchError):
    """The Ray cluster no longer answers: there is nothing left to ask or to stop."""


class Application:
    """Our application on a Serve instance. started: we started that Serve; it did not run before."""

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
        """Return what Serve says of it (`status`, `message`, `deployments`), None if it was deleted.

        Raises ClusterGone.
        """
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
        """Let running requests end, while new ones are refused. An error is printed, not raised."""

        async def drain() -> None:  # in an event loop: RAY_SETTINGS has Serve's handles live in the caller's
            router: Any = serve.get_deployment_handle("Router", app_name=self.name)
            await within(limit_s, router.drain.remote())

        with _errors_printed("running requests are cut short"):
            asyncio.run(drain())
        # The handle would log that its loop has ended.
        logging.getLogger("ray.serve").setLevel(logging.CRITICAL)

    def remove(self) -> None:
        """Stop the application, Serve if we started it, and the Fleet.

        A step that fails is printed; the next is taken.
        """
        with _errors_printed("Serve did not stop in order"):
            if self._started:
                ray_private.shut_serve_down(self._client, timeout_s=DELETE_S)
            else:
                ray_private.delete_applications(self._client, [self.name])
                self._wait_until_deleted()
        with _errors_printed("shards are left until their lease lapses (fleet.lease_s)"):
            stop_fleet(self.name)

    def _ask(self) -> dict[str, Any] | None:
        # While the cluster's GCS does not answer, Ray would wait for it, and then end this process.
        check_listening(ray.get_runtime_context().gcs_address)
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
    """Join the Ray cluster at an address, or start one (`local`) that ends with this context.

    Raises LaunchError.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # below that it logs each of our steps
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
        except (ConnectionError, RuntimeError, ValueError) as error:  # Ray has no error of its own for this
            did = "start a Ray cluster" if address == "local" else f"join a Ray cluster at {address}"
            raise LaunchError(f"cannot {did}: {first_and_last_line(str(error))}") from error
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own handler prints a stack
        yield
    finally:
        ignore_interrupts()
        ray.shutdown()


@contextlib.contextmanager
def application(name: str, schema: ServeDeploySchema) -> Iterator[Application]:
    """Deploy the application of a Serve config file, and stop it, its shards and its Fleet at the end.

    Serve ends with it, unless Serve ran before. Raises LaunchError if Serve runs other applications, or with
    other options than the file's.
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
    """Raise LaunchError if a Serve that runs already cannot serve our file, too.

    Deploying a file deletes the applications that it does not name, and Serve takes the options of its
    proxies only once.
    """
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
    """Stop an application's shards now instead of when their lease lapses.

    Raises RayError if they do not stop.
    """
    try:
        fleet: Any = ray.get_actor(fleet_name(app), NAMESPACE)
    except ValueError:
        return  # there is no Fleet
    try:
        # Calls of the Fleet are repeated until they succeed, which this one never does: the actor ends itself in it.
        ray.get(fleet.shutdown.options(max_task_retries=0).remote(), timeout=ANSWER_S)
    except RayTaskError:
        raise
    except RayActorError:
        return  # the call ends with the death of the actor


def ignore_interrupts() -> None:
    """Ignore SIGINT and SIGTERM from now on: a second Ctrl-C must not leave half of what we stop running."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def check_listening(address: str) -> None:
    """Raise OSError if nothing listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()


def first_and_last_line(message: str) -> str:
    """Return the first and the last line of a message as one.

    What stands between them is a stack or a long story.
    """
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(lines[:1] + lines[1:][-1:])


def print_status(line: str) -> None:
    """Write a line for the person at the terminal to stderr; stdout is for the `ready` line alone."""
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
    """Print an error of this context instead of raising it, because there is more to stop."""
    try:
        yield
    except (RayError, RayServeException, OSError) as error:  # TimeoutError is an OSError
        print_status(f"{what}: {first_and_last_line(str(error))}")
