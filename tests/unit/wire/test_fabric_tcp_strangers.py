"""Tests of who may connect to a shard, and of what becomes of those who may not or who break the protocol."""

import socket
import threading
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import pytest
import torch

from experts.fabric import PeerLost, ShardAddress
from experts.fabric.tcp import shard_end
from experts.fabric.tcp.frames import FrameShape, Kind, LayerFrame, ShapeHalf, small_frame, write_step_half
from experts.fabric.tcp.handshake import prove_router
from experts.fabric.tcp.sockets import Deadline, send_frame
from tests.support.fake_shard import (
    HIDDEN,
    TOKEN,
    addresses_of,
    connected,
    fake_shards,
    in_process,
    layer_input,
    listening,
    members_of,
    tcp_fabric,
    threads_of_links,
    through,
)

F32 = torch.float32


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
    frame.shape_half[:] = frame.laid_out_shape_half
    write_step_half(frame, epoch=1, step=0, layer=0)
    return frame.frame


@pytest.mark.parametrize(
    "sent",
    [
        layer_frame(2, HIDDEN + 2),
        memoryview(bytes(layer_frame(2, HIDDEN)) * 2),
        small_frame(Kind.WELCOME, bytes(32)),
        memoryview(ShapeHalf(Kind.LAYER, 1 << 40, FrameShape(1 << 31, HIDDEN, 0, F32)).pack() + bytes(32)),
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
        strangers = [stack.enter_context(connect()) for _ in range(shard_end.MAX_UNPROVEN + 5)]
        for sock in strangers[:5]:  # long before the deadline of their handshake
            while read_some(sock):
                pass
        until = time.monotonic() + 2
        while len(threads_of_links()) > shard_end.MAX_UNPROVEN + 1:
            assert time.monotonic() < until, threads_of_links()
        with connected(*addresses_of(listeners)) as another:
            for each in (fabric, another):
                given = layer_input(3)
                assert torch.equal(through(each, 0, given), in_process(shards, 0, given))
