"""Tests of Ray's own commands and the same file on a cluster of three nodes (three raylets on this machine)."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from openai import OpenAI
from ray import serve
from ray.cluster_utils import Cluster
from ray.util import list_named_actors

from deploy.api.readiness import FRESH_S
from deploy.cli.launch import readiness
from deploy.cli.server_process import free_port
from deploy.config import load
from deploy.fleet.spec import NAMESPACE
from router.text.tokenizer import Tokenizer
from tests.support.oracle import NEAR_TIE, Oracle
from tests.support.places import DEMO_CONFIG, DEMO_MODEL, ROOT
from tests.support.server import eventually, is_ready

pytestmark = pytest.mark.cluster

LEASE_S = 10

PROMPTS = ["def fibonacci(n):\n", "import os\n\nclass Config:\n", "for i in range(10):\n"]
NUM_TOKENS = 48


@pytest.fixture(scope="module")
def dashboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Start three nodes and yield the address that `serve deploy` takes."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # where Serve's workers find deploy/
        cluster = Cluster(
            initialize_head=True,
            head_node_args={
                "num_cpus": 2,
                "include_dashboard": True,
                "dashboard_port": port,
                "object_store_memory": 200 << 20,
            },
        )
        for _ in range(2):
            cluster.add_node(num_cpus=2, object_store_memory=200 << 20)
        ray.init(address=cluster.address, namespace=NAMESPACE, log_to_driver=False)
        yield f"http://127.0.0.1:{port}"
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


class Deployed:
    """A config file that `serve deploy` is given, changed and given again."""

    def __init__(self, dashboard: str, folder: Path) -> None:
        self._dashboard = dashboard
        self._file = folder / "served.yaml"
        settings = [
            f"http_options.port={free_port()}",
            f"fleet.lease_s={LEASE_S}",
            "router.dtype=float32",
            "fabric.wire_dtype=float32",
        ]
        checked, self._raw = load(DEMO_CONFIG, settings)
        self.url = checked.url

    def deploy(self, *, shards: int) -> None:
        """Hand the file in with so many shards and return when they serve."""
        self.hand_in(shards=shards)
        eventually(lambda: self._ready_with(shards), what=f"{shards} shards are ready", timeout_s=120)

    def hand_in(self, *, shards: int) -> None:
        self._raw["applications"][0]["deployments"][0]["user_config"]["experts"]["shards"] = shards
        self._file.write_text(yaml.safe_dump(self._raw))
        command = [
            str(Path(sys.executable).with_name("serve")),
            "deploy",
            str(self._file),
            "-a",
            self._dashboard,
        ]
        subprocess.run(command, check=True, timeout=60, capture_output=True)

    def detail(self) -> dict[str, Any]:
        time.sleep(FRESH_S)  # an answer may be as old
        return readiness(self.url)[2]

    def greedy(self, prompt: str) -> str:
        client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        answer = client.completions.create(
            model="demo",
            prompt=prompt,
            max_tokens=NUM_TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True},
        )
        return answer.choices[0].text

    def _ready_with(self, shards: int) -> bool:
        if not is_ready(self.url):
            return False
        found = self.detail()["shards"]
        return len(found) == shards and not any(shard["loading"] for shard in found)


@pytest.fixture(scope="module")
def deployed(dashboard: str, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return Deployed(dashboard, tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """Return what transformers' own model answers; nowhere does it all but toss a coin, so there is no other
    exact answer."""
    tokenizer = Tokenizer(DEMO_MODEL)
    answers = Oracle(DEMO_MODEL).generate([tokenizer.encode(prompt) for prompt in PROMPTS], NUM_TOKENS)
    assert all(min(answer.margins) > NEAR_TIE for answer in answers)
    return [tokenizer.decode(answer.tokens) for answer in answers]


def test_serve_deploy_takes_the_file_and_shards_spread_over_nodes(deployed: Deployed) -> None:
    deployed.deploy(shards=3)
    assert len({shard["node"] for shard in deployed.detail()["shards"]}) == 3


def test_any_number_of_shards_gives_transformers_tokens_and_changing_it_keeps_the_router(
    deployed: Deployed, expected: list[str]
) -> None:
    router_pid = deployed.detail()["router_pid"]
    for shards in (3, 1, 2, 4):
        deployed.deploy(shards=shards)
        assert [deployed.greedy(prompt) for prompt in PROMPTS] == expected, f"{shards} shards"
    assert deployed.detail()["router_pid"] == router_pid


def test_more_shards_than_experts_are_refused_and_what_runs_goes_on(
    deployed: Deployed, expected: list[str]
) -> None:
    before = deployed.detail()
    deployed.hand_in(shards=33)
    eventually(
        lambda: "shards=33" in deployed.detail().get("refused", ""), what="it is refused", timeout_s=60
    )
    after = deployed.detail()
    assert after["router_pid"] == before["router_pid"]
    assert [shard["pid"] for shard in after["shards"]] == [shard["pid"] for shard in before["shards"]]
    assert deployed.greedy(PROMPTS[0]) == expected[0]


def test_serve_delete_leaves_no_actor_behind(deployed: Deployed) -> None:
    assert _our_actors()
    serve.delete("sparkmoe")
    eventually(lambda: not _our_actors(), what="no actor of ours is left", timeout_s=4 * LEASE_S)


def _our_actors() -> list[str]:
    actors: list[Any] = list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
