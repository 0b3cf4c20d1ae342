"""One YAML file in, one checked object out. It is a Ray Serve config file, so Serve's own commands take it too."""

from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from experts.config import Config, ExpertsConfig, FabricConfig
from router.config import RouterConfig

ROOT = Path(__file__).resolve().parents[1]
"""Relative paths of a config are from here: `build` never sees where the file was."""


class ModelConfig(Config):
    path: Path
    """Directory of the checkpoint, on every node; relative to the directory that holds deploy/."""

    name: str = Field(min_length=1)
    """What clients call it."""

    @field_validator("path")
    @classmethod
    def _from_root(cls, path: Path) -> Path:
        return ROOT / path


class FleetConfig(Config):
    lease_s: float = Field(default=60.0, ge=5)
    """Shards outlive a dead router by this long; a new one that comes in time takes them over."""

    shard_resources: dict[str, float] = Field(default_factory=dict)
    """What Ray reserves for one shard, e.g. {GPU: 1}; empty reserves a GPU where the cluster has any."""

    start_timeout_s: float = Field(default=1800.0, gt=0)
    """A shard that has not loaded its experts by then is given up and started again."""


class AppArgs(Config):
    """`args` of the application: fixed for the life of a router, because Serve restarts it when they change."""

    model: ModelConfig
    fabric: FabricConfig = FabricConfig()
    router: RouterConfig = RouterConfig()
    fleet: FleetConfig = FleetConfig()


class RouterUserConfig(Config):
    """`user_config` of the Router deployment: may change while it serves."""

    experts: ExpertsConfig


class HttpOptions(Config):
    host: str = "127.0.0.1"
    """Serve's own default for a file is 0.0.0.0; the endpoint has no authentication, so ours is this machine."""

    port: int = Field(default=8000, ge=1, le=65535)
    root_path: str = ""
    request_timeout_s: float | None = None
    keep_alive_timeout_s: int = 5


class RouterDeployment(Config):
    name: Literal["Router"]
    num_replicas: Literal[1] = 1
    """One: the KV cache of a request lives in one router."""

    user_config: RouterUserConfig
    ray_actor_options: dict[str, Any] = Field(default_factory=dict)


class IngressDeployment(Config):
    name: Literal["Ingress"]
    num_replicas: int = Field(default=1, ge=1)
    ray_actor_options: dict[str, Any] = Field(default_factory=dict)


class Application(Config):
    name: str = "sparkmoe"
    route_prefix: str = "/"
    import_path: Literal["deploy.app:build"]
    args: AppArgs
    deployments: tuple[RouterDeployment | IngressDeployment, ...]
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
    """The whole file. Serve ignores misspelt deployment fields; we do not."""

    proxy_location: Literal["HeadOnly", "EveryNode", "Disabled"] = "HeadOnly"
    http_options: HttpOptions = HttpOptions()
    logging_config: dict[str, Any] = Field(default_factory=dict)
    applications: tuple[Application] = Field(min_length=1)

    @property
    def url(self) -> str:
        host = "127.0.0.1" if self.http_options.host == "0.0.0.0" else self.http_options.host
        return f"http://{host}:{self.http_options.port}{self.applications[0].route_prefix.rstrip('/')}"


def load(path: Path, overrides: list[str] | None = None) -> tuple[ServeFile, dict[str, Any]]:
    """(the checked file, the same as the plain dict that Serve is given). ValueError says what to mend, and where.

    overrides: `dotted.key=value` from the command line, see `override`.
    """
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must be a mapping with the key `applications`")
    for assignment in overrides or []:
        override(raw, assignment)
    try:
        checked = ServeFile.model_validate(raw)
    except ValidationError as error:
        raise ValueError(f"{path}: {explain(error)}") from error
    raw.setdefault("http_options", {}).setdefault("host", checked.http_options.host)
    raw.setdefault("proxy_location", checked.proxy_location)
    return checked, raw


def explain(error: ValidationError) -> str:
    """One sentence with the dotted path of every mistake."""
    parts = []
    for mistake in error.errors():
        where = ".".join(
            str(part) for part in mistake["loc"] if part not in ("RouterDeployment", "IngressDeployment")
        )
        what = (
            "unknown key"
            if mistake["type"] == "extra_forbidden"
            else mistake["msg"].removeprefix("Value error, ")
        )
        parts.append(f"{where}: {what}" if where else what)
    return "; ".join(parts)


def override(raw: dict[str, Any], assignment: str) -> None:
    """`experts.shards=3` finds its place by name: in the Router's user_config, the args, or the file itself."""
    key, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"--set {assignment}: must be dotted.key=value")
    value = yaml.safe_load(text)
    *parents, leaf = key.split(".")
    top = key.split(".")[0]
    place = _home(raw, top, assignment)
    for parent in parents:
        place = place.setdefault(parent, {})
        if not isinstance(place, dict):
            raise ValueError(f"--set {assignment}: {parent} is not a mapping")
    place[leaf] = value


def _home(raw: dict[str, Any], top: str, assignment: str) -> dict[str, Any]:
    application = (raw.get("applications") or [{}])[0]
    if top in RouterUserConfig.model_fields:
        routers = [d for d in application.get("deployments", []) if d.get("name") == "Router"]
        if routers:
            return routers[0].setdefault("user_config", {})
    if top in AppArgs.model_fields:
        return application.setdefault("args", {})
    if top in ServeFile.model_fields:
        return raw
    known = [*RouterUserConfig.model_fields, *AppArgs.model_fields, *ServeFile.model_fields]
    raise ValueError(f"--set {assignment}: unknown key {top!r}; known are {', '.join(known)}")
