"""Ray's private names: those that deploy/ray_private.py uses are there and as it needs them, no other file uses one."""

import ast
import asyncio
import inspect
from pathlib import Path
from typing import Any

import pytest
from ray import serve
from ray.serve.schema import ServeDeploySchema
from ray.util.metrics import Counter

from deploy import ray_private
from deploy.app import IngressReplica
from deploy.cli.main import RAY_SETTINGS
from tests.support.places import ROOT

PRIVATE = ROOT / "deploy" / "ray_private.py"
FILES = sorted(path for path in (ROOT / "deploy").rglob("*.py") if path != PRIVATE)


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def test_what_a_node_can_still_reserve_is_asked_without_arguments() -> None:
    from ray._private.state import available_resources_per_node

    assert parameters(available_resources_per_node) == []


def test_a_running_serve_is_looked_for_and_not_started() -> None:
    from ray.serve.context import _get_global_client

    assert parameters(_get_global_client) == ["raise_if_no_controller_running"]
    assert "returns None" in " ".join(str(inspect.getdoc(_get_global_client)).split())


def test_starting_serve_gives_its_client() -> None:
    from ray.serve._private.api import serve_start
    from ray.serve._private.client import ServeControllerClient

    assert {"http_options", "proxy_location"} <= {*parameters(serve_start)}
    assert inspect.signature(serve_start).return_annotation is ServeControllerClient


def test_a_client_of_serve_has_what_we_call() -> None:
    from ray.serve._private.client import ServeControllerClient as Client
    from ray.serve.config import HTTPOptions

    assert "config" in parameters(Client.deploy_apps)
    assert ServeDeploySchema.__name__ in str(inspect.signature(Client.deploy_apps).parameters["config"])
    assert parameters(Client.delete_apps) == ["self", "names", "blocking"]
    assert isinstance(Client.http_config, property)
    assert {"host", "port", "root_path"} <= HTTPOptions.model_fields.keys()
    assert "self._controller" in inspect.getsource(Client.__init__)


def test_the_controller_of_serve_has_what_we_call() -> None:
    from ray.serve._private.controller import ServeController

    for call in (ServeController.get_serve_instance_details, ServeController.graceful_shutdown):
        needed = [p for p in inspect.signature(call).parameters.values() if p.default is p.empty]
        assert [one.name for one in needed] == ["self"]


class Controller:
    """A stand-in for the actor: remembers the options of each call and answers with its name."""

    def __init__(self) -> None:
        self.options_of: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> "Controller":
        return self

    def options(self, **options: Any) -> "Controller":
        self.options_of.append(options)
        return self

    def remote(self) -> str:
        return "call"


class Client:
    def __init__(self) -> None:
        self._controller = Controller()


