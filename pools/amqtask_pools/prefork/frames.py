"""Packets between parent and child: one SOCK_SEQPACKET packet is one request or a batch of outcomes; large ones are cut.

SEQPACKET keeps packet borders and delivers each packet to exactly one reader, whoever of the two processes that hold the
reading end asks first: that lets the parent take back what a child has not read yet (see process.py).
"""

from __future__ import annotations

import pickle
import socket
from typing import TYPE_CHECKING, Any

from amqtask.execution.outcome import Outcome
from amqtask.execution.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

# A packet must fit into the socket's send buffer whole; larger messages go in pieces.
PIECE = 64 * 1024
BUFFER = 1024 * 1024
_WHOLE, _PART, _LAST = b"\x00", b"\x01", b"\x02"


def encode_request(request: Request) -> list[bytes]:
    """The packets of a request."""
    return _cut(pickle.dumps(request.to_frame(), pickle.HIGHEST_PROTOCOL))


def encode_outcomes(outcomes: Sequence[Outcome]) -> list[bytes]:
    """The packets of a batch of outcomes."""
    return _cut(pickle.dumps([tuple(outcome) for outcome in outcomes], pickle.HIGHEST_PROTOCOL))


def decode_request(body: bytes) -> Request:
    """What `encode_request` wrote."""
    return Request.from_frame(pickle.loads(body))


def decode_outcomes(body: bytes) -> list[Outcome]:
    """What `encode_outcomes` wrote."""
    return [Outcome(*fields) for fields in pickle.loads(body)]


def _cut(body: bytes) -> list[bytes]:
    if len(body) < PIECE:
        return [_WHOLE + body]
    pieces = [body[start : start + PIECE] for start in range(0, len(body), PIECE)]
    return [*(_PART + piece for piece in pieces[:-1]), _LAST + pieces[-1]]


class Joiner:
    """Puts the pieces of one direction together."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def feed(self, packet: bytes) -> bytes | None:
        """The whole message when this packet completes one."""
        kind, piece = packet[:1], packet[1:]
        if kind == _WHOLE:
            return piece
        self._pieces.append(piece)
        if kind == _PART:
            return None
        body = b"".join(self._pieces)
        self._pieces.clear()
        return body


def socket_pair() -> tuple[Any, Any]:
    """(parent's end, child's end), with buffers that hold a few pieces."""
    kind = getattr(socket, "SOCK_SEQPACKET", socket.SOCK_DGRAM)
    ends = socket.socketpair(socket.AF_UNIX, kind)
    for end in ends:
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    return ends
