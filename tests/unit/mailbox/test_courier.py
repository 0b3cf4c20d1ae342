"""Couriers: a lane whose ends are in two regions works as one in a shared region, over any number of sockets."""

import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.fabric.mailbox import courier, words
from experts.fabric.mailbox.courier import (
    Incoming,
    Outgoing,
    inbox_segments,
    num_stripes_of,
    outbox_segments,
)
from experts.fabric.mailbox.host import HostRouterLane, HostShardLane
from experts.fabric.mailbox.region import LaneShape, Region
from experts.fabric.mailbox.words import StopWord


def pairs(number: int) -> list[tuple[socket.socket, socket.socket]]:
    """Connected TCP sockets over the loopback, with buffers so small that a stripe needs many turns."""
    made = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        for _ in range(number):
            ours = socket.create_connection(server.getsockname())
            theirs, _ = server.accept()
            for sock in (ours, theirs):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
            made.append((ours, theirs))
    return made


class FarLane:
    """A router and a shard on two hosts: each has an outbox and an inbox of its own, and couriers between them."""

    def __init__(self, shape: LaneShape, num_sockets: int) -> None:
        self.shape = shape
        self.stops = StopWord(pinned=False), StopWord(pinned=False)
        self.outboxes = Region.create(shape.outbox_bytes), Region.create(shape.outbox_bytes)
        self.inboxes = Region.create(shape.inbox_bytes), Region.create(shape.inbox_bytes)
        self.sockets = pairs(2 * num_sockets)
        there, back = self.sockets[:num_sockets], self.sockets[num_sockets:]
        near, far = self.stops
        self.outgoing = (
            Outgoing(
                [ours for ours, _ in there], self.outboxes[0], outbox_segments(shape, self.outboxes[0]), near
            ),
            Outgoing(
                [theirs for _, theirs in back], self.inboxes[1], inbox_segments(shape, self.inboxes[1]), far
            ),
        )
        self.incoming = (
            Incoming(
                [theirs for _, theirs in there],
                self.outboxes[1],
                outbox_segments(shape, self.outboxes[1]),
                far,
                max_rows=shape.rows,
            ),
            Incoming(
                [ours for ours, _ in back],
                self.inboxes[0],
                inbox_segments(shape, self.inboxes[0]),
                near,
                max_rows=shape.rows,
            ),
        )
        self.router = HostRouterLane(shape, self.outboxes[0], near)
        self.shard = HostShardLane(shape, self.outboxes[1], self.inboxes[1], far)

    def begin(self, *, first: int, layers: int, rows: int) -> None:
        self.router.begin(first=first, rows=rows, inboxes=[self.inboxes[0]])
        self.shard.begin(first=first, rows=rows)
        for one in self.outgoing:
            one.begin(first=first, layers=layers, rows=rows)

    def close(self) -> None:
        for stop in self.stops:
            stop.raise_to(2**62)
        for pair in self.sockets:
            for sock in pair:
                sock.shutdown(socket.SHUT_RDWR)
        for one in (*self.outgoing, *self.incoming):
            one.close()
        for pair in self.sockets:
            for sock in pair:
                sock.close()
        for region in (*self.outboxes, *self.inboxes):
            region.close()
        assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("courier")]


@contextmanager
def far_lane(shape: LaneShape, num_sockets: int) -> Iterator[FarLane]:
    lane = FarLane(shape, num_sockets)
    try:
        yield lane
    finally:
        lane.close()


def negate(lane: FarLane, rows: int, layers: int) -> None:
    """Serve a step at the shard's end: minus x times its first weight plus its first id."""
    shape = lane.shape
    x_TD = torch.empty(rows, shape.hidden, dtype=shape.dtype)
    ids_TK, w_TK = torch.empty(rows, shape.top_k, dtype=torch.int32), torch.empty(rows, shape.top_k)
    for position in range(layers):
        lane.shard.take(position, x_TD, ids_TK, w_TK)
        lane.shard.post(position, (-x_TD * w_TK[:, :1] + ids_TK[:, :1]).to(shape.dtype))