@pytest.mark.parametrize("timeout_s", [None, 3.0])
def test_details_are_waited_for_as_long_as_asked(
    timeout_s: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.get", lambda call, timeout: {call: timeout})
    assert ray_private.serve_details(Client(), timeout_s=timeout_s) == {"call": timeout_s}


def test_a_shutdown_is_called_once_and_ends_with_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError

    def get(call: object, timeout: float) -> None:
        raise ActorDiedError

    monkeypatch.setattr("ray.get", get)
    client = Client()
    ray_private.shut_serve_down(client, timeout_s=1.0)
    assert client._controller.options_of == [{"max_task_retries": 0}]


def test_a_counter_takes_a_zero_only_in_private(monkeypatch: pytest.MonkeyPatch) -> None:
    recorded: list[tuple[float, dict[str, str]]] = []

    class Metric:
        def record(self, value: float, tags: dict[str, str]) -> None:
            recorded.append((value, tags))

    counter = Counter("sparkmoe_test_total", "", ("rank",))
    monkeypatch.setattr(counter, "_discard_metric", False)
    monkeypatch.setattr(counter, "_metric", Metric())
    with pytest.raises(ValueError, match="must be >0"):
        counter.inc(0, tags={"rank": "1"})
    ray_private.record_zero(counter, {"rank": "1"})
    [(value, tags)] = recorded
    assert (value, tags["rank"]) == (0, "1")


def test_what_serve_keeps_for_a_client_can_be_counted() -> None:
    from ray.serve._private.http_util import MessageQueue
    from ray.serve._private.replica import UserCallableWrapper

    body = UserCallableWrapper.call_http_entrypoint.__code__
    sends = [code for code in body.co_consts if getattr(code, "co_name", "") == "enqueue"]
    assert sends
    assert all("result_queue" in code.co_freevars for code in sends)

    result_queue = MessageQueue()

    async def enqueue(item: Any) -> None:
        result_queue.put_nowait(item)

    unread = ray_private.unread_of(enqueue)
    assert unread is not None
    asyncio.run(enqueue({"type": "http.response.start", "status": 200}))
    for _ in range(2):
        asyncio.run(enqueue({"type": "http.response.body", "body": b"abc"}))
    assert unread() == 6
    assert len(result_queue.get_messages_nowait()) == 3
    assert unread() == 0
    assert ray_private.unread_of(result_queue) is None


def test_serve_builds_the_endpoint_by_the_name_that_we_gave_it() -> None:
    from ray.serve._private.replica import SERVE_BUILD_ASGI_APP_METHOD

    assert ray_private.BUILD_ASGI_APP == SERVE_BUILD_ASGI_APP_METHOD
    assert callable(getattr(IngressReplica, ray_private.BUILD_ASGI_APP))
    serve.ingress()(IngressReplica)
    with pytest.raises(ValueError, match=ray_private.BUILD_ASGI_APP):
        serve.ingress()(type("WithoutIt", (), {}))


@pytest.mark.parametrize("name", [name for name in RAY_SETTINGS if name.startswith("RAY_SERVE_")])
def test_serve_reads_the_settings_that_we_start_it_with(name: str) -> None:
    from ray.serve._private import constants

    assert hasattr(constants, name)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_other_file_uses_a_private_name(path: Path) -> None:
    assert list(private_uses(ast.parse(path.read_text()))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import ray._private.state",
        "from ray._private.state import x",
        "from ray import _private",
        "from ray.serve.context import _get_global_client",
        "import ray.serve._private.api as api",
        "def f():\n    from ray.serve._private.api import serve_start",
        "client._controller.x.remote()",
        "self._client._controller",
        "counter._record(0, {})",
        "ray._private",
        "serve.delete('x', _blocking=False)",
        "getattr(client, '_controller')",
    ],
)
def test_a_private_use_is_found(source: str) -> None:
    assert list(private_uses(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    ["self._client.start()", "cls._rules", "from deploy.api.x import _helper", "os._exit(0)", "f(_x)"],
)
def test_our_own_private_names_are_no_private_use(source: str) -> None:
    assert list(private_uses(ast.parse(source))) == []


def private_uses(tree: ast.AST) -> list[str]:
    """Return the private names of other packages in a module's imports, attributes and keyword arguments.

    An underscored attribute of anything but `self` or `cls` counts, whatever the object is: types are not known here.
    """
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                found += [alias.name for alias in names if is_private(alias.name)]
            case ast.ImportFrom(str(module), names) if module.split(".")[0] == "ray":
                paths = [f"{module}.{alias.name}" for alias in names]
                found += [path for path in paths if is_private(path)]
            case ast.Attribute(ast.Name("self" | "cls")) | ast.Attribute(ast.Name("os"), "_exit"):
                pass
            case ast.Attribute(_, name) if is_private(name):
                found.append(name)
            case ast.Call(ast.Name("getattr" | "setattr" | "hasattr"), [_, ast.Constant(str(name)), *_]) if (
                is_private(name)
            ):
                found.append(name)
            case ast.keyword(str(name)) if is_private(name):
                found.append(name)
    return found


def is_private(path: str) -> bool:
    """Return whether a part of a dotted name is private; a dunder is a protocol and is not."""
    return any(part.startswith("_") and not part.endswith("__") for part in path.split("."))
