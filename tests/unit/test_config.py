"""A config that cannot work is refused in one sentence with the dotted path."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.config import load

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))
DEMO = ROOT / "configs" / "demo.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_serve_takes_it_unchanged(path: Path) -> None:
    _, raw = load(path)
    ServeDeploySchema.model_validate(yaml.safe_load(path.read_text()))
    ServeDeploySchema.model_validate(raw)


def test_the_endpoint_stays_on_this_machine_unless_told_otherwise(tmp_path: Path) -> None:
    checked, raw = load(changed(tmp_path, lambda config: config.pop("http_options")))
    assert checked.http_options.host == "127.0.0.1"
    assert raw["http_options"]["host"] == "127.0.0.1", "Serve's own default would be 0.0.0.0"


@pytest.mark.parametrize(
    ("where", "key", "value", "says"),
    [
        ("user_config.experts", "shrads", 3, r"user_config\.experts\.shrads: unknown key"),
        ("user_config.experts", "shards", 0, r"user_config\.experts\.shards: .*greater than or equal to 1"),
        ("user_config.experts", "backend", "b13x", r"user_config\.experts\.backend: .*'torch'"),
        ("args.fabric", "kind", "rdma", r"args\.fabric\.kind: .*'tcp'"),
        (
            "args.fabric",
            "slow_after_s",
            60,
            r"args\.fabric: slow_after_s=60\.0 must be below dead_after_s=10\.0",
        ),
        ("args.router", "max_requests", "many", r"args\.router\.max_requests: .*integer"),
        ("args", "modle", {}, r"args\.modle: unknown key"),
        ("http_options", "prot", 1, r"http_options\.prot: unknown key"),
        ("", "aplications", [], r"aplications: unknown key"),
        ("deployments.0", "num_replcas", 1, r"deployments\.0\.num_replcas: unknown key"),
        ("deployments.0", "num_replicas", 2, r"deployments\.0\.num_replicas: "),
        ("deployments.0", "name", "Ruoter", r"deployments\.0"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_mistake_is_named_with_its_path(
    tmp_path: Path, where: str, key: str, value: Any, says: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        application = config["applications"][0]
        places = {
            "": config,
            "http_options": config["http_options"],
            "args": application["args"],
            "args.fabric": application["args"]["fabric"],
            "args.router": application["args"]["router"],
            "deployments.0": application["deployments"][0],
            "user_config.experts": application["deployments"][0]["user_config"]["experts"],
        }
        places[where][key] = value

    with pytest.raises(ValueError, match=says) as refused:
        load(changed(tmp_path, change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("assignment", "path"),
    [
        ("experts.shards=3", ("applications", 0, "deployments", 0, "user_config", "experts", "shards")),
        ("router.max_requests=3", ("applications", 0, "args", "router", "max_requests")),
        ("router.kv_cache.block_size=3", ("applications", 0, "args", "router", "kv_cache", "block_size")),
        ("http_options.port=3", ("http_options", "port")),
    ],
)
def test_set_finds_its_place_by_name(assignment: str, path: tuple[str | int, ...]) -> None:
    _, raw = load(DEMO, [assignment])
    place: Any = raw
    for step in path:
        place = place[step]
    assert place == 3


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("expert.shards=3", "unknown key 'expert'; known are experts"),
        ("experts.shards", "dotted.key=value"),
        ("experts.shards.x=3", "shards is not a mapping"),
        ("experts.shrads=3", "shrads: unknown key"),
    ],
)
def test_set_with_a_typo_is_refused(assignment: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        load(DEMO, [assignment])


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "No such file"), ("a: [", "not valid YAML"), ("just words", "must be a mapping")],
    ids=["missing", "not YAML", "not a mapping"],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=says):
        load(path)


def changed(folder: Path, change: Any) -> Path:
    """demo.yaml after a change of the plain dict."""
    config = yaml.safe_load(DEMO.read_text())
    change(config)
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
