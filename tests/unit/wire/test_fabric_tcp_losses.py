"""Fabric `tcp` when shards die, hang, fail or lie, and when the router gives up."""

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch

from experts.fabric import PeerLost, ShardAddress, ShardFailed
from experts.fabric.tcp.frames import FrameShape, LayerFrame, PartialFrame, write_step_half
from experts.fabric.tcp.handshake import prove_shard
from experts.fabric.tcp.sockets import Deadline, receive_frame, send_frame
from tests.support.fake_shard import (
    HIDDEN,
    TOKEN,
    FakeShard,
    address_of,
    addresses_of,
    begin,
    connected,
    fake_shards,
    in_process,
    layer_input,
    listening,
    members_of,
    serve_in_process,
    tcp_fabric,
    through,
)
from tests.support.processes import processes

F32 = torch.float32

pytestmark = pytest.mark.usefixtures("both_ways")


def lost_in(call: Callable[[], object]) -> tuple[PeerLost, float]:
    """Return the PeerLost that a call raises, and after how many seconds."""
    began = time.monotonic()
    with pytest.raises(PeerLost) as lost:
        call()
    return lost.value, time.monotonic() - began


@pytest.fixture
def process_of_rank_1() -> Iterator[ShardAddress]:
    """A shard in a process of its own; the test may do anything to it."""
    with processes(serve_in_process, [(1, 2)]) as (address,):
        yield address


