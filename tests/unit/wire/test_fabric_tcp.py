"""Fabric `tcp` over real sockets, TCP and Unix: sums, epochs and who may connect.

Losses: test_fabric_tcp_losses.py.
"""

import socket
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from experts.fabric import PeerLost
from experts.fabric.tcp import frames, shard_end
from experts.fabric.tcp.router_end import TcpFabric
from experts.fabric.tcp.sockets import ms_since_ack
from tests.support.fake_shard import (
    HIDDEN,
    FakeShard,
    LayerInput,
    Reach,
    addresses_of,
    begin,
    connected,
    fake_shards,
    in_process,
    layer_input,
    listening,
    members_of,
    over_tcp,
    over_unix,
    threads_of_links,
    through,
)

BF16 = torch.bfloat16
F32 = torch.float32

pytestmark = pytest.mark.usefixtures("both_ways")


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_float32_sums_equal_those_in_process_bit_for_bit(num_ranks: int) -> None:
    shards = fake_shards(num_ranks)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        for layer, rows in enumerate([1, 4096, 7, 256]):
            given = layer_input(rows)
            assert torch.equal(through(fabric, layer, given), in_process(shards, layer, given))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("out_dtype", [BF16, F32], ids=["to_bf16", "to_f32"])
def test_bf16_partials_are_added_in_float32_and_rounded_once(num_ranks: int, out_dtype: torch.dtype) -> None:
    shards = fake_shards(num_ranks, BF16)
    given = layer_input(33, dtype=BF16)
    with listening(shards) as listeners, connected(*addresses_of(listeners), wire_dtype=BF16) as fabric:
        assert torch.equal(
            through(fabric, 1, given, dtype=out_dtype), in_process(shards, 1, given).to(out_dtype)
        )


def test_the_wire_may_be_narrower_than_shard_and_trunk() -> None:
    shards = fake_shards(2)
    with listening(shards) as listeners, connected(*addresses_of(listeners), wire_dtype=BF16) as fabric:
        for rows in (5, 300, 2):
            given = layer_input(rows)
            torch.testing.assert_close(
                through(fabric, 1, given), in_process(shards, 1, given), rtol=0.02, atol=0.1
            )


def test_both_ends_count_layers_and_the_time_that_a_slow_shard_takes() -> None:
    slow = FakeShard(1, num_ranks=2, trouble={2: lambda: time.sleep(0.1)})
    shards = [FakeShard(0, num_ranks=2), slow]
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        for layer, rows in ((0, 5), (1, 300), (2, 1)):
            through(fabric, layer, layer_input(rows))
        waited = fabric.waited()
    logs = [listener.log.total() for listener in listeners]  # complete once their threads have ended
    assert [(log.num_layers, log.num_rows) for log in logs] == [(3, 306)] * 2
    assert [wait.num_answers for wait in waited.values()] == [3, 3]
    assert logs[1].seconds >= 0.1
    assert waited[1].seconds > 0.05  # from when shard 0's answer had been read
    assert fabric.waited() == {}, "it is closed"


def test_every_number_of_rows_from_1_to_100_and_none() -> None:
    shards = fake_shards(2)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        for rows in (0, *range(1, 101)):
            given = layer_input(rows, top_k=1 + rows % 8)
            assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))


def test_buffers_made_in_inference_mode_serve_outside_it() -> None:
    shards = fake_shards(3)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        with torch.inference_mode():
            through(fabric, 0, layer_input(500))
        given = layer_input(400)
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))


@pytest.mark.gpu
@pytest.mark.parametrize("wire_dtype", [BF16, F32], ids=["bf16", "f32"])
def test_tensors_of_a_gpu_cross_through_host_memory(wire_dtype: torch.dtype) -> None:
    shards = [
        FakeShard(rank, num_ranks=2, dtype=wire_dtype, device=torch.device("cuda")) for rank in range(2)
    ]
    with listening(shards) as listeners, connected(*addresses_of(listeners), wire_dtype=wire_dtype) as fabric:
        for rows in (1, 300, 2):
            given = LayerInput(*(tensor.cuda() for tensor in layer_input(rows, dtype=wire_dtype)))
            out_TD = torch.empty(given.x_TD.shape, dtype=wire_dtype, device="cuda")
            fabric.combine(fabric.dispatch(1, *given), out_TD)
            assert torch.equal(out_TD, in_process(shards, 1, given).to(wire_dtype))


