"""A config that cannot work is refused in one sentence with the dotted path."""

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from ray.serve.schema import ServeDeploySchema

from deploy.config import AppArgs, RouterUserConfig, ServeFile, load
from tests.support.places import DEMO_CONFIG, ROOT

CONFIGS = sorted(ROOT.glob("configs/*.yaml"))


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
        ("", "aplications", [], "aplications: unknown key; did you mean `applications`?"),
        ("http_options", "prot", 1, "http_options.prot: unknown key; did you mean `port`?"),
        ("application", "args", ..., "applications.0.args: missing"),
        ("application", "deployments", None, "applications.0.deployments: Input should be a valid tuple"),
        ("args", "model", ..., "applications.0.args.model: missing"),
        ("args", "wombat", {}, "applications.0.args.wombat: unknown key"),
        (
            "args.router",
            "max_request",
            1,
            "applications.0.args.router.max_request: unknown key; did you mean `max_requests`?",
        ),
        (
            "args.router",
            "max_requests",
            "many",
            "applications.0.args.router.max_requests: "
            "Input should be a valid integer, unable to parse string as an integer",
        ),
        (
            "args.fabric",
            "slow_after_s",
            60,
            "applications.0.args.fabric: slow_after_s=60.0 must be below dead_after_s=10.0",
        ),
        (
            "args.router",
            "stall_limit_s",
            math.inf,
            "applications.0.args.router.stall_limit_s: Input should be a finite number",
        ),
        (
            "args.router",
            "kv_cache",
            {"dtype": "fp8"},
            "applications.0.args.router.kv_cache.dtype: Input should be 'auto' or 'fp8_e4m3'",
        ),
        (
            "args",
            "fleet",
            {"shard_resources": {"GPU": -1}},
            "applications.0.args.fleet.shard_resources.GPU: Input should be greater than or equal to 0",
        ),
        (
            "args",
            "fleet",
            {"shard_resources": {"GPU": math.nan}},
            "applications.0.args.fleet.shard_resources.GPU: Input should be a finite number",
        ),
        (
            "args",
            "api",
            {"key_file": "keys"},
            "applications.0.args.api.key_file: unknown key; did you mean `keys_file`?",
        ),
        (
            "args",
            "api",
            {"cors_origins": ["https://chat.example.org/"]},
            "applications.0.args.api.cors_origins.0: "
            r"String should match pattern '^(\*|https?://[^/\s]+)$'",
        ),
        (
            "args",
            "api",
            {"request_timeout_s": 0},
            "applications.0.args.api.request_timeout_s: Input should be greater than 0",
        ),
        (
            "deployment",
            "num_replcas",
            1,
            "applications.0.deployments.0.num_replcas: unknown key; did you mean `num_replicas`?",
        ),
        ("deployment", "num_replicas", 2, "applications.0.deployments.0.num_replicas: Input should be 1"),
        (
            "deployment",
            "name",
            "Ruoter",
            "applications.0.deployments.0.name: must be Router or Ingress, not Ruoter; did you mean `Router`?",
        ),
        ("deployment", "name", ..., "applications.0.deployments.0.name: missing"),
        (
            "deployment",
            "ray_actor_options",
            {"num_gpu": 1},
            "applications.0.deployments.0.ray_actor_options.num_gpu: unknown key; did you mean `num_gpus`?",
        ),
        (
            "experts",
            "shrads",
            3,
            "applications.0.deployments.0.user_config.experts.shrads: unknown key; did you mean `shards`?",
        ),
        (
            "experts",
            "shards",
            0,
            "applications.0.deployments.0.user_config.experts.shards: "
            "Input should be greater than or equal to 1",
        ),
    ],
    ids=lambda value: str(value)[:24],
)
def test_a_mistake_is_one_sentence_with_its_path(
    tmp_path: Path, where: str, key: str, value: Any, says: str
) -> None:
    def change(config: dict[str, Any]) -> None:
        application = config["applications"][0]
        places = {
            "": config,
            "http_options": config["http_options"],
            "application": application,
            "args": application["args"],
            "args.fabric": application["args"]["fabric"],
            "args.router": application["args"]["router"],
            "deployment": application["deployments"][0],
            "experts": application["deployments"][0]["user_config"]["experts"],
        }
        if value is ...:
            del places[where][key]
        else:
            places[where][key] = value

    path = changed(tmp_path, change)
    assert refusal(path) == f"{path}: {says}"


def test_serve_must_not_cut_what_we_would_end() -> None:
    limits = ("api.request_timeout_s=60", "http_options.request_timeout_s=30")
    assert refusal(DEMO_CONFIG, *limits) == (
        f"{DEMO_CONFIG}: args.api.request_timeout_s=60.0 must be below http_options.request_timeout_s=30.0, "
        "when Serve cuts the connection"
    )
    load(DEMO_CONFIG, ["api.request_timeout_s=20", "http_options.request_timeout_s=30"])


def test_every_mistake_is_named(tmp_path: Path) -> None:
    path = changed(tmp_path, lambda config: config.update(applications=[{"import_path": "deploy.app:build"}]))
    assert refusal(path) == f"{path}: applications.0.args: missing; applications.0.deployments: missing"


