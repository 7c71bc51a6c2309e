"""Bytes to and from a broker, for whoever has no loop: a non-blocking socket, the way to its host, and the frames in the bytes.

Waiting is one call, which any exception may interrupt. Only errors of system calls are caught here: exceptions that a signal
handler raises, or that another thread raises in this one, pass through (see `is_failure`).

A frame is its type, channel and size, the payload, and a mark for its end (AMQP 0-9-1, sections 2.3.5 and 4.2).
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import socket
import ssl
import struct
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pika import frame, spec

from amqtask.protocol.message import Message
from amqtask.protocol.serialization import is_own
from amqtask.transport.content import FRAME_MAX, FRAMING, basic_properties, check_frame
from amqtask.transport.resolving import AddressInfo, avoid, resolve

if TYPE_CHECKING:
    from amqtask.protocol.message import PropertiesLike


T = TypeVar("T")
# The one channel that a link speaks on.
CHANNEL = 1
GREETING = frame.ProtocolHeader().marshal()
HEARTBEAT = frame.Heartbeat().marshal()
_HEAD, _END = 7, 1
_head = struct.Struct(">BHL").unpack_from
_content_head = struct.Struct(">HHQ").unpack_from
# Bytes that are read at once.
CHUNK = 65536
_CAPABILITIES = {
    "authentication_failure_close": True,
    "basic.nack": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
    "exchange_exchange_bindings": True,
    "publisher_confirms": True,
}
# A peer that is gone without a close is noticed after a minute of unanswered probes (seconds; USER_TIMEOUT milliseconds).
TCP_OPTIONS = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
# Modules that a system call's error comes from: ours, the modules around it, and those that green libraries replace them by.
_MAKERS = ("amqtask", "socket", "ssl", "eventlet", "gevent")


# -- frames


class Unreadable(Exception):
    """Bytes that are no AMQP 0-9-1 frame."""


class Frames:
    """Cuts the bytes that come into frames."""

    def __init__(self) -> None:
        self._buffer = b""
        self.frame_max = FRAME_MAX

    def feed(self, data: bytes) -> list[tuple[int, int, bytes]]:
        """The frames that are complete: type, channel, payload. Raises: Unreadable."""
        buffer = self._buffer + data if self._buffer else data
        frames = []
        offset = 0
        while len(buffer) - offset >= _HEAD:
            frame_type, channel, size = _head(buffer, offset)
            if not spec.FRAME_METHOD <= frame_type <= spec.FRAME_HEARTBEAT or size > self.frame_max:
                raise Unreadable(f"this is not AMQP 0-9-1: {buffer[offset : offset + 16]!r}")
            begin = offset + _HEAD
            end = begin + size
            if len(buffer) <= end:
                break
            if buffer[end] != spec.FRAME_END:
                raise Unreadable(f"a frame has no end: {buffer[end : end + 16]!r}")
            frames.append((frame_type, channel, buffer[begin:end]))
            offset = end + _END
        self._buffer = buffer[offset:]
        return frames


# -- from the broker


def decode_method(payload: bytes) -> Any:
    """pika's object of a method. Raises: Unreadable."""

    def decode() -> object:
        return spec.methods[struct.unpack_from(">I", payload)[0]]().decode(payload, 4)

    method, error = attempt(decode)
    if error is not None:
        raise Unreadable(f"a method cannot be read: {error!r}") from error
    return method


def content_size(payload: bytes) -> int:
    """How long the body will be."""
    size: int = _content_head(payload)[2]
    return size


def decode_properties(payload: bytes) -> tuple[PropertiesLike, Exception | None]:
    """The properties of a message, and the error when they cannot be read."""
    properties, error = attempt(lambda: spec.BasicProperties().decode(payload, _content_head_size))
    return (spec.BasicProperties() if properties is None else properties), error


_content_head_size = struct.calcsize(">HHQ")