def stop(pid: int) -> None:
    """Stop a process and return once every thread of it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    until = time.monotonic() + 5
    while any("(stopped)" not in file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/status")):
        assert time.monotonic() < until


def broken() -> None:
    raise ValueError("out of experts")


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
        stop(process_of_rank_1.pid)  # so that it cannot answer before it is killed
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
        stop(process_of_rank_1.pid)
        lost, elapsed_s = lost_in(lambda: through(fabric, 0, layer_input(rows)))
        assert lost.ranks == (1,)
        assert 0.3 <= elapsed_s < 1.0
    if rows == 1:
        assert [record.message[:30] for record in caplog.records] == ["shard 1 (process-1) is slow: n"]


def test_slow_steps_are_reported_each(caplog: pytest.LogCaptureFixture) -> None:
    shard = FakeShard(0, num_ranks=1, trouble={1: lambda: time.sleep(0.2)})
    with listening([shard]) as (listener,), connected(listener.address, slow_after_s=0.05) as fabric:
        for step in (1, 2):
            begin(fabric, step=step)
            for layer in (0, 1, 1):
                through(fabric, layer, layer_input(1))
    slow = [record.message.split(" for ")[0] for record in caplog.records]
    assert slow == ["shard 0 (first-0) is slow: no answer"] * 2
    assert [f"to step {step}, layer 1" in caplog.messages[step - 1] for step in (1, 2)] == [True, True]


def test_a_loss_names_every_rank_that_died_and_no_living_one(process_of_rank_1: ShardAddress) -> None:
    failing = FakeShard(0, num_ranks=2, trouble={0: broken})
    with (
        listening([failing]) as (failing_listener,),
        connected(failing_listener.address, process_of_rank_1) as fabric,
    ):
        os.kill(process_of_rank_1.pid, signal.SIGKILL)
        for _ in range(2):
            lost, _ = lost_in(lambda: through(fabric, 0, layer_input(2)))
            assert lost.ranks == (1,)
            assert "out of experts" not in str(lost)


def test_one_loss_names_all_that_died() -> None:
    with (
        listening(fake_shards(3)) as (one, lives, two),
        connected(one.address, lives.address, two.address) as fabric,
    ):
        one.close()
        two.close()
        for _ in range(2):
            assert lost_in(lambda: through(fabric, 0, layer_input(2)))[0].ranks == (0, 2)


def test_a_living_shard_that_fails_says_why_until_connect() -> None:
    shards = fake_shards(3)
    failing = [FakeShard(rank, num_ranks=3, trouble={2: broken}) for rank in (0, 2)]
    with (
        listening([failing[0], shards[1], failing[1]]) as listeners,
        connected(*addresses_of(listeners)) as fabric,
    ):
        for _ in range(2):
            with pytest.raises(ShardFailed, match="ValueError: out of experts") as failed:
                through(fabric, 2, layer_input(2))
            assert (failed.value.ranks, failed.value.epoch) == ((0, 2), 1)
        fabric.connect(members_of(addresses_of(listeners), epoch=1), timeout_s=5)
        begin(fabric)
        given = layer_input(2)
        assert torch.equal(through(fabric, 1, given), in_process(shards, 1, given))


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


def test_a_link_that_was_reset_while_idle_is_opened_anew() -> None:
    def reset(server: socket.socket) -> None:
        sock, _ = server.accept()
        prove_shard(sock, name="first-0", token=TOKEN, within_s=2)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()

    shards = fake_shards(1)
    with socket.create_server(("127.0.0.1", 0)) as server, listening(shards) as listeners:
        dying = threading.Thread(target=reset, args=(server,), daemon=True)
        dying.start()
        with connected(address_of(server, rank=0, name="first-0")) as fabric:
            dying.join(5)
            fabric.connect(members_of(addresses_of(listeners), epoch=2), timeout_s=5)
            begin(fabric, epoch=2)
            given = layer_input(2)
            assert torch.equal(through(fabric, 1, given), in_process(shards, 1, given))


def test_connect_names_every_rank_that_cannot_be_reached_and_keeps_the_others() -> None:
    shards = fake_shards(3)
    with listening(shards) as (gone, lives, hung), socket.create_server(("127.0.0.1", 0)) as server:
        gone.close()
        with closing(tcp_fabric()) as fabric:
            members = members_of([gone.address, lives.address, address_of(server, rank=2)], epoch=1)
            lost, elapsed_s = lost_in(lambda: fabric.connect(members, timeout_s=0.2))
            assert lost.ranks == (0, 2)
            assert elapsed_s < 1
            with listening([shards[0]], incarnation="second") as (new,):
                fabric.connect(members_of([new.address, lives.address, hung.address], epoch=2), timeout_s=5)
                begin(fabric, epoch=2)
                given = layer_input(4)
                assert torch.equal(through(fabric, 1, given), in_process(shards, 1, given))


def test_deadlines_grow_with_rows() -> None:
    shard = FakeShard(0, num_ranks=1, trouble={0: lambda: time.sleep(0.3)})
    with (
        listening([shard]) as (listener,),
        connected(listener.address, slow_after_s=0.05, dead_after_s=0.1) as fabric,
    ):
        begin(fabric, step=1, rows=1024)
        through(fabric, 0, layer_input(1024))
        begin(fabric, step=2)
        assert lost_in(lambda: through(fabric, 0, layer_input(1)))[0].ranks == (0,)


def test_a_shard_that_takes_no_bytes_has_the_same_deadline(process_of_rank_1: ShardAddress) -> None:
    """30,000 rows may take 117 times as long as 256, and fill every buffer of the kernel."""
    shards = fake_shards(2)
    with (
        listening(shards[:1]) as (lives,),
        connected(lives.address, process_of_rank_1, slow_after_s=0.05, dead_after_s=0.1) as fabric,
    ):
        stop(process_of_rank_1.pid)
        threading.Timer(1.0, os.kill, [process_of_rank_1.pid, signal.SIGCONT]).start()
        begin(fabric, step=1, rows=30_000)
        given = layer_input(30_000)
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))


@pytest.mark.parametrize(("layer", "rows"), [(1, 2), (0, 3)], ids=["another layer", "another size"])
def test_an_answer_to_something_else_is_a_loss(layer: int, rows: int) -> None:
    def liar(server: socket.socket) -> None:
        sock, _ = server.accept()
        request, reply = LayerFrame(pinned=False), PartialFrame(pinned=False)
        with sock:
            prove_shard(sock, name="liar", token=TOKEN, within_s=2)
            receive_frame(sock, request, accept=lambda _: True, keep_waiting=Deadline(2))
            reply.lay_out(FrameShape(rows, HIDDEN, 4, F32))
            reply.shape_half[:] = reply.laid_out_shape_half
            write_step_half(reply, epoch=1, step=0, layer=layer)
            send_frame(sock, reply.frame, keep_waiting=Deadline(2))

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=liar, args=(server,), daemon=True).start()
        with connected(address_of(server, rank=0, name="liar")) as fabric:
            assert lost_in(lambda: through(fabric, 0, layer_input(2)))[0].ranks == (0,)