@pytest.mark.parametrize(
    ("assignment", "path"),
    [
        ("experts.shards=3", ("applications", 0, "deployments", 0, "user_config", "experts", "shards")),
        ("router.max_requests=3", ("applications", 0, "args", "router", "max_requests")),
        ("router.kv_cache.block_size=3", ("applications", 0, "args", "router", "kv_cache", "block_size")),
        ("api.max_body_mib=3", ("applications", 0, "args", "api", "max_body_mib")),
        ("http_options.port=3", ("http_options", "port")),
    ],
)
def test_set_finds_its_place_by_name(assignment: str, path: tuple[str | int, ...]) -> None:
    _, raw = load(DEMO_CONFIG, [assignment])
    place: Any = raw
    for step in path:
        place = place[step]
    assert place == 3


KNOWN = (
    "experts, model, fabric, router, fleet, api, proxy_location, http_options, logging_config, applications"
)


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        (
            "expert.shards=3",
            f"--set expert.shards=3: unknown key 'expert'; known are {KNOWN}; did you mean `experts`?",
        ),
        ("experts.shards", "--set experts.shards: must be dotted.key=value"),
        ("experts.shards.x=3", "--set experts.shards.x=3: shards is not a mapping"),
        (
            "experts.shrads=3",
            f"{DEMO_CONFIG}: applications.0.deployments.0.user_config.experts.shrads: "
            "unknown key; did you mean `shards`?",
        ),
        ("applications=x", f"{DEMO_CONFIG}: applications: Input should be a valid tuple"),
        ("applications=[]", f"{DEMO_CONFIG}: applications.0: missing"),
        (
            "model.path=[",
            "--set model.path=[: not valid YAML: while parsing a flow node expected the node content, "
            "but found '<stream end>' in \"<unicode string>\", line 1, column 2: [ ^",
        ),
    ],
)
def test_set_with_a_mistake_is_refused(assignment: str, says: str) -> None:
    assert refusal(DEMO_CONFIG, assignment) == says


def test_set_after_a_set_that_broke_the_file() -> None:
    assert (
        refusal(DEMO_CONFIG, "applications=x", "model.name=y")
        == "--set model.name=y: the file has no application"
    )
    assert refusal(DEMO_CONFIG, "applications=[{}]", "experts.shards=1") == (
        "--set experts.shards=1: the application has no deployment Router"
    )


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "No such file or directory"),
        (b"a: [", "not valid YAML: while parsing a flow node expected the node content"),
        (b"\xff\xfe\x00", "not valid YAML: "),
        (b"on: 2020-13-45", "not valid YAML: month must be in 1..12"),
        (b"[" * 5000, "not valid YAML: maximum recursion depth exceeded"),
        (b"just words", "must be a mapping with the key `applications`"),
    ],
    ids=["missing", "not YAML", "not text", "no date", "deep", "not a mapping"],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_bytes(content)
    assert refusal(path).startswith(f"{path}: {says}")


KEYS = st.sampled_from(
    [
        *RouterUserConfig.model_fields,
        *AppArgs.model_fields,
        *ServeFile.model_fields,
        "name",
        "deployments",
        "shards",
    ]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
YAML = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | LEAVES, inner, max_size=3),
    max_leaves=12,
)


@given(replacement=YAML, place=st.lists(st.integers(0, 5), max_size=8))
def test_any_yaml_is_a_config_or_refused_in_one_line(
    replacement: Any, place: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """demo.yaml with something else anywhere in it."""
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(yaml.safe_dump(_replaced(yaml.safe_load(DEMO_CONFIG.read_text()), place, replacement)))
    loads_or_refuses(path)


@given(text=st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_file_is_a_config_or_refused_in_one_line(
    text: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text)
    loads_or_refuses(path)


@given(
    keys=st.lists(KEYS | st.text(max_size=5), max_size=4),
    value=st.text(max_size=12)
    | st.sampled_from(["!!timestamp x", "!!int ''", "2020-13-45", "{a: [}", "&a [*a]"]),
)
@example(keys=["router", "kv_cache"], value="")
@example(keys=["model", "name", "x"], value="1")
def test_any_set_is_a_config_or_refused_in_one_line(keys: list[str], value: str) -> None:
    loads_or_refuses(DEMO_CONFIG, f"{'.'.join(keys)}={value}")
    loads_or_refuses(DEMO_CONFIG, value)


def _replaced(tree: Any, place: list[int], replacement: Any) -> Any:
    """Return the tree with another value at a place; an index is the n-th child, round and round."""
    if not place or not isinstance(tree, dict | list) or not tree:
        return replacement
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = keys[place[0] % len(keys)]
    tree[key] = _replaced(tree[key], place[1:], replacement)
    return tree


def loads_or_refuses(path: Path, *overrides: str) -> None:
    said = "one line"
    try:
        load(path, overrides)
    except ValueError as error:
        said = str(error)
    assert len(said.splitlines()) == 1


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 the whole message is compared
        load(path, overrides)
    return str(refused.value)


def changed(folder: Path, change: Any) -> Path:
    """Return demo.yaml after a change of the plain dict."""
    config = yaml.safe_load(DEMO_CONFIG.read_text())
    change(config)
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
