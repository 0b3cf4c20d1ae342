"""Fabric `mailbox` between a router and shards of its own host: sums, losses, failures, aborts, and what is left behind."""

import gc
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.fabric import Aborted, PeerLost, ShardAddress, ShardFailed
from experts.fabric.mailbox.region import LaneShape
from experts.fabric.mailbox.router_end import MailboxFabric
from tests.support import fake_shard
from tests.support.fake_shard import (
    HIDDEN,
    FakeShard,
    addresses_of,
    begin,
    fake_shards,
    in_process,
    layer_input,
    listening,
    members_of,
    serve_in_process,
    through,
)
from tests.support.processes import processes

LAYERS = FakeShard.shape.moe_layers


@pytest.fixture(autouse=True)
def _over_unix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_shard, "reach", fake_shard.over_unix)


@pytest.fixture(autouse=True)
def _leaves_no_thread() -> Iterator[None]:
    """Assert that no thread of a mailbox outlives its fabric and its shards."""
    before = set(threading.enumerate())
    yield
    eventually(lambda: not [t for t in set(threading.enumerate()) - before if "pytest" not in t.name])


@pytest.fixture
def _leaves_no_region() -> Iterator[None]:
    """Assert that no region outlives its fabric. An error that pytest keeps would hold the frames of its step, too."""
    held = len(regions())
    yield
    gc.collect()
    eventually(lambda: len(regions()) <= held)


def regions() -> list[str]:
    """Return the descriptors of regions that this process has open, mapped ones among them."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:  # the one that lists
            continue
    return [link for link in found if "sparkmoe-mailbox" in link]


def eventually(condition: object, timeout_s: float = 10.0) -> None:
    assert callable(condition)
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def mailbox_fabric(
    *, rows: int = 64, dtype: torch.dtype = torch.float32, dead_after_s: float = 5.0
) -> MailboxFabric:
    shape = LaneShape(rows=rows, hidden=HIDDEN, top_k=4, dtype=dtype)
    return MailboxFabric(shape, moe_layers=LAYERS, slow_after_s=dead_after_s / 4, dead_after_s=dead_after_s)


@contextmanager
def connected(addresses: Sequence[ShardAddress], **settings: object) -> Iterator[MailboxFabric]:
    with closing(mailbox_fabric(**settings)) as fabric:  # type: ignore[arg-type]
        fabric.connect(members_of(addresses, epoch=1), timeout_s=5)
        yield fabric


def step_of(
    fabric: MailboxFabric, shards: Sequence[FakeShard], rows: int, *, step: int = 0, epoch: int = 1
) -> None:
    """Run a whole step and assert that every layer's sum is what the shards would make of it in one process."""
    begin(fabric, epoch=epoch, step=step, rows=rows)
    given = layer_input(rows)
    found = [through(fabric, layer, given) for layer in LAYERS]
    fabric.end()
    for layer in LAYERS:
        assert torch.equal(found[layer], in_process(shards, layer, given))


def run_step(fabric: MailboxFabric, *, rows: int = 3, step: int = 0) -> None:
    begin(fabric, step=step, rows=rows)
    for layer in LAYERS:
        through(fabric, layer, layer_input(rows))
    fabric.end()


@given(rows=st.lists(st.integers(1, 64), min_size=1, max_size=4), num_ranks=st.integers(1, 3))
@settings(max_examples=15)
def test_every_layer_of_every_step_is_the_sum(rows: list[int], num_ranks: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fake_shard, "reach", fake_shard.over_unix)
        shards = fake_shards(num_ranks)
        with listening(shards) as listeners, connected(addresses_of(listeners)) as fabric:
            for step, num_rows in enumerate(rows):
                step_of(fabric, shards, num_rows, step=step)


@pytest.mark.usefixtures("_leaves_no_region")
def test_a_killed_shard_is_lost_and_the_others_serve_the_next_epoch() -> None:
    shards = fake_shards(2)
    with (
        processes(serve_in_process, [(0, 2), (1, 2)]) as addresses,
        connected(addresses, dead_after_s=20.0) as fabric,
    ):
        step_of(fabric, shards, 5)
        kept = fabric._links[0]
        begin(fabric, step=1, rows=5)
        through(fabric, 0, layer_input(5))
        os.kill(addresses[1].pid, signal.SIGKILL)
        for layer in LAYERS[1:]:
            through(fabric, layer, layer_input(5))
        with pytest.raises(
            PeerLost, match=r"lost shard 1 at epoch 1, step 1, layer \d .*closed the link"
        ) as caught:
            fabric.end()
        assert caught.value.ranks == (1,)
        with processes(serve_in_process, [(1, 2)]) as [replacement]:
            fabric.connect(members_of([addresses[0], replacement], epoch=2), timeout_s=5)
            assert fabric._links[0] is kept, "the link of a shard that stays is kept"
            step_of(fabric, shards, 7, step=1, epoch=2)


