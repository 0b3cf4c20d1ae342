"""The handshake of fabric `tcp`: both ends prove that they hold the shard's token, which never crosses the wire.

    shard  -> router  CHALLENGE  nonce_s
    router -> shard   ANSWER     nonce_r | HMAC-SHA256(token, b"router" | nonce_s | nonce_r | name)
    shard  -> router  WELCOME    HMAC-SHA256(token, b"shard" | nonce_s | nonce_r | name)

The name stands for one incarnation of a rank, so a process that was given a dead shard's port is not taken for that shard.
The handshake proves who connected; what follows is neither encrypted nor signed.
"""

import hmac
import os
import socket

from experts.fabric.tcp.frames import HEADER_BYTES, NONCE_BYTES, FrameBuffer, Kind, error_frame, small_frame
from experts.fabric.tcp.sockets import Deadline, PeerError, receive_frame, send_frame, set_kernel_timeout


def prove_router(sock: socket.socket, *, name: str, token: bytes, within_s: float) -> None:
    """Shake hands as the router. Raises PeerError if either proof is wrong, BadFrame or OSError if it got no answer.

    Leaves no time-out on the socket.
    """
    talk = _Talk(sock, within_s)
    nonce_s = talk.receive(Kind.CHALLENGE)
    nonce_r = os.urandom(NONCE_BYTES)
    talk.send(small_frame(Kind.ANSWER, nonce_r + _proof(token, b"router", nonce_s, nonce_r, name)))
    proof = talk.receive(Kind.WELCOME)
    if not hmac.compare_digest(proof, _proof(token, b"shard", nonce_s, nonce_r, name)):
        raise PeerError(f"what listens there is not {name}: it does not hold its token")
    talk.end()


def prove_shard(sock: socket.socket, *, name: str, token: bytes, within_s: float) -> None:
    """Shake hands as the shard. If the router's proof is wrong, tells the router and raises PeerError.

    Raises BadFrame or OSError if it got no answer. Leaves no time-out on the socket.
    """
    talk = _Talk(sock, within_s)
    nonce_s = os.urandom(NONCE_BYTES)
    talk.send(small_frame(Kind.CHALLENGE, nonce_s))
    answer = talk.receive(Kind.ANSWER)
    nonce_r, proof = answer[:NONCE_BYTES], answer[NONCE_BYTES:]
    if not hmac.compare_digest(proof, _proof(token, b"router", nonce_s, nonce_r, name)):
        sentence = f"refused by {name}: wrong token, or meant for another shard"
        talk.send(error_frame(sentence))
        raise PeerError(sentence)
    talk.send(small_frame(Kind.WELCOME, _proof(token, b"shard", nonce_s, nonce_r, name)))
    talk.end()


def _proof(token: bytes, role: bytes, nonce_s: bytes, nonce_r: bytes, name: str) -> bytes:
    return hmac.digest(token, role + nonce_s + nonce_r + name.encode(), "sha256")


class _Talk:
    """A conversation of small frames under one deadline."""

    def __init__(self, sock: socket.socket, within_s: float) -> None:
        self._sock = sock
        self._buffer = FrameBuffer(pinned=False)
        self._deadline = Deadline(within_s)

    def send(self, frame: memoryview) -> None:
        self._wait_no_longer()
        send_frame(self._sock, frame, keep_waiting=self._wait_no_longer)

    def receive(self, kind: Kind) -> bytes:
        self._wait_no_longer()
        shape_half = receive_frame(
            self._sock,
            self._buffer,
            accept=lambda shape_half: shape_half.kind is kind,
            keep_waiting=self._wait_no_longer,
        )
        assert shape_half is not None, "a handshake's buffer is laid out for nothing"
        return bytes(self._buffer.view[HEADER_BYTES : HEADER_BYTES + shape_half.payload_bytes])

    def end(self) -> None:
        self._set_timeouts(0)

    def _wait_no_longer(self) -> None:
        """Let the next wait last as long as the deadline allows. Raises TimeoutError if nothing is left."""
        self._set_timeouts(self._deadline.left_s())

    def _set_timeouts(self, seconds: float) -> None:
        set_kernel_timeout(self._sock, socket.SO_RCVTIMEO, seconds)
        set_kernel_timeout(self._sock, socket.SO_SNDTIMEO, seconds)
