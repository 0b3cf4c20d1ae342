"""Fabric `tcp` over real sockets on the loopback: sums, epochs and who may connect. Losses: test_fabric_tcp_losses.py."""

import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import pytest
import torch

from experts.fabric import PeerLost, ShardAddress, frames, link
from experts.fabric.frames import Form, FrameShape, Kind, LayerFrame, small_frame, write_moment
from experts.fabric.handshake import prove_router
from experts.fabric.sockets import Deadline, ms_since_ack, send_frame
from experts.fabric.tcp import TcpFabric
from tests.unit.fake_shard import (
    HIDDEN,
    TOKEN,
    FakeShard,
    LayerInput,
    addresses_of,
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

BF16 = torch.bfloat16
F32 = torch.float32


def threads_of_links() -> set[str]:
    return {thread.name for thread in threading.enumerate() if "-link-" in thread.name}


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


@pytest.mark.parametrize(
    "wrong", [{"token": b"a guess"}, {"name": "another incarnation"}], ids=["token", "name"]
)
def test_who_cannot_prove_the_token_of_this_shard_is_refused(wrong: dict) -> None:
    shards = fake_shards(2)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        intruder = tcp_fabric()
        right, mine = addresses_of(listeners)
        with closing(intruder), pytest.raises(PeerLost, match="refused by first-1: wrong token") as lost:
            intruder.connect(members_of([right, replace(mine, **wrong)], epoch=1), timeout_s=5)
        assert lost.value.ranks == (1,)
        given = layer_input(3)
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))


def test_a_listener_that_cannot_prove_the_token_is_not_taken_for_the_shard() -> None:
    def impostor(server: socket.socket) -> None:
        sock, _ = server.accept()
        with sock:
            sock.sendall(small_frame(Kind.CHALLENGE, bytes(32)))
            sock.recv(4096)
            sock.sendall(small_frame(Kind.WELCOME, bytes(32)))
            sock.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=impostor, args=(server,), daemon=True).start()
        address = ShardAddress(0, "127.0.0.1", server.getsockname()[1], name="first-0", pid=0, token=TOKEN)
        fabric = tcp_fabric()
        with closing(fabric), pytest.raises(PeerLost, match="does not hold its token"):
            fabric.connect(members_of([address], epoch=1), timeout_s=5)


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\nHost: shard\r\n\r\n" * 4, bytes(128), b"SMOE" + b"\xff" * 200, b"", b"SMOE"],
    ids=["http", "zeros", "magic", "nothing", "cut"],
)
def test_garbage_harms_nobody(garbage: bytes) -> None:
    shards = fake_shards(1)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        with socket.create_connection(("127.0.0.1", listeners[0].port)) as stranger:
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            stranger.settimeout(2)
            while read_some(stranger):  # its challenge, then the end of the link
                pass
        given = layer_input(3)
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))


def read_some(sock: socket.socket) -> bytes:
    try:
        return sock.recv(4096)
    except ConnectionResetError:
        return b""


def layer_frame(rows: int, hidden: int) -> memoryview:
    frame = LayerFrame(pinned=False)
    frame.lay_out(FrameShape(rows, hidden, 4, F32))
    frame.form[:] = frame.known_form
    write_moment(frame, epoch=1, step=0, layer=0)
    return frame.frame


@pytest.mark.parametrize(
    "sent",
    [
        layer_frame(2, HIDDEN + 2),
        memoryview(bytes(layer_frame(2, HIDDEN)) * 2),
        small_frame(Kind.WELCOME, bytes(32)),
        memoryview(Form(Kind.LAYER, 1 << 40, FrameShape(1 << 31, HIDDEN, 0, F32)).pack() + bytes(32)),
    ],
    ids=["another hidden size", "two frames at once", "another kind", "a terabyte"],
)
def test_a_router_that_breaks_the_protocol_loses_its_link_only(sent: memoryview) -> None:
    shards = fake_shards(1)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        with socket.create_connection(("127.0.0.1", listeners[0].port)) as sock:
            prove_router(sock, name="first-0", token=TOKEN, within_s=2)
            send_frame(sock, sent, keep_waiting=Deadline(2))
            sock.settimeout(2)
            assert read_some(sock) == b""
        given = layer_input(3)
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))


def test_closing_a_listener_ends_its_threads() -> None:
    shard = FakeShard(0, num_ranks=1)
    with listening([shard]) as listeners, connected(*addresses_of(listeners)) as fabric:
        listeners[0].close()
        assert not [name for name in threads_of_links() if name.startswith("shard-0")]
        with pytest.raises(PeerLost):
            through(fabric, 0, layer_input(1))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", listeners[0].port), timeout=1)


def test_a_handshake_has_one_deadline_for_all_its_waits() -> None:
    def trickle(server: socket.socket) -> None:
        sock, _ = server.accept()
        with sock:
            time.sleep(0.25)
            sock.sendall(b"S")
            sock.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=trickle, args=(server,), daemon=True).start()
        began = time.monotonic()
        with (
            socket.create_connection(server.getsockname()) as sock,
            pytest.raises(TimeoutError, match=r"no answer within 0\.3 s"),
        ):
            prove_router(sock, name="slow", token=TOKEN, within_s=0.3)
        assert time.monotonic() - began < 0.5


def test_who_proves_nothing_gets_no_more_threads() -> None:
    shards = fake_shards(1)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric, ExitStack() as stack:
        connect = partial(socket.create_connection, ("127.0.0.1", listeners[0].port), timeout=2)
        strangers = [stack.enter_context(connect()) for _ in range(link.MAX_UNPROVEN + 5)]
        for sock in strangers[:5]:  # long before the deadline of their handshake
            while read_some(sock):
                pass
        until = time.monotonic() + 2
        while len(threads_of_links()) > link.MAX_UNPROVEN + 1:
            assert time.monotonic() < until, threads_of_links()
        with connected(*addresses_of(listeners)) as another:
            for each in (fabric, another):
                given = layer_input(3)
                assert torch.equal(through(each, 0, given), in_process(shards, 0, given))


def test_a_layer_that_no_frame_holds_is_our_bug_and_reaches_no_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    shards = fake_shards(1)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        monkeypatch.setattr(frames, "MAX_PAYLOAD_BYTES", 1 << 16)
        most = frames.max_rows(HIDDEN, F32)
        with pytest.raises(AssertionError, match="no frame holds"):
            fabric.dispatch(0, *layer_input(most + 1, top_k=frames.MAX_TOP_K))
        given = layer_input(most, top_k=frames.MAX_TOP_K)
        assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))


def test_a_router_whose_kernel_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """This one lives, but says nothing within the silence, shorter here than any keepalive."""
    monkeypatch.setattr(link, "PATROL_S", 0.05)
    monkeypatch.setattr(link, "SILENCE_S", 0.3)
    shards = fake_shards(1)
    with listening(shards) as listeners, connected(*addresses_of(listeners)) as fabric:
        for _ in range(10):
            time.sleep(0.05)
            given = layer_input(3)
            assert torch.equal(through(fabric, 0, given), in_process(shards, 0, given))
        time.sleep(0.6)
        with pytest.raises(PeerLost, match="closed the link"):
            through(fabric, 0, layer_input(3))


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
