"""The config file: read from YAML, changed by `--set`, and checked into one ServeFile.

It is a Ray Serve config file, so Serve's own commands take it too.
"""

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field, ValidationError, model_validator

from deploy.api.config import ApiConfig
from deploy.paths import FromRoot
from experts.config import Config, ExpertsConfig, FabricConfig
from router.config import RouterConfig

Amount = Annotated[float, Field(ge=0)]


class ModelConfig(Config):
    """The checkpoint that is served."""

    path: FromRoot
    """The directory of the checkpoint, the same on every node; relative to the directory that holds deploy/.
    """

    name: str = Field(min_length=1)
    """The name by which clients ask for the model."""


class FleetConfig(Config):
    """The settings of the Fleet, which keeps the expert shards."""

    lease_s: float = Field(default=60.0, ge=5)
    """Shards outlive a dead router by this many seconds; a new router that comes in time takes them over."""

    shard_resources: dict[str, Amount] = Field(default_factory=dict)
    """The resources that Ray reserves for one shard, e.g. {GPU: 1}.

    Empty reserves a GPU where the cluster has any.
    """

    start_timeout_s: float = Field(default=1800.0, gt=0)
    """A shard that has not loaded its experts after this many seconds is given up and started again."""


class AppArgs(Config):
    """The `args` of the application.

    They are fixed for the life of a router, because Serve restarts it when they change.
    """

    model: ModelConfig
    fabric: FabricConfig = FabricConfig()
    router: RouterConfig = RouterConfig()
    fleet: FleetConfig = FleetConfig()
    api: ApiConfig = ApiConfig()


class RouterUserConfig(Config):
    """The `user_config` of the Router deployment; it may change while the router serves."""

    experts: ExpertsConfig


class HttpOptions(Config):
    """The options of Serve's HTTP proxies."""

    host: str = "127.0.0.1"
    """The address to listen on.

    Serve's own default for a file is 0.0.0.0; ours is this machine only, because the endpoint asks for no key
    unless told to.
    """

    port: int = Field(default=8000, ge=1, le=65535)
    root_path: str = ""
    request_timeout_s: float | None = Field(default=None, gt=0)
    keep_alive_timeout_s: int = Field(default=5, ge=0)


class ActorOptions(Config):
    """The resources and the environment that Ray gives a replica."""

    num_cpus: Amount | None = None
    num_gpus: Amount | None = None
    memory: Amount | None = None
    resources: dict[str, Amount] = Field(default_factory=dict)
    accelerator_type: str | None = None
    runtime_env: dict[str, Any] = Field(default_factory=dict)


class RouterDeployment(Config):
    """The deployment that holds the engine."""

    name: Literal["Router"]
    num_replicas: Literal[1] = 1
    """There is exactly one replica, because the KV cache of a request lives in one router."""

    user_config: RouterUserConfig
    ray_actor_options: ActorOptions = ActorOptions()


class IngressDeployment(Config):
    """The deployment that answers HTTP."""

    name: Literal["Ingress"]
    num_replicas: int = Field(default=1, ge=1)
    ray_actor_options: ActorOptions = ActorOptions()


DEPLOYMENTS: dict[str, type[Config]] = {"Router": RouterDeployment, "Ingress": IngressDeployment}


class Application(Config):
    """The one application of a config file."""

    name: str = Field(default="sparkmoe", min_length=1)
    route_prefix: str = Field(default="/", pattern="^/")
    import_path: Literal["deploy.app:build"]
    args: AppArgs
    deployments: tuple[Annotated[RouterDeployment | IngressDeployment, Field(discriminator="name")], ...]
    runtime_env: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_router(self) -> "Application":
        names = [deployment.name for deployment in self.deployments]
        if names.count("Router") != 1 or names.count("Ingress") > 1:
            raise ValueError(f"deployments must name Router once and Ingress at most once, got {names}")
        return self

    @property
    def experts(self) -> ExpertsConfig:
        return next(d.user_config.experts for d in self.deployments if isinstance(d, RouterDeployment))


class ServeFile(Config):
    """The whole config file. Serve ignores misspelt fields of a deployment; we refuse them."""

    proxy_location: Literal["HeadOnly", "EveryNode"] = "HeadOnly"
    http_options: HttpOptions = HttpOptions()
    logging_config: dict[str, Any] = Field(default_factory=dict)
    applications: tuple[Application]

    @model_validator(mode="after")
    def _ours_before_serves(self) -> "ServeFile":
        ours, serves = self.applications[0].args.api.request_timeout_s, self.http_options.request_timeout_s
        if ours is not None and serves is not None and ours >= serves:
            raise ValueError(
                f"args.api.request_timeout_s={ours} must be below http_options.request_timeout_s={serves}, "
                "when Serve cuts the connection"
            )
        return self

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.http_options.host == "0.0.0.0" else self.http_options.host
        return f"http://{host}:{self.http_options.port}{self.applications[0].route_prefix.rstrip('/')}"


