"""Fabric `tcp` when the router itself gives up: abort and close, from another thread, whatever is pending."""

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch

from experts.fabric import Aborted
from experts.fabric.tcp.router_end import TcpFabric
from tests.support.fake_shard import (
    FakeShard,
    address_of,
    begin,
    connected,
    fake_shards,
    in_process,
    layer_input,
    listening,
    members_of,
    tcp_fabric,
    through,
)

pytestmark = pytest.mark.usefixtures("both_ways")

SLEEPY = {3: lambda: time.sleep(0.5)}


@pytest.fixture
def nobody_home(request: pytest.FixtureRequest) -> Iterator[socket.socket]:
    """A listening socket without anyone behind it; with a backlog of 0, one that does not even answer."""
    with socket.create_server(("127.0.0.1", 0), backlog=request.param) as server, ExitStack() as stack:
        for _ in range(2 if request.param == 0 else 0):  # one more than such a queue holds
            queued = stack.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(server.getsockname())
        yield server


@contextmanager
def ends_within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def num_open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_abort_ends_a_pending_call_and_all_later_ones_until_connect() -> None:
    shard = FakeShard(0, num_ranks=1, trouble=SLEEPY)
    with listening([shard]) as (listener,), connected(listener.address) as fabric:
        threading.Timer(0.05, fabric.abort, ["the operator said so"]).start()
        with ends_within(0.4), pytest.raises(Aborted, match="the operator said so"):
            through(fabric, 3, layer_input(1))
        with pytest.raises(Aborted):
            begin(fabric)
        with pytest.raises(Aborted):
            fabric.dispatch(0, *layer_input(1))
        fabric.connect(members_of([listener.address], epoch=2), timeout_s=5)
        begin(fabric, epoch=2)
        given = layer_input(1)
        assert torch.equal(through(fabric, 0, given), in_process([shard], 0, given))


@pytest.mark.parametrize("nobody_home", [0, 8], ids=["unanswered", "in the handshake"], indirect=True)
@pytest.mark.parametrize(
    "end", [TcpFabric.close, partial(TcpFabric.abort, reason="enough")], ids=["close", "abort"]
)
def test_a_pending_connect_ends_and_its_sockets_are_closed(
    nobody_home: socket.socket, end: Callable[[TcpFabric], None]
) -> None:
    with listening(fake_shards(1)) as (lives,):
        fabric = tcp_fabric()
        before = num_open_files()
        threading.Timer(0.2, end, [fabric]).start()
        with ends_within(1), pytest.raises(Aborted):
            fabric.connect(members_of([lives.address, address_of(nobody_home, rank=1)], epoch=1), timeout_s=5)
        fabric.close()
        lives.close()  # its end of the link, and the two sockets where it listens
        assert num_open_files() == before - 2


def test_close_is_for_ever_even_just_before_a_connect() -> None:
    with listening(fake_shards(1)) as (lives,):
        fabric = tcp_fabric()
        fabric.close()
        fabric.abort("once more")
        for _ in range(2):
            with pytest.raises(Aborted, match="the fabric is closed"):
                fabric.connect(members_of([lives.address], epoch=1), timeout_s=5)


def test_close_from_another_thread_ends_the_pending_call_before_it_closes_the_sockets() -> None:
    shard = FakeShard(0, num_ranks=1, trouble=SLEEPY)
    with (
        listening([shard]) as (listener,),
        connected(listener.address) as fabric,
        ThreadPoolExecutor(1) as pool,
        ends_within(0.45),
    ):
        before = num_open_files()
        pending = pool.submit(through, fabric, 3, layer_input(1))
        time.sleep(0.1)
        fabric.close()
        assert num_open_files() == before - 1
        with pytest.raises(Aborted, match="the fabric is closed"):
            pending.result(timeout=5)
