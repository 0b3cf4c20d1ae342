"""ShardActor and RayShards, as far as they need no process of their own and no Ray."""

import asyncio
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

import experts.device
from deploy.fleet import ray_shards, shard_actor
from deploy.fleet.shard_actor import ShardActor
from deploy.fleet.spec import NAMESPACE
from experts import shard
from experts.backends import KernelSettings
from experts.config import ExpertsConfig
from experts.progress import Progress
from experts.shard import ExpertShard
from experts.weights import ExpertWeights
from tests.support.fake_ray_shards import fleet_spec


@pytest.fixture
def actor(monkeypatch: pytest.MonkeyPatch) -> ShardActor:
    """Return an actor whose lease outlives this process."""
    context = SimpleNamespace(get_node_id=lambda: "node")
    monkeypatch.setattr(shard_actor.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(shard_actor, "keep_kernels", lambda: None)  # it changes this process's environment
    monkeypatch.setattr(ShardActor, "_exit_without_lease", lambda actor: None)
    return ShardActor(fleet_spec(), 0, "app-shard-0-x")


def test_what_a_user_chose_of_the_experts_reaches_the_kernel(
    actor: ShardActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = ExpertsConfig(shards=2, backend="b12x-emulated", scales="baked", micro=True, threads=1)
    actor._spec = replace(actor._spec, experts=chosen)
    load = Mock(side_effect=InterruptedError)
    monkeypatch.setattr(shard, "load_shard", load)
    with pytest.raises(InterruptedError):
        actor.load()
    assert load.call_args.kwargs["backend"] == "b12x-emulated"
    assert load.call_args.kwargs["settings"] == KernelSettings(scales="baked", micro=True)


@pytest.mark.parametrize(
    ("device", "threads", "wanted"), [("cpu", None, 7), ("cpu", 3, 3), ("cuda", None, 1), ("cuda", 3, 3)]
)
def test_a_shard_with_a_gpu_starts_no_thread_for_each_core(
    actor: ShardActor, monkeypatch: pytest.MonkeyPatch, device: str, threads: int | None, wanted: int
) -> None:
    set_num_threads = Mock()
    monkeypatch.setattr(torch, "set_num_threads", set_num_threads)
    monkeypatch.setattr(shard_actor.os, "cpu_count", lambda: 7)
    monkeypatch.setattr(experts.device, "default_device", lambda: torch.device(device))
    monkeypatch.setattr(shard, "load_shard", Mock(side_effect=InterruptedError))
    actor._spec = replace(actor._spec, experts=ExpertsConfig(shards=2, threads=threads))
    with pytest.raises(InterruptedError):
        actor.load()
    set_num_threads.assert_called_once_with(wanted)


def test_a_shard_tells_how_far_it_is_while_it_loads(
    actor: ShardActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_actor.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    told: list[Progress | None] = []

    class Watched(ExpertShard):
        def write_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
            told.append(actor.stats().loading)
            super().write_slot(layer, slot, weights)

    monkeypatch.setattr(shard, "ExpertShard", Watched)
    assert actor.stats().loading == Progress(0, 1, "libraries")
    actor.load()
    assert actor.stats().loading is None
    assert [(one.work, one.done, one.total) for one in told if one] == [
        ("experts", done, 6 * 16) for done in range(6 * 16)
    ]
    size = told[1].done_bytes if told[1] else 0
    assert [(one.done_bytes, one.total_bytes) for one in told if one] == [
        (size * done, size * 6 * 16) for done in range(6 * 16)
    ]


def test_a_new_watch_releases_the_one_before(actor: ShardActor) -> None:
    watches = []
    for _ in range(10):
        watches.append(threading.Thread(target=actor.until_death, daemon=True))
        watches[-1].start()
        for before in watches[:-1]:
            before.join(5)
        assert [watch.is_alive() for watch in watches] == [False] * (len(watches) - 1) + [True]


def test_a_shard_that_nobody_renews_lives_for_one_lease(actor: ShardActor) -> None:
    assert actor._lease_ends - time.monotonic() == pytest.approx(fleet_spec().lease_s, abs=5)


async def _other_than_the_loops() -> None:
    threads = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ray_shards, "_read_nodes", lambda: threads.append(threading.current_thread()) or [])
        assert await ray_shards.RayShards("app").nodes() == []
    assert threads != [threading.current_thread()]


def test_nodes_are_read_in_another_thread_than_the_event_loops() -> None:
    asyncio.run(_other_than_the_loops())


def test_a_shard_that_dies_while_it_is_looked_for_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["app-shard-0-a", "app-shard-1-b", "other-shard-0-c"]
    actors = [{"name": name, "namespace": NAMESPACE} for name in names]

    def get_actor(name: str, namespace: str) -> str:
        if name == names[0]:
            raise ValueError("Failed to look up actor")
        return f"handle of {name}"

    monkeypatch.setattr(ray_shards, "list_named_actors", lambda all_namespaces: actors)
    monkeypatch.setattr(ray_shards.ray, "get_actor", get_actor)
    assert ray_shards._find("app-shard-") == {names[1]: f"handle of {names[1]}"}