def load(path: Path, overrides: Sequence[str] = ()) -> tuple[ServeFile, dict[str, Any]]:
    """Return the checked file, and the same as the plain dict that Serve is given.

    overrides: `dotted.key=value` from the command line, see `override`. Raises ValueError that says what to
    mend, and where.
    """
    try:
        raw = _parse(path.read_bytes(), where=str(path))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must be a mapping with the key `applications`")
    for assignment in overrides:
        override(raw, assignment)
    try:
        checked = ServeFile.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from error
    raw.setdefault("http_options", {}).setdefault("host", checked.http_options.host)
    raw.setdefault("proxy_location", checked.proxy_location)
    return checked, raw


def override(raw: dict[str, Any], assignment: str) -> None:
    """Set one value of a parsed file, e.g. `experts.shards=3`.

    The first part of the key decides where it belongs: the Router's user_config, the args, or the file
    itself. Raises ValueError for a key or a value that cannot be set.
    """
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"--set {_line(assignment)}: must be dotted.key=value")
    value = _parse(text, where=f"--set {_line(assignment)}")
    *parents, leaf = key.split(".")
    try:
        place = _home(raw, key.split(".")[0])
        for parent in parents:
            place = _below(place, parent)
    except ValueError as error:
        raise ValueError(f"--set {_line(assignment)}: {_line(str(error))}") from error
    place[leaf] = value


def explain(error: ValidationError) -> str:
    """Return one sentence that names every mistake by its dotted path."""
    return _line(
        "; ".join(_explain(one["type"], one["loc"], one["msg"], one.get("ctx", {})) for one in error.errors())
    )


def _explain(kind: str, loc: tuple[int | str, ...], message: str, context: dict[str, Any]) -> str:
    where = ".".join(str(step) for at, step in enumerate(loc) if not _is_tag(loc, at))
    match kind:
        case "extra_forbidden":
            what = "unknown key" + _suggest(str(loc[-1]), _keys(loc[:-1]))
        case "missing":
            what = "missing"
        case "union_tag_not_found":
            where, what = f"{where}.name", "missing"
        case "union_tag_invalid":
            tag = str(context["tag"])
            where = f"{where}.name"
            what = f"must be {' or '.join(DEPLOYMENTS)}, not {tag}" + _suggest(tag, DEPLOYMENTS)
        case _:
            what = message.removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def _is_tag(loc: tuple[int | str, ...], at: int) -> bool:
    """Return whether this step of a path is the tag that pydantic inserts for the kind of deployment."""
    return at >= 2 and loc[at - 2] == "deployments" and loc[at] in DEPLOYMENTS


def _suggest(wrong: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(wrong, known, n=1)
    return f"; did you mean `{close[0]}`?" if close else ""


def _keys(loc: tuple[int | str, ...]) -> list[str]:
    """Return the keys that the mapping at this place of the file may have."""
    here: Any = ServeFile
    for at, step in enumerate(loc):
        if isinstance(step, int):
            here = get_args(here)[0]
        else:
            here = DEPLOYMENTS[step] if _is_tag(loc, at) else here.model_fields[step].annotation
    return list(here.model_fields)


def _home(raw: dict[str, Any], top: str) -> dict[str, Any]:
    """Return the mapping of the file to which the key `top` belongs."""
    if top in RouterUserConfig.model_fields:
        return _below(_router(_application(raw)), "user_config")
    if top in AppArgs.model_fields:
        return _below(_application(raw), "args")
    if top in ServeFile.model_fields:
        return raw
    known = [*RouterUserConfig.model_fields, *AppArgs.model_fields, *ServeFile.model_fields]
    raise ValueError(f"unknown key {top!r}; known are {', '.join(known)}{_suggest(top, known)}")


def _application(raw: dict[str, Any]) -> dict[str, Any]:
    match raw.get("applications"):
        case [dict() as application, *_]:
            return application
    raise ValueError("the file has no application")


def _router(application: dict[str, Any]) -> dict[str, Any]:
    match application.get("deployments"):
        case list() as deployments:
            for deployment in deployments:
                if isinstance(deployment, dict) and deployment.get("name") == "Router":
                    return deployment
    raise ValueError("the application has no deployment Router")


def _below(place: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the mapping at `key`; make an empty one if there is none."""
    below = place[key] = {} if place.get(key) is None else place[key]
    if not isinstance(below, dict):
        raise ValueError(f"{key} is not a mapping")
    return below


def _parse(text: str | bytes, *, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except Exception as error:  # PyYAML passes on whatever int(), a date or a regex raises
        raise ValueError(f"{where}: not valid YAML: {_line(str(error))}") from error


def _line(text: str) -> str:
    return " ".join(text.split())