class Content:
    """Puts a message together: its method, its properties, and the pieces of its body, which come in frames of their own."""

    def __init__(self) -> None:
        self._method: Any = None
        self._properties: tuple[PropertiesLike, Exception | None] | None = None
        self._missing = 0
        self._body = b""

    def begin(self, method: Any) -> None:
        """The method of a message; None: there is no message."""
        self._method, self._properties = method, None

    def add(self, frame_type: int, payload: bytes) -> tuple[Any, PropertiesLike, bytes, Exception | None] | None:
        """A header or a piece of the body; once all is there: method, properties, body, and why the properties cannot be read.

        Raises: Unreadable for a frame that does not follow."""
        if frame_type == spec.FRAME_HEADER:
            if self._method is None or self._properties is not None:
                raise Unreadable("a content header without its method")
            self._properties, self._missing, self._body = decode_properties(payload), content_size(payload), b""
        else:
            if self._method is None or self._properties is None:
                raise Unreadable("a body without its header")
            self._missing -= len(payload)
            self._body += payload
        if self._missing > 0:
            return None
        method, (properties, error), body = self._method, self._properties, self._body
        self.begin(None)
        self._body = b""
        return method, properties, body, error


# -- to the broker


def start_ok(client_properties: dict[str, object], mechanism: str, response: bytes) -> spec.Connection.StartOk:
    """The method with which a link logs in, and says what it is and can do."""
    platform = f"Python {sys.version.split()[0]}"
    client_information = {"platform": platform, "capabilities": _CAPABILITIES, **client_properties}
    return spec.Connection.StartOk(client_information, mechanism, response, "en_US")


def encode_method(method: Any, channel: int = CHANNEL) -> bytes:
    """A method's frame. Raises: pika's errors for a value that AMQP cannot encode."""
    encoded: bytes = frame.Method(channel, method).marshal()
    return encoded


def encode_publish(message: Message, frame_max: int) -> bytes:
    """The frames of basic.publish. Raises: FrameTooLarge, and pika's errors for a value that AMQP cannot encode."""
    body = message.body
    header = frame.Header(CHANNEL, len(body), basic_properties(message.properties)).marshal()
    check_frame(len(header), frame_max)
    pieces = [_publish_frame(message.exchange, message.routing_key, message.mandatory), header]
    piece = frame_max - FRAMING
    pieces += [frame.Body(CHANNEL, body[at : at + piece]).marshal() for at in range(0, len(body), piece)]
    return b"".join(pieces)


# A program publishes to few places, again and again.
@lru_cache(maxsize=1024)
def _publish_frame(exchange: str, routing_key: str, mandatory: bool) -> bytes:
    return encode_method(spec.Basic.Publish(exchange=exchange, routing_key=routing_key, mandatory=mandatory))


