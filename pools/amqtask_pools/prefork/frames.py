"""Packets between parent and child: a request each, or a batch of outcomes; large messages are cut into pieces.

SOCK_SEQPACKET keeps packet borders and gives each packet to exactly one reader, the first process with the reading end that
reads: so the parent can take back packets that a child has not read yet (see process.py).

The first byte is the packet's type. A pickle begins with PICKLE (the opcode PROTO), so a complete message needs no frame.

Requests are pickles: only the parent writes them. Any code in a child can write to its socket, which the parent reads: outcomes
are therefore in a format whose reading executes no code (see outcomes.py), and every other packet is a BrokenFrame.
"""

from __future__ import annotations

import pickle
import socket
import struct

from amqtask.exceptions import InvalidTaskError
from amqtask.execution.request import Request

PICKLE, PART, LAST, READY, STOP, OUTCOMES, SUCCESSES = 0x80, 0x01, 0x02, 0x03, 0x04, 0x05, 0x06
IS_READY, GO = bytes([READY]), bytes([STOP])
# A complete packet must fit into the socket's send buffer.
PIECE = 60 * 1024
BUFFER = 1024 * 1024
# The longest message that is joined from pieces: no broker takes half as much (its `max_message_size`).
LONGEST = 1 << 30
# Datagram sockets do not notice the parent's end: with them children look for the parent after so many seconds.
LOOK_FOR_PARENT = 1
_PROTOCOL = pickle.HIGHEST_PROTOCOL


def encode_request(request: Request) -> bytes:
    """One message; cut it when it is longer than PIECE. Raises: InvalidTaskError for headers that cannot be pickled."""
    try:
        return pickle.dumps(request.to_frame(), _PROTOCOL)
    except (RecursionError, pickle.PicklingError, TypeError, ValueError, AttributeError) as error:
        raise InvalidTaskError(
            f"the message cannot be handed to a child process: {type(error).__name__}: {error}"
        ) from error


def decode_request(message: bytes | memoryview) -> Request:
    """The request that `encode_request` wrote."""
    return Request.from_frame(pickle.loads(message))


def number_of(message: bytes | memoryview) -> int:
    """The number of an encoded request."""
    number: int = pickle.loads(message)[0]
    return number


def cut(message: bytes) -> list[bytes]:
    """The packets of a long message."""
    pieces = [message[start : start + PIECE] for start in range(0, len(message), PIECE)]
    packet_types = [PART] * (len(pieces) - 1) + [LAST]
    return [bytes([packet_type]) + piece for packet_type, piece in zip(packet_types, pieces, strict=True)]


class BrokenFrame(Exception):
    """A packet that the other end would never write."""


class FrameReader:
    """ChordJoiner the pieces of messages of one direction."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._size = 0

    def feed(self, packet: memoryview) -> bytes | None:
        """The message, when this packet was its last piece. Raises: BrokenFrame."""
        if len(packet) == 0 or packet[0] not in (PART, LAST):
            raise BrokenFrame(f"a packet that begins with {bytes(packet[:20])!r}")
        self._size += len(packet) - 1
        if self._size > LONGEST:
            raise BrokenFrame(f"a message of more than {LONGEST:,} bytes")
        self._pieces.append(bytes(packet[1:]))
        if packet[0] == PART:
            return None
        message = b"".join(self._pieces)
        self._pieces.clear()
        self._size = 0
        return message


def socket_pair(socket_type: int | None = None) -> tuple[socket.socket, socket.socket]:
    """(parent's end, child's end). Datagram sockets where there is no SOCK_SEQPACKET (macOS): the same, but without hang-ups."""
    if socket_type is None:
        try:
            return socket_pair(socket.SOCK_SEQPACKET)
        except OSError:
            socket_type = socket.SOCK_DGRAM
    ends = socket.socketpair(socket.AF_UNIX, socket_type)
    for end in ends:
        end.settimeout(None)  # whatever a user's module has set with socket.setdefaulttimeout
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, BUFFER)
    if socket_type == socket.SOCK_DGRAM:
        # A timeout by the kernel: with Python's every read would wait, even with MSG_DONTWAIT.
        ends[1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", LOOK_FOR_PARENT, 0))
    return ends