def test_a_shard_on_this_host_is_reached_over_its_unix_socket(both_ways: Reach) -> None:
    with listening(fake_shards(1)) as (listener,), connected(listener.address):
        (link,) = threads_of_links()
        assert ("-link-here:" in link) == (both_ways is over_unix)


def test_a_shard_whose_unix_socket_is_not_found_here_is_reached_over_tcp() -> None:
    """It may be in another container of this host, or on another host."""
    shards = fake_shards(1)
    given = layer_input(3)
    with (
        listening(shards) as (listener,),
        connected(replace(listener.address, unix="elsewhere")) as fabric,
    ):
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))


def test_two_routers_share_a_shard() -> None:
    shards = fake_shards(1)

    def route(fabric: TcpFabric, rows: int) -> int:
        given = layer_input(rows)
        sums = (
            (through(fabric, layer, given), in_process(shards, layer, given)) for layer in [0, 1, 2, 3] * 25
        )
        return sum(torch.equal(ours, theirs) for ours, theirs in sums)

    with (
        listening(shards) as listeners,
        connected(*addresses_of(listeners)) as one,
        connected(*addresses_of(listeners)) as two,
        ThreadPoolExecutor(2) as pool,
    ):
        routed = [pool.submit(route, one, 3), pool.submit(route, two, 200)]
        assert [future.result(timeout=20) for future in routed] == [100, 100]


def test_a_new_epoch_keeps_the_links_of_shards_that_stay() -> None:
    shards = fake_shards(2)
    with (
        listening(shards) as (stays, leaves),
        listening([shards[1]], incarnation="second") as (comes,),
        connected(stays.address, leaves.address) as fabric,
    ):
        first = threads_of_links()
        fabric.connect(members_of([stays.address, comes.address], epoch=2), timeout_s=5)
        begin(fabric, epoch=2)
        given = layer_input(9)
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))
        assert len([name for name in threads_of_links() & first if "shard-0" in name]) == 1


def test_closing_a_listener_ends_its_threads() -> None:
    shard = FakeShard(0, num_ranks=1)
    with listening([shard]) as listeners, connected(*addresses_of(listeners)) as fabric:
        listeners[0].close()
        assert not [name for name in threads_of_links() if name.startswith("shard-0")]
        with pytest.raises(PeerLost):
            through(fabric, 0, layer_input(1))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", listeners[0].port), timeout=1)


def test_a_layer_that_no_frame_holds_is_our_bug_and_reaches_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = fake_shards(1)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        monkeypatch.setattr(frames, "MAX_PAYLOAD_BYTES", 1 << 16)
        most = frames.max_rows(HIDDEN, F32)
        with pytest.raises(AssertionError, match="no frame holds"):
            fabric.dispatch(0, *layer_input(most + 1, top_k=frames.MAX_TOP_K))
        given = layer_input(most, top_k=frames.MAX_TOP_K)
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))


def test_a_router_whose_kernel_is_silent_is_given_up(
    both_ways: Reach, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This one lives, but says nothing within the silence, shorter here than any keepalive.

    On our own host the kernel that would be silent is our own.
    """
    monkeypatch.setattr(shard_end, "PATROL_S", 0.05)
    monkeypatch.setattr(shard_end, "SILENCE_S", 1.0)
    shards = fake_shards(1)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        given = layer_input(3)
        for _ in range(30):
            time.sleep(0.05)
            assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))

        def after_pauses(*pauses_s: float) -> None:
            for pause_s in pauses_s:
                time.sleep(pause_s)
                assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))

        if both_ways is over_tcp:
            with pytest.raises(PeerLost, match="closed the link"):
                after_pauses(1.5, 2.5, 4.5)  # a patrol comes late on a machine that others use
        else:
            after_pauses(1.5)


def test_how_long_ago_the_peer_acknowledged() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sock,
    ):
        time.sleep(0.2)
        assert 150 <= ms_since_ack(sock) < 5000
        sock.sendall(b"x")
        time.sleep(0.05)
        assert ms_since_ack(sock) < 150
