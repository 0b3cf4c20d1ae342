"""Tests of `sparkmoe serve` as a person starts and stops it."""

import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai import InternalServerError, OpenAI
from ray.cluster_utils import Cluster
from safetensors.torch import load_file, save_file

from deploy.cli.server_process import free_port
from tests.support.places import DEMO_CONFIG, DEMO_MODEL, ROOT
from tests.support.server import eventually, is_ready, serving

pytestmark = pytest.mark.cluster

DRAINS = {"what": "the server drains", "timeout_s": 10.0}


@pytest.mark.slow
def test_a_damaged_expert_ends_the_start_with_its_name(tmp_path: Path) -> None:
    for file in DEMO_MODEL.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(DEMO_MODEL / "model.safetensors")
    name = "model.layers.3.mlp.experts.30.up_proj.weight_scale"
    tensors[name] = tensors[name].float()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    settings = ["--set", f"model.path={tmp_path}", "--set", f"http_options.port={free_port()}"]
    command = [sys.executable, "-m", "deploy", "serve", str(DEMO_CONFIG), *settings]
    started = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert started.returncode == 2
    assert started.stderr.splitlines()[-1].startswith("sparkmoe: ")
    assert name in started.stderr.splitlines()[-1]


@pytest.mark.slow
def test_sigterm_lets_requests_end_and_then_every_process_it_started() -> None:
    """One of two has time enough; the other ends with what it has. Meanwhile new ones are refused."""
    with (
        serving("fabric.kind=local", "experts.shards=3", "router.drain_s=4") as server,
        ThreadPoolExecutor() as threads,
        server.client() as client,
    ):
        pids = [server.detail()["router_pid"], *_descendants(server.process.pid)]
        assert len(pids) > 3
        begun = [threading.Event(), threading.Event()]
        short, long = (
            threads.submit(_stream, client, length, event)
            for length, event in zip((100, 1000), begun, strict=True)
        )
        assert all(event.wait(10) for event in begun), "both run"
        server.process.send_signal(signal.SIGTERM)
        with pytest.raises(InternalServerError, match="stopping") as refused:
            eventually(
                lambda: client.completions.create(model="demo", prompt="x", max_tokens=1) and None, **DRAINS
            )
        assert refused.value.status_code == 503
        eventually(lambda: not is_ready(server.url), what="/ready, asked once a second, says so", timeout_s=5)
        assert [one.result(60)[0] for one in (short, long)] == ["length", "length"]
        assert short.result()[1] == 100
        assert 100 < long.result()[1] < 1000
        assert server.process.wait(60) == 0
    assert not [pid for pid in pids if Path(f"/proc/{pid}/stat").exists()]


@pytest.mark.slow
def test_a_cluster_that_is_joined_is_left_as_it_was_found() -> None:
    """Twice on the same port: what the first leaves behind would refuse the second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # where Serve's workers find deploy/
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 200 << 20},
        )
    try:
        port, joining = f"http_options.port={free_port()}", {"RAY_ADDRESS": str(cluster.address)}
        with serving(port, environment=joining):
            second = subprocess.run(
                [sys.executable, "-m", "deploy", "serve", str(DEMO_CONFIG), "--set", port],
                cwd=ROOT,
                env={**os.environ, **joining},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert second.returncode == 2
            assert second.stderr.startswith("sparkmoe: Serve on this cluster already runs sparkmoe, ")
        with serving(port, environment=joining):
            pass
    finally:
        cluster.shutdown()


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        todo.extend(children.get(todo[0], []))
        found.extend(children.get(todo.pop(0), []))
    return [pid for pid in found if pid != os.getpid()]


def _stream(client: OpenAI, max_tokens: int, begun: threading.Event) -> tuple[str, int]:
    """Return how a streamed completion ended and how many tokens it had; `begun` is set with its first token."""
    reason, num_tokens = "", 0
    for chunk in client.completions.create(
        model="demo",
        prompt="def f(x):",
        max_tokens=max_tokens,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"ignore_eos": True},
    ):
        begun.set()
        reason = next((choice.finish_reason for choice in chunk.choices if choice.finish_reason), reason)
        num_tokens = chunk.usage.completion_tokens if chunk.usage else num_tokens
    return reason, num_tokens