@given(
    rows=st.lists(st.sampled_from([1, 2, 7, 40]), min_size=1, max_size=3),
    num_sockets=st.integers(1, 3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    stripe_bytes=st.sampled_from([64, 1000, 1 << 20]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_a_far_lane_is_a_near_one(
    rows: list[int], num_sockets: int, dtype: torch.dtype, stripe_bytes: int, seed: int
) -> None:
    shape, layers = LaneShape(rows=40, hidden=256, top_k=3, dtype=dtype), 4
    generator = torch.Generator().manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch, far_lane(shape, num_sockets) as lane:
        patch.setattr(courier, "STRIPE_BYTES", stripe_bytes)
        for step, num_rows in enumerate(rows):
            lane.begin(first=1 + step * layers, layers=layers, rows=num_rows)
            thread = threading.Thread(target=negate, args=(lane, num_rows, layers))
            thread.start()
            for position in range(layers):
                x_TD = torch.randn(num_rows, shape.hidden, generator=generator).to(dtype)
                ids_TK = torch.randint(0, 99, (num_rows, 3), generator=generator, dtype=torch.int32)
                w_TK = torch.rand(num_rows, 3, generator=generator)
                out_TD = torch.full_like(x_TD, torch.nan)
                lane.router.post(position, x_TD, ids_TK, w_TK)
                lane.router.take_sum(position, None, out_TD)
                assert torch.equal(out_TD, (-x_TD * w_TK[:, :1] + ids_TK[:, :1]).to(dtype))
            thread.join(20)
            assert not thread.is_alive()
        payload = sum(layers * num_rows * shape.hidden * dtype.itemsize for num_rows in rows)
        assert lane.incoming[1].bytes_moved == payload
        lane.outgoing[1].close()  # they count what they have sent when that has arrived, perhaps
        assert lane.outgoing[1].bytes_moved == payload


def test_a_stop_ends_a_step_between_its_layers_and_the_next_begins() -> None:
    shape = LaneShape(rows=4, hidden=16, top_k=2, dtype=torch.float32)
    x_TD, ids_TK, w_TK = torch.ones(4, 16), torch.zeros(4, 2, dtype=torch.int32), torch.ones(4, 2)
    with far_lane(shape, 2) as lane:
        lane.begin(first=1, layers=5, rows=4)
        lane.router.post(0, x_TD, ids_TK, w_TK)
        assert words.wait(lane.outboxes[1].address, lane.stops[1].address, 1), "the first layer has come"
        for stop in lane.stops:
            stop.raise_to(5)
        lane.begin(first=6, layers=1, rows=4)
        thread = threading.Thread(target=negate, args=(lane, 4, 1))
        thread.start()
        out_TD = torch.empty(4, 16)
        lane.router.post(0, x_TD * 3, ids_TK, w_TK)
        lane.router.take_sum(0, None, out_TD)
        thread.join(20)
        assert out_TD.tolist() == torch.full((4, 16), -3.0).tolist()


@pytest.mark.parametrize(
    "header",
    [(1, 5, 1, 80), (1, -1, 1, 0), (1, 1, 0, 64), (1, 1, 2, 64), (1, 1, 1, 63), (1, 1, 1, 2**40)],
    ids=[
        "more rows than the lane has",
        "fewer than none",
        "no stripe",
        "more stripes than sockets",
        "short",
        "long",
    ],
)
def test_what_is_no_message_of_the_lane_is_refused_and_raises_no_flag(header: tuple[int, ...]) -> None:
    shape = LaneShape(rows=4, hidden=16, top_k=2, dtype=torch.float32)
    region, stop = Region.create(shape.inbox_bytes), StopWord(pinned=False)
    [(ours, theirs)] = pairs(1)
    with ours, theirs:
        incoming = Incoming([theirs], region, inbox_segments(shape, region), stop, max_rows=shape.rows)
        ours.sendall(struct.pack("<4q", *header))
        for thread in incoming._threads:
            thread.join(10)
        assert incoming.refused
        assert words.read(region.address) == 0
        assert not region.bytes.any()
    region.close()


def test_a_socket_at_its_end_ends_the_courier() -> None:
    shape = LaneShape(rows=4, hidden=16, top_k=2, dtype=torch.float32)
    region, stop = Region.create(shape.inbox_bytes), StopWord(pinned=False)
    [(ours, theirs)] = pairs(1)
    with theirs:
        incoming = Incoming([theirs], region, inbox_segments(shape, region), stop, max_rows=shape.rows)
        ours.sendall(struct.pack("<4q", 1, 4, 1, 256) + bytes(100))  # and no more of it
        ours.close()
        incoming.close()
    assert not [thread for thread in incoming._threads if thread.is_alive()]
    assert (incoming.refused, words.read(region.address)) == (False, 0)
    region.close()


@given(st.integers(0, 1 << 26), st.integers(1, 8))
def test_stripes_are_not_small(payload_bytes: int, num_sockets: int) -> None:
    number = num_stripes_of(payload_bytes, num_sockets)
    assert 1 <= number <= num_sockets
    assert number == 1 or payload_bytes / number >= courier.STRIPE_BYTES


@pytest.mark.parametrize("function", [courier._send_step, courier._receive], ids=["send", "receive"])
def test_llvm_gets_atomic_operations(function: Any) -> None:
    """Plain loads and stores of flags pass every test on x86, and fail on the Arm cores of a Spark."""
    [code] = function.inspect_llvm().values()
    assert re.search(r"load atomic i64, .* acquire", code)
    assert re.search(r"store atomic i64 .* release", code)
