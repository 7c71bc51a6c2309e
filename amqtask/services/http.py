"""A small HTTP/1.1 server on the worker's I/O loop, for monitors: metrics and health.

On the loop, not in a thread, for three reasons: the data are read where they change, without locks; it is the same under eventlet
and gevent, where threads are green; and a worker whose loop stands still does not answer, as it should.
One request per connection, GET and HEAD only. A client that is slow or sends much is cut off, and when the most connections are
open, the oldest one is closed for a new one.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from amqtask.exceptions import ConfigurationError
from amqtask.ground.printable import bounded_logger, clause

if TYPE_CHECKING:
    from amqtask.pool import Loop, Timer

logger = bounded_logger("amqtask.worker")

TEXT = "text/plain; charset=utf-8"
MOST_HEAD_BYTES = 16_384
MOST_CONNECTIONS = 64
PATIENCE_SECONDS = 5.0
_PHRASES = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}


class Reply(NamedTuple):
    """The reply of a page."""

    status: int
    body: bytes
    content_type: str = TEXT


# Called with the request's headers (lower-case names).
Page = Callable[[Mapping[str, str]], Reply]


def text(status: int, line: str) -> Reply:
    """A reply with one line of text."""
    return Reply(status, f"{line}\n".encode())


def respond(head: bytes, pages: Mapping[str, Page]) -> bytes:
    """The complete response to a request's head (all up to the empty line)."""
    lines = head.decode("latin-1").split("\r\n")
    method, _, target_and_version = lines[0].partition(" ")
    target, _, version = target_and_version.partition(" ")
    if not version.startswith("HTTP/1."):
        return _response(text(400, "this is an HTTP/1.1 server"))
    if method not in ("GET", "HEAD"):
        return _response(text(405, "only GET and HEAD"), "Allow: GET, HEAD\r\n")
    page = pages.get(target.partition("?")[0])
    paths = ", ".join(sorted(pages))
    reply = text(404, f"there are: {paths}") if page is None else _turn_to(page, _headers(lines[1:]))
    return _response(reply, with_body=method == "GET")


def _headers(lines: list[str]) -> dict[str, str]:
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


def _turn_to(page: Page, headers: Mapping[str, str]) -> Reply:
    try:
        return page(headers)
    except Exception as error:
        logger.exception("a page for monitors failed")
        return text(500, repr(error))


def _response(reply: Reply, extra_headers: str = "", *, with_body: bool = True) -> bytes:
    head = (
        f"HTTP/1.1 {reply.status} {_PHRASES[reply.status]}\r\nContent-Type: {reply.content_type}\r\n"
        f"Content-Length: {len(reply.body)}\r\nCache-Control: no-store\r\nConnection: close\r\n{extra_headers}\r\n"
    )
    return head.encode("latin-1") + (reply.body if with_body else b"")


class HttpServer:
    """Serves `pages` (path → page) on one port. With `port` 0 it takes a free one, which `port` then is."""

    name = "http"

    def __init__(self, loop: Loop, *, host: str, port: int, pages: Mapping[str, Page]) -> None:
        self._loop = loop
        self._host = host
        self.port = port
        self.pages = pages
        self._listener: socket.socket | None = None
        self._open: dict[int, _Connection] = {}

    def start(self) -> None:
        """Listen. Raises: ConfigurationError (the port is taken, or forbidden)."""
        if self._listener is not None:
            return
        family = socket.AF_INET6 if ":" in self._host else socket.AF_INET
        try:
            listener = socket.create_server((self._host, self.port), family=family, backlog=MOST_CONNECTIONS)
        except OSError as error:
            raise ConfigurationError(
                f"cannot listen on {self._host} port {self.port} for metrics or health: {clause(error.strerror or error)}. "
                "Give each worker of a host a port of its own."
            ) from error
        listener.setblocking(False)
        self._listener = listener
        self.port = listener.getsockname()[1]
        self._loop.add_reader(listener.fileno(), self._accept)

    def stop(self) -> None:
        if self._listener is not None:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None
        for connection in list(self._open.values()):
            connection.close()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            accepted, _ = self._listener.accept()
        except OSError as error:  # the client has gone again, or there are no more descriptors
            if error.errno in (errno.EMFILE, errno.ENFILE):
                self._make_room()
            return
        accepted.setblocking(False)
        if len(self._open) >= MOST_CONNECTIONS:
            self._make_room()
        self._open[accepted.fileno()] = _Connection(self._loop, accepted, self.pages, self._forget)

    def _make_room(self) -> None:
        """Close the oldest connection: a probe takes a moment only."""
        oldest = next(iter(self._open.values()), None)
        if oldest is not None:
            oldest.close()

    def _forget(self, fd: int) -> None:
        self._open.pop(fd, None)


class _Connection:
    """One request and its response."""

    def __init__(
        self, loop: Loop, sock: socket.socket, pages: Mapping[str, Page], on_closed: Callable[[int], None]
    ) -> None:
        self._loop = loop
        self._socket = sock
        self._fd = sock.fileno()
        self._pages = pages
        self._on_closed = on_closed
        self._head = b""
        self._unsent = memoryview(b"")
        self._timer: Timer | None = loop.call_later(PATIENCE_SECONDS, self.close)
        loop.add_reader(self._fd, self._read)

    def _read(self) -> None:
        try:
            piece = self._socket.recv(MOST_HEAD_BYTES)
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            self.close()
            return
        self._head += piece
        head, end, _ = self._head.partition(b"\r\n\r\n")
        if end:
            self._answer(respond(head, self._pages))
        elif len(self._head) > MOST_HEAD_BYTES:
            self._answer(_response(text(431, "too many headers")))

    def _answer(self, response: bytes) -> None:
        self._loop.remove_reader(self._fd)
        self._unsent = memoryview(response)
        self._loop.add_writer(self._fd, self._write)

    def _write(self) -> None:
        try:
            sent = self._socket.send(self._unsent)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self._unsent = self._unsent[sent:]
        if not self._unsent:
            self.close()

    def close(self) -> None:
        """Close the connection; may be called twice."""
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        self._loop.remove_reader(self._fd)
        self._loop.remove_writer(self._fd)
        try:
            # A child that was forked meanwhile has the socket, too: a mere close would not end the connection.
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:  # the client has closed its end
            pass
        self._socket.close()
        self._on_closed(self._fd)