@pytest.mark.usefixtures("_leaves_no_region")
@pytest.mark.parametrize("num_hung", [1, 2])
def test_hung_shards_are_lost_together_after_one_deadline(num_hung: int) -> None:
    with processes(serve_in_process, [(rank, 3) for rank in range(3)]) as addresses:
        with connected(addresses, dead_after_s=0.8) as fabric:
            step_of(fabric, fake_shards(3), 2)
            for address in addresses[:num_hung]:
                os.kill(address.pid, signal.SIGSTOP)
            began = time.monotonic()
            with pytest.raises(PeerLost, match=r"no answer for 0\.8") as caught:
                run_step(fabric, step=1)
            assert caught.value.ranks == tuple(range(num_hung))
            assert time.monotonic() - began >= 0.8
        for address in addresses[:num_hung]:
            os.kill(address.pid, signal.SIGCONT)


def test_a_layer_that_fails_says_why_and_the_shard_serves_again() -> None:
    def fail_once() -> None:
        if trouble:
            raise RuntimeError(trouble.pop())

    trouble = ["out of memory"]
    shards = [FakeShard(0, num_ranks=2), FakeShard(1, num_ranks=2, trouble={2: fail_once})]
    with listening(shards) as listeners, connected(addresses_of(listeners)) as fabric:
        with pytest.raises(ShardFailed, match="shard 1: RuntimeError: out of memory") as caught:
            run_step(fabric)
        assert caught.value.ranks == (1,)
        fabric.connect(members_of(addresses_of(listeners), epoch=1), timeout_s=5)
        step_of(fabric, shards, 4, step=1)


@pytest.mark.usefixtures("_leaves_no_region")
def test_an_abort_from_another_thread_ends_a_step_that_nobody_answers() -> None:
    blocked = threading.Event()
    shard = FakeShard(0, num_ranks=1, trouble={1: lambda: blocked.wait(20)})
    with listening([shard]) as listeners, connected(addresses_of(listeners), dead_after_s=20.0) as fabric:
        outcome: list[Exception] = []

        def run() -> None:
            try:
                run_step(fabric)
            except Aborted as error:
                outcome.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        eventually(lambda: fabric._running)
        fabric.abort("the test has had enough")
        thread.join(10)
        blocked.set()
        assert [str(error) for error in outcome] == ["the test has had enough"]
        fabric.connect(members_of(addresses_of(listeners), epoch=1), timeout_s=5)
        step_of(fabric, [shard], 2, step=1)


def test_a_shard_of_another_host_or_another_model_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(fake_shards(1)) as listeners, closing(mailbox_fabric()) as fabric:
        monkeypatch.setattr(fake_shard, "reach", fake_shard.over_tcp)
        with pytest.raises(PeerLost, match="shards of the router's own host only"):
            fabric.connect(members_of(addresses_of(listeners), epoch=1), timeout_s=5)
        monkeypatch.setattr(fake_shard, "reach", fake_shard.over_unix)
        shape = LaneShape(rows=4, hidden=2 * HIDDEN, top_k=4, dtype=torch.float32)
        with (
            closing(MailboxFabric(shape, moe_layers=LAYERS, slow_after_s=1, dead_after_s=2)) as other,
            pytest.raises(PeerLost, match="cannot reach first-0"),
        ):
            other.connect(members_of(addresses_of(listeners), epoch=1), timeout_s=5)


@pytest.mark.usefixtures("_leaves_no_region")
def test_a_slow_shard_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    wait = threading.Event()
    shard = FakeShard(0, num_ranks=1, trouble={1: lambda: wait.wait(0.6)})
    with listening([shard]) as listeners, connected(addresses_of(listeners), dead_after_s=2.0) as fabric:
        run_step(fabric)
    slow = [record.getMessage() for record in caplog.records if "is slow" in record.getMessage()]
    assert len(slow) == 1
    assert "shard 0 (first-0)" in slow[0]
    assert "step 0, layer 1" in slow[0]
