"""Fabric `tcp` when shards die, hang, fail or lie, and when the router gives up."""

import multiprocessing
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
import torch

from experts.fabric import PeerLost, ShardAddress
from experts.fabric.frames import FrameShape, LayerFrame, PartialFrame, write_moment
from experts.fabric.handshake import prove_shard
from experts.fabric.sockets import Deadline, receive_frame, send_frame
from experts.fabric.tcp import TcpFabric
from tests.unit.fake_shard import (
    HIDDEN,
    TOKEN,
    FakeShard,
    begin,
    fake_shards,
    in_process,
    layer_input,
    listening,
    members_of,
    serve_in_process,
    through,
)

F32 = torch.float32


@contextmanager
def connected(
    *addresses: ShardAddress, slow_after_s: float = 1.0, dead_after_s: float = 2.0
) -> Iterator[TcpFabric]:
    fabric = TcpFabric(hidden=HIDDEN, wire_dtype=F32, slow_after_s=slow_after_s, dead_after_s=dead_after_s)
    with closing(fabric):
        fabric.connect(members_of(addresses, epoch=1), timeout_s=5)
        begin(fabric)
        yield fabric


def lost_in(call: Callable[[], object]) -> tuple[PeerLost, float]:
    """The PeerLost that a call raises, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(PeerLost) as lost:
        call()
    return lost.value, time.monotonic() - began


@pytest.fixture
def process_of_rank_1() -> Iterator[ShardAddress]:
    """A shard in a process of its own; the test may do anything to it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.unit.fake_shard"])
    ours, theirs = context.Pipe()
    process = context.Process(target=serve_in_process, args=(1, 2, theirs))
    process.start()
    theirs.close()
    yield ours.recv()
    process.kill()
    process.join()


def test_a_killed_shard_is_lost_at_once_and_may_be_replaced(process_of_rank_1: ShardAddress) -> None:
    shards = fake_shards(2)
    kill = FakeShard(0, num_ranks=2, trouble={3: lambda: os.kill(process_of_rank_1.pid, signal.SIGKILL)})
    with (
        listening([kill]) as (stays,),
        listening([shards[1]], incarnation="second") as (replacement,),
        connected(stays.address, process_of_rank_1) as fabric,
    ):
        given = layer_input(5)
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))
        os.kill(process_of_rank_1.pid, signal.SIGSTOP)  # so that it cannot answer before it is killed
        lost, elapsed_s = lost_in(lambda: through(fabric, 3, given))
        assert (lost.ranks, lost.epoch) == ((1,), 1)
        assert elapsed_s < 0.5
        fabric.connect(members_of([stays.address, replacement.address], epoch=2), timeout_s=5)
        begin(fabric, epoch=2)
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))


@pytest.mark.parametrize("rows", [1, 30_000], ids=["small", "more than the kernel buffers"])
def test_a_hung_shard_is_reported_once_and_lost_after_the_deadline(
    rows: int, process_of_rank_1: ShardAddress, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        listening(fake_shards(1)) as (lives,),
        connected(lives.address, process_of_rank_1, slow_after_s=0.1, dead_after_s=0.3) as fabric,
    ):
        os.kill(process_of_rank_1.pid, signal.SIGSTOP)
        lost, elapsed_s = lost_in(lambda: through(fabric, 0, layer_input(rows)))
        assert lost.ranks == (1,)
        assert 0.3 <= elapsed_s < 1.0
    if rows == 1:
        assert [record.message[:30] for record in caplog.records] == ["shard 1 (process-1) is slow: n"]


def test_one_loss_names_every_rank_that_died(process_of_rank_1: ShardAddress) -> None:
    def broken() -> None:
        raise ValueError("out of experts")

    failing = FakeShard(0, num_ranks=2, trouble={0: broken})
    with (
        listening([failing]) as (failing_listener,),
        connected(failing_listener.address, process_of_rank_1) as fabric,
    ):
        os.kill(process_of_rank_1.pid, signal.SIGKILL)
        lost, _ = lost_in(lambda: through(fabric, 0, layer_input(2)))
        assert lost.ranks == (0, 1)
        again, _ = lost_in(lambda: through(fabric, 0, layer_input(2)))
        assert again.ranks == (0, 1)


def test_an_error_in_a_forward_reaches_the_router_as_a_sentence() -> None:
    def broken() -> None:
        raise ValueError("layer 2 has no experts here")

    shard = FakeShard(0, num_ranks=1, trouble={2: broken})
    with listening([shard]) as (listener,), connected(listener.address) as fabric:
        lost, _ = lost_in(lambda: through(fabric, 2, layer_input(2)))
        assert "ValueError: layer 2 has no experts here" in str(lost)
        fabric.connect(members_of([listener.address], epoch=2), timeout_s=5)
        begin(fabric, epoch=2)
        given = layer_input(2)
        assert torch.equal(through(fabric, 1, given), in_process([shard], 1, given))