def attempt(function: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result of a pure function, or its error.

    An exception that was raised into it from outside (by a signal handler, another thread) passes through; so does a
    RecursionError, which is about who calls."""
    try:
        return function(), None
    except RecursionError:
        raise
    except Exception as error:
        if not is_own(error, function):
            raise
        return None, error


# -- the socket


def is_failure(error: OSError) -> bool:
    """Whether this is the error of a system call. A signal handler's TimeoutError is an OSError too; but it has no errno, or
    comes from another module."""
    tb = error.__traceback__
    while tb is not None and tb.tb_next is not None:
        tb = tb.tb_next
    return error.errno is not None and (tb is None or _module(tb.tb_frame) in _MAKERS)


@lru_cache(maxsize=4)
def _socket_class(base: Any) -> Any:
    """The socket class of this process (green libraries have their own), with a close that works while __init__ is running."""
    return type("Socket", (base,), {"_io_refs": 0, "_closed": False}) if issubclass(base, _socket.socket) else base


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


class ByteStream(Protocol):
    """What a Link asks of the way to its broker; see Stream. Each method raises OSError when the connection is lost."""

    def open(self, deadline: float) -> float: ...

    def read(self) -> bytes | None: ...

    def write(self, data: memoryview) -> int: ...

    @property
    def keeps_bytes(self) -> bool: ...

    def wait(self, seconds: float, *, writable: bool = False) -> bool: ...

    def close(self) -> None: ...


class Stream:
    """A connected socket, plain or TLS (`tls`: pika's SSLOptions)."""

    def __init__(self, host: str, port: int, tls: Any = None) -> None:
        self._host, self._port, self._tls = host, port, tls
        self._sock: Any = None
        self._poller: Any = None
        # Where it is connected to, or tries to, while it owes an answer: nothing was read since the last write.
        self._owes: object = None
        self._address: object = None

    # -- connecting

    def open(self, deadline: float) -> float:
        """Connect before the deadline (monotonic seconds). Returns until when the broker has to answer: of several addresses none
        has the time of those after it. Raises: OSError."""
        candidates = resolve(self._host, self._port, deadline)
        share = deadline
        for index, candidate in enumerate(candidates):
            now = time.monotonic()
            share = now + (deadline - now) / (len(candidates) - index)
            try:
                self._connect(candidate, share)
            except OSError as error:
                if index == len(candidates) - 1 or not is_failure(error):
                    raise
                self.close()
            else:
                break
        if self._tls is not None:
            self._secure(share)
        return share

    def _connect(self, address_info: AddressInfo, deadline: float) -> None:
        family, socket_type, protocol, _, address = address_info
        self._address = self._owes = address
        socket_class = _socket_class(socket.socket)
        # Stored before it has a descriptor: when an exception is raised meanwhile, `close` still finds the socket.
        sock = self._sock = socket_class.__new__(socket_class)
        sock.__init__(family, socket_type, protocol)
        self._use(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in TCP_OPTIONS.items():
            if hasattr(socket, name):  # not every system has all
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        try:
            sock.connect(address)
        except BlockingIOError:
            self._demand(deadline, writable=True)
            code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                raise OSError(code, os.strerror(code)) from None

    def _secure(self, deadline: float) -> None:
        sock = self._use(
            self._tls.context.wrap_socket(
                self._sock,
                do_handshake_on_connect=False,
                suppress_ragged_eofs=False,
                server_hostname=self._tls.server_hostname,
            )
        )
        while True:
            try:
                sock.do_handshake()
            except ssl.SSLWantReadError:
                self._demand(deadline)
            except ssl.SSLWantWriteError:
                self._demand(deadline, writable=True)
            else:
                return

    def _use(self, sock: Any) -> Any:
        self._sock = sock
        sock.setblocking(False)
        # eventlet's select module has no poll, and its select takes any descriptor.
        if hasattr(select, "poll"):
            self._poller = select.poll()
            self._poller.register(sock.fileno(), select.POLLIN)
        return sock

    def _demand(self, deadline: float, *, writable: bool = False) -> None:
        seconds_left = deadline - time.monotonic()
        if seconds_left <= 0 or not self.wait(seconds_left, writable=writable):
            raise TimeoutError(errno.ETIMEDOUT, "no answer in time")

    # -- using

    def read(self) -> bytes | None:
        """The bytes that have come; None when there are none now, b"" at the end of the stream. Raises: OSError."""
        try:
            data: bytes = self._sock.recv(CHUNK)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        except ssl.SSLEOFError:
            return b""
        if data:
            self._owes = None
        return data

    def write(self, data: memoryview) -> int:
        """Write without waiting; how many bytes the socket took. Raises: OSError."""
        self._owes = self._address
        try:
            return int(self._sock.send(data))
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return 0

    @property
    def keeps_bytes(self) -> bool:
        """Whether TLS may hold bytes that `read` has not returned yet, for which a wait on the socket would not end."""
        return self._tls is not None and bool(self._sock.pending())

    def wait(self, seconds: float, *, writable: bool = False) -> bool:
        """Wait until there are bytes to read (or the end), or, with `writable`, until it takes writes; False after `seconds`."""
        if self._poller is None:
            sockets = [self._sock]
            return any(select.select(sockets, sockets if writable else [], [], seconds))
        if not writable:
            return bool(self._poller.poll(seconds * 1000))
        poller = select.poll()
        poller.register(self._sock.fileno(), select.POLLIN | select.POLLOUT)
        return bool(poller.poll(seconds * 1000))

    def close(self) -> None:
        """Close the socket; may be called twice."""
        if self._owes is not None:
            avoid(self._owes)
        sock, self._poller = self._sock, None
        if sock is not None:
            sock.close()
            self._sock = None
