"""The one file of deploy/ that uses Ray's private names, each with the reason.

Ray may change a private name in any release, so pyproject.toml pins Ray to one minor version, and
tests/unit/house/test_ray_private.py pins what each function relies on. Ray is imported inside the functions:
the Fleet and the shards import this file, and must not wait for Serve, which imports FastAPI.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import ProxyLocation
    from ray.serve.schema import ServeDeploySchema
    from ray.util.metrics import Counter
    from starlette.types import Send

BUILD_ASGI_APP = "__serve_build_asgi_app__"
"""The name of the method by which a replica builds its ASGI app.

Serve calls it after the constructor, in the replica's event loop. deploy.app.IngressReplica has to define it
under exactly this name. Only the docstring of `serve.ingress` mentions it; the documented ways pass an app or
a function without arguments, and ours needs the replica's handle to the router. If Ray renames it,
`serve.ingress()(IngressReplica)` raises ValueError while the application is built.
"""


def unread_of(send: "Send") -> "Callable[[], int] | None":
    """Return a function that tells how many bytes of an answer Serve keeps because its client does not read.

    send: the one with which Serve calls the ASGI app. Behind Serve's proxy in Python it never waits: what it
    is given goes to a queue without a bound, all of which becomes one gRPC message. None if there is no such
    queue: behind HAProxy it is uvicorn's `send`, which waits. If Ray changes it, an answer is kept whole for a
    client that does not read, and one of more than 4 MiB may fail.
    """
    code = getattr(send, "__code__", None)
    if code is None or "result_queue" not in code.co_freevars:
        return None
    queue: Any = send.__closure__[code.co_freevars.index("result_queue")].cell_contents  # type: ignore[attr-defined]
    messages = queue._message_queue
    return lambda: sum(len(message.get("body", b"")) for message in tuple(messages))


def available_resources_by_node() -> Mapping[str, Mapping[str, float]]:
    """Return what Ray can still reserve on every node, by node id and name of the resource.

    The Fleet chooses the node of a shard by it. The public `ray.available_resources` has only the sum over
    all nodes, and `ray.nodes` has only totals. If Ray changes it, no shard finds a node: the Fleet's keepers
    fail and say so.
    """
    from ray._private.state import available_resources_per_node

    return available_resources_per_node()


def running_serve() -> Any:
    """Return the client of the Serve instance that runs on this cluster, None if there is none.

    The other functions here take this client. Every public function of Serve either starts an instance if
    there is none or gives no client. If Ray changes it, `sparkmoe serve` fails at its start.
    """
    from ray.serve.context import _get_global_client

    return _get_global_client(raise_if_no_controller_running=False)


def start_serve(http_options: dict[str, Any], proxy_location: "ProxyLocation") -> Any:
    """Start Serve on this cluster and return its client.

    The public `serve.start` makes the same call and returns None. If Ray changes it, `sparkmoe serve` fails
    at its start.
    """
    from ray.serve._private.api import serve_start

    return serve_start(http_options=http_options, proxy_location=proxy_location)


def http_options(client: Any) -> dict[str, Any]:
    """Return the HTTP options that a running Serve instance was started with.

    They decide whether `sparkmoe serve` may use it. No public function returns them. If Ray changes it,
    `sparkmoe serve` fails at its start where it joins a cluster on which Serve runs.
    """
    return client.http_config.model_dump()


def serve_details(client: Any, *, timeout_s: float | None) -> dict[str, Any]:
    """Return what Serve says of itself and its applications, as the dict behind ServeInstanceDetails.

    Raises RayError (GetTimeoutError among them) if the controller has not answered within timeout_s; None
    waits for ever. The public `serve.status` makes the same call, but without a timeout, and its result lacks
    the proxies' location. If Ray changes it, `sparkmoe serve` fails as soon as it has deployed.
    """
    import ray

    return ray.get(client._controller.get_serve_instance_details.remote(), timeout=timeout_s)


def deploy_file(client: Any, schema: "ServeDeploySchema") -> None:
    """Deploy the applications of a Serve config file, as `serve deploy FILE` does.

    Applications that the file does not name are deleted. The public `serve.run` takes an application object,
    not a file; the REST API that takes one needs Ray's dashboard. If Ray changes it, `sparkmoe serve` fails
    when it deploys.
    """
    client.deploy_apps(schema)


def delete_applications(client: Any, names: Sequence[str]) -> None:
    """Tell Serve to delete these applications, and return before it has done so.

    The public `serve.delete` blocks for up to a minute unless its underscored `_blocking` is set. If Ray
    changes it, `sparkmoe serve` ends with a traceback, and leaves its application on a cluster that it has
    joined.
    """
    client.delete_apps(list(names), blocking=False)


def shut_serve_down(client: Any, *, timeout_s: float) -> None:
    """Shut Serve down, and return when its controller has ended.

    Raises RayError if that takes longer than timeout_s. The public `serve.shutdown` repeats its call to the
    controller until it succeeds, which the controller that ends never lets it, and prints that to the
    terminal. If Ray changes it, `sparkmoe serve` ends with a traceback, and leaves Serve on a cluster that it
    has joined; one of its own ends all the same.
    """
    import ray
    from ray.exceptions import RayActorError

    try:
        # max_task_retries=0: by default the handle repeats a call that the death of its actor has cut short.
        ray.get(client._controller.graceful_shutdown.options(max_task_retries=0).remote(), timeout=timeout_s)
    except RayActorError:
        return  # the call ends with the controller's death


def record_zero(counter: "Counter", tags: dict[str, str]) -> None:
    """Make a counter appear in the metrics with the value 0.

    Else it would be absent before its first event, and Prometheus would take that event's value for no
    growth. The public `Counter.inc` refuses a zero. If Ray changes it, the router does not start.
    """
    counter._record(0, tags)