def test_living_shards_are_read_out_so_the_next_epoch_finds_their_links_clean() -> None:
    shards = fake_shards(2)
    late = FakeShard(1, num_ranks=2, trouble={0: lambda: time.sleep(0.2)})
    with (
        listening([shards[0], late]) as (dies, lives),
        listening([shards[0]], incarnation="second") as (new,),
        connected(dies.address, lives.address) as fabric,
    ):
        dies.close()
        assert lost_in(lambda: through(fabric, 0, layer_input(2)))[0].ranks == (0,)
        fabric.connect(members_of([new.address, lives.address], epoch=2), timeout_s=5)
        begin(fabric, epoch=2)
        given = layer_input(4)
        assert torch.equal(through(fabric, 1, given), in_process(shards, 1, given))


def test_a_step_that_was_left_between_dispatch_and_combine_leaves_nothing_behind() -> None:
    shards = fake_shards(2)
    with listening(shards) as listeners:
        addresses = [listener.address for listener in listeners]
        with connected(*addresses) as fabric:
            fabric.dispatch(0, *layer_input(3))
            fabric.connect(members_of(addresses, epoch=2), timeout_s=5)
            begin(fabric, epoch=2)
            given = layer_input(3)
            assert torch.equal(through(fabric, 1, given), in_process(shards, 1, given))


def test_abort_ends_a_pending_call_and_all_later_ones_until_connect() -> None:
    shard = FakeShard(0, num_ranks=1, trouble={3: lambda: time.sleep(0.5)})
    with listening([shard]) as (listener,), connected(listener.address) as fabric:
        threading.Timer(0.05, fabric.abort, ["the operator said so"]).start()
        lost, elapsed_s = lost_in(lambda: through(fabric, 3, layer_input(1)))
        assert "the operator said so" in str(lost)
        assert elapsed_s < 0.4
        assert lost_in(lambda: begin(fabric))[0].ranks == (0,)
        assert lost_in(lambda: fabric.dispatch(0, *layer_input(1)))[0].ranks == (0,)
        fabric.connect(members_of([listener.address], epoch=2), timeout_s=5)
        begin(fabric, epoch=2)
        given = layer_input(1)
        assert torch.equal(through(fabric, 0, given), in_process([shard], 0, given))


def test_connect_names_every_rank_that_cannot_be_reached_and_keeps_the_others() -> None:
    shards = fake_shards(3)
    with listening(shards) as (gone, lives, hung), socket.create_server(("127.0.0.1", 0)) as silent:
        gone.close()
        nobody = ShardAddress(2, "127.0.0.1", silent.getsockname()[1], name="silent", pid=0, token=TOKEN)
        fabric = TcpFabric(hidden=HIDDEN, wire_dtype=F32, slow_after_s=1, dead_after_s=2)
        with closing(fabric):
            members = members_of([gone.address, lives.address, nobody], epoch=1)
            lost, elapsed_s = lost_in(lambda: fabric.connect(members, timeout_s=0.2))
            assert lost.ranks == (0, 2)
            assert elapsed_s < 1
            with listening([shards[0]], incarnation="second") as (new,):
                fabric.connect(members_of([new.address, lives.address, hung.address], epoch=2), timeout_s=5)
                begin(fabric, epoch=2)
                given = layer_input(4)
                assert torch.equal(through(fabric, 1, given), in_process(shards, 1, given))


@pytest.mark.parametrize(("rows", "warming"), [(1, True), (1024, False)], ids=["warming", "many rows"])
def test_deadlines_grow_with_rows_and_are_off_while_warming(rows: int, warming: bool) -> None:
    shard = FakeShard(0, num_ranks=1, trouble={0: lambda: time.sleep(0.3)})
    with (
        listening([shard]) as (listener,),
        connected(listener.address, slow_after_s=0.05, dead_after_s=0.1) as fabric,
    ):
        begin(fabric, step=1, rows=rows, warming=warming)
        through(fabric, 0, layer_input(rows))
        begin(fabric, step=2)
        assert lost_in(lambda: through(fabric, 0, layer_input(1)))[0].ranks == (0,)


@pytest.mark.parametrize(("layer", "rows"), [(1, 2), (0, 3)], ids=["another layer", "another size"])
def test_an_answer_to_something_else_is_a_loss(layer: int, rows: int) -> None:
    def liar(server: socket.socket) -> None:
        sock, _ = server.accept()
        request, reply = LayerFrame(pinned=False), PartialFrame(pinned=False)
        with sock:
            prove_shard(sock, name="liar", token=TOKEN, within_s=2)
            receive_frame(sock, request, accept=lambda _: True, keep_waiting=Deadline(2))
            reply.lay_out(FrameShape(rows, HIDDEN, 4, F32))
            reply.form[:] = reply.known_form
            write_moment(reply, epoch=1, step=0, layer=layer)
            send_frame(sock, reply.frame, keep_waiting=Deadline(2))

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=liar, args=(server,), daemon=True).start()
        address = ShardAddress(0, "127.0.0.1", server.getsockname()[1], name="liar", pid=0, token=TOKEN)
        with connected(address) as fabric:
            assert lost_in(lambda: through(fabric, 0, layer_input(2)))[0].ranks == (0,)
