"""Stream: bytes to and from a broker over a non-blocking socket; waiting is one call, which any exception may interrupt.

Only errors of system calls are caught here: exceptions that a signal handler raises, or that another thread raises in this one,
pass through (see `is_failure`).
"""

from __future__ import annotations

import _socket
import errno
import os
import select
import socket
import ssl
import time
from functools import lru_cache
from types import FrameType
from typing import Any, Protocol

from amqtask.transport.resolving import AddressInfo, resolve

# Bytes that are read at once.
CHUNK = 65536
# A peer that is gone without a close is noticed after a minute of unanswered probes (seconds; USER_TIMEOUT milliseconds).
TCP_OPTIONS = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 30_000}
# Modules that a system call's error comes from: ours, the modules around it, and those that green libraries replace them by.
_MAKERS = ("amqtask", "socket", "ssl", "eventlet", "gevent")


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

    def open(self, deadline: float) -> None: ...

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

    # -- connecting

    def open(self, deadline: float) -> None:
        """Connect before the deadline (monotonic seconds). Raises: OSError."""
        candidates = resolve(self._host, self._port, deadline)
        for index, candidate in enumerate(candidates):
            now = time.monotonic()
            try:
                self._connect(candidate, now + (deadline - now) / (len(candidates) - index))
            except OSError as error:
                if index == len(candidates) - 1 or not is_failure(error):
                    raise
                self.close()
            else:
                break
        if self._tls is not None:
            self._secure(deadline)

    def _connect(self, address_info: AddressInfo, deadline: float) -> None:
        family, socket_type, protocol, _, address = address_info
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
        return data

    def write(self, data: memoryview) -> int:
        """Write without waiting; how many bytes the socket took. Raises: OSError."""
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
        sock, self._poller = self._sock, None
        if sock is not None:
            sock.close()
            self._sock = None
