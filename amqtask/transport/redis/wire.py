"""RESP, the protocol of Redis, without I/O (https://redis.io/docs/reference/protocol-spec); where servers are, and one
connection on a loop."""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from amqtask.ground.loop import OneTimer
from amqtask.transport.resolving import Answer, avoid, is_address, look_up_in_thread, resolve

if TYPE_CHECKING:
    from amqtask.ground.loop import TurnLoop


Argument = bytes | str | int | float


_MAY_NOT = "The user executing the script can't "
_WITHIN = re.compile(r": -([A-Z]+) ")


class ReplyError(Exception):
    """An error that Redis answered; its first word is the code: OOM, READONLY, NOAUTH …"""

    @property
    def code(self) -> str:
        """The code. Before 7.2 what a script may not do has none of its own, and before 7.0 what it trips over is in its text."""
        text = str(self)
        if _MAY_NOT in text:
            return "NOPERM"
        within = _WITHIN.search(text) if "Error running script" in text else None
        return text.partition(" ")[0] if within is None else within[1]


class Push(NamedTuple):
    """What Redis says unasked: a published message, a key that has changed."""

    fields: list[Any]


def ignore_reply(reply: object) -> None:
    """For a command whose reply says nothing."""


class _Incomplete(Exception):
    """The rest has not come yet."""


def command(*arguments: Argument) -> bytes:
    """A command as an array of strings."""
    pieces = [b"*%d\r\n" % len(arguments)]
    for argument in arguments:
        encoded = argument if isinstance(argument, bytes) else str(argument).encode()
        pieces += (b"$%d\r\n" % len(encoded), encoded, b"\r\n")
    return b"".join(pieces)


# Types of replies by their first byte.
_STRINGS, _ARRAYS, _PUSH, _MAP = frozenset(b"$="), frozenset(b"*~%>"), ord(">"), ord("%")


class Parser:
    """Takes bytes as they come, and gives replies as they are complete. Strings are bytes, maps are flat lists."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        # Where that begins which is not read yet.
        self._position = 0
        # How long the buffer must at least be before it is worth reading on.
        self._needed = 0
        # Arrays that are not complete, the outer one first: type, size, and what is there. A long one comes in many pieces.
        self._arrays: list[tuple[int, int, list[Any]]] = []

    def feed(self, chunk: bytes) -> Iterator[Any]:
        """The replies that are complete with this chunk. Raises: ValueError when it is not RESP."""
        self._buffer += chunk
        while len(self._buffer) >= self._needed:
            try:
                reply = self._read()
            except _Incomplete:
                break
            yield reply
        if self._position:
            del self._buffer[: self._position]
            self._needed -= self._position
            self._position = 0

    def _read(self) -> Any:
        """The next reply. Raises: _Incomplete; what has come of it is kept."""
        buffer, position, arrays = self._buffer, self._position, self._arrays
        while True:
            end = buffer.find(b"\r\n", position)
            if end < 0:
                self._needed = len(buffer) + 1
                raise _Incomplete
            type_byte, next_position = buffer[position], end + 2
            value: Any = None
            if type_byte in _STRINGS:
                size = int(buffer[position + 1 : end])
                if size >= 0:
                    start, next_position = next_position, next_position + size + 2
                    if len(buffer) < next_position:
                        self._needed = next_position
                        raise _Incomplete
                    value = bytes(buffer[start : start + size])
            elif type_byte in _ARRAYS:
                size = int(buffer[position + 1 : end])
                if size > 0:
                    arrays.append((type_byte, 2 * size if type_byte == _MAP else size, []))
                    self._position = position = next_position
                    continue
                value = None if size < 0 else []
            else:
                value = _scalar(type_byte, bytes(buffer[position + 1 : end]))
            self._position = position = next_position
            while arrays:
                type_byte, size, values = arrays[-1]
                values.append(value)
                if len(values) < size:
                    break
                arrays.pop()
                value = Push(values) if type_byte == _PUSH else values
            else:
                return value


def _scalar(type_byte: int, text: bytes) -> Any:
    """What is on one line."""
    match chr(type_byte):
        case ":" | "(":
            return int(text)
        case "+":
            return text
        case "-":
            return ReplyError(text.decode(errors="replace"))
        case "_":
            return None
        case ",":
            return float(text)
        case "#":
            return text == b"t"
    raise ValueError(f"not a reply of Redis: {bytes([type_byte]) + text[:40]!r}")


# -- where to

# Host and port.
Address: TypeAlias = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Place:
    """One server. `path` is that of a socket of this machine, or ""."""

    host: str = "localhost"
    port: int = 6379
    path: str = ""
    db: int = 0
    user: str = ""
    password: str = field(default="", repr=False)
    tls: ssl.SSLContext | None = None

    @property
    def name(self) -> str:
        """For people."""
        return self.path or f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Way:
    """How to get to the server that takes writes: `server`, or the one that `guides` name. They are sentinels, which know
    `master`, or nodes of a cluster, which know who has `slot`."""

    server: Place
    guides: tuple[Place, ...] = ()
    master: str = ""
    slot: int | None = None

    @property
    def name(self) -> str:
        """For people."""
        if self.slot is not None:
            return "the cluster's master of the broker's keys"
        return f"the master {self.master!r}" if self.guides else self.server.name

    @property
    def question(self) -> tuple[str, ...]:
        """What a guide is asked."""
        if self.slot is not None:
            return ("CLUSTER", "SLOTS")
        return ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self.master)

    def directions(self, reply: Any, guide: Place) -> tuple[Place | None, list[Place]]:
        """The server that a guide names, and other guides."""
        if not isinstance(reply, list):
            return None, []
        if self.slot is None:
            masters = [replace(self.server, host=reply[0].decode(), port=int(reply[1]))] if len(reply) == 2 else []
            return next(iter(masters), None), []
        owner, nodes = owner_in(reply, self.slot, guide.host)
        places = [replace(self.server, host=host, port=port) for host, port in nodes]
        return None if owner is None else replace(self.server, host=owner[0], port=owner[1]), places


def owner_in(slots: Sequence[Any], slot: int, answered_by: str) -> tuple[Address | None, list[Address]]:
    """The master of a slot, and all nodes, in an answer to CLUSTER SLOTS. `answered_by`: the host that gave it; a node that does
    not know its own address leaves it out."""
    owner: Address | None = None
    nodes: list[Address] = []
    for first, last, *members in slots:
        addresses = [
            ((host.decode() if isinstance(host, bytes) else host) or answered_by, int(port))
            for host, port, *_ in members
        ]
        nodes += addresses
        if first <= slot <= last:
            owner = addresses[0]
    return owner, nodes


# -- one connection

OnReply = Callable[[Any], None]
CHUNK = 262_144
# A server that became a replica keeps its connections. They are left for the one that its name leads to now, or that sentinels
# name; not sooner than so many seconds after they were opened: the name may lead to a replica all the time.
STAY_SECONDS = 5.0
# What answers a command, though Redis sends it as it sends what it says unasked.
_CONFIRMATIONS = (b"psubscribe", b"punsubscribe")


class Wire:
    """Commands go out at the end of a loop turn, in order, and each reply goes to its command's callback.

    `on_open()` once it is connected (TLS included), `on_end(error)` once when it ends by itself; callbacks of commands that have
    no reply by then get a ConnectionError.
    """

    def __init__(
        self,
        loop: TurnLoop,
        place: Place,
        *,
        on_open: Callable[[], None],
        on_end: Callable[[Exception], None],
        on_push: Callable[[Push], None] = lambda push: None,
    ) -> None:
        self._loop = loop
        self._place = place
        self._on_open = on_open
        self._on_end = on_end
        self._on_push = on_push
        self._sock: Any = None
        self._address: object = None
        self._parser = Parser()
        self._waiting: deque[OnReply] = deque()
        self._pieces: list[bytes] = []
        self._unsent = memoryview(b"")
        self._is_flush_due = self._is_writing = self._is_over = False
        self._on_drained: Callable[[], None] | None = None
        self._timer = OneTimer(loop)
        self._replies = 0
        self._opened_at = 0.0

    @property
    def unanswered(self) -> int:
        """How many commands have no reply yet."""
        return len(self._waiting)

    def open(self, timeout: float) -> None:
        """Connect within so many seconds."""
        place = self._place
        self._timer.set(
            timeout, lambda: self._end(TimeoutError(errno.ETIMEDOUT, f"it did not answer within {timeout:g} s"))
        )
        if place.path:
            self._connect(socket.AF_UNIX, place.path)
        elif is_address(place.host):
            self._resolved(resolve(place.host, place.port, 0.0))
        else:
            look_up_in_thread(
                place.host,
                place.port,
                lambda answer: self._loop.call_soon_threadsafe(lambda: self._resolved(answer)),
            )

    def _resolved(self, answer: Answer) -> None:
        if self._is_over:
            return
        if isinstance(answer, OSError):
            self._end(answer)
            return
        # An address of IPv4 first: a Redis often listens on 127.0.0.1 only, and localhost is ::1 as well.
        family, _, _, _, address = min(answer, key=lambda candidate: candidate[0] != socket.AF_INET)
        self._connect(family, address)

    def _connect(self, family: int, address: Any) -> None:
        self._address = address
        sock = self._sock = socket.socket(family, socket.SOCK_STREAM)
        sock.setblocking(False)
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            sock.connect(address)
        except BlockingIOError:
            self._loop.add_writer(sock.fileno(), self._connected)
        except OSError as error:
            self._end(error)
        else:
            self._connected()

    def _connected(self) -> None:
        code = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self._end(OSError(code, os.strerror(code)))
            return
        if self._place.tls is None:
            self._opened()
            return
        self._loop.remove_writer(self._sock.fileno())
        self._sock = self._place.tls.wrap_socket(
            self._sock, server_hostname=self._place.host, do_handshake_on_connect=False
        )
        self._shake_hands()

    def _shake_hands(self) -> None:
        fd = self._sock.fileno()
        self._loop.remove_reader(fd)
        self._loop.remove_writer(fd)
        try:
            self._sock.do_handshake()
        except ssl.SSLWantReadError:
            self._loop.add_reader(fd, self._shake_hands)
        except ssl.SSLWantWriteError:
            self._loop.add_writer(fd, self._shake_hands)
        except OSError as error:
            self._end(error)
        else:
            self._opened()

    def _opened(self) -> None:
        self._timer.cancel()
        self._opened_at = time.monotonic()
        self._loop.remove_writer(self._sock.fileno())
        self._loop.add_reader(self._sock.fileno(), self._read)
        self._on_open()

    # -- commands and replies

    def send(self, on_reply: OnReply, *arguments: Argument) -> None:
        """A command; only while it is open."""
        if self._is_over:
            return
        self._waiting.append(on_reply)
        self._pieces.append(command(*arguments))
        if not self._is_flush_due:
            self._is_flush_due = True
            self._loop.call_last(self._flush)

    def _flush(self) -> None:
        self._is_flush_due = False
        if self._is_over:
            return
        if not self._unsent and self._pieces:
            self._unsent, self._pieces = memoryview(b"".join(self._pieces)), []
        try:
            while self._unsent:
                self._unsent = self._unsent[self._sock.send(self._unsent) :]
                if not self._unsent and self._pieces:
                    self._unsent, self._pieces = memoryview(b"".join(self._pieces)), []
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            self._is_writing = True
            self._loop.add_writer(self._sock.fileno(), self._flush)
        except OSError as error:
            self._end(error)
        else:
            if self._is_writing:
                self._is_writing = False
                self._loop.remove_writer(self._sock.fileno())

    def _read(self) -> None:
        try:
            while not self._is_over:
                chunk = self._sock.recv(CHUNK)
                if not chunk:
                    self._end(ConnectionResetError(errno.ECONNRESET, "Redis closed the connection"))
                    return
                for reply in self._parser.feed(chunk):
                    self._take(reply)
                    if self._is_over:
                        return
                if len(chunk) < CHUNK and not (self._place.tls is not None and self._sock.pending()):
                    break
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except (OSError, ValueError) as error:
            self._end(error)
        if self._on_drained is not None and not self._waiting:
            self._close_drained()

    def _take(self, reply: Any) -> None:
        self._replies += 1
        code = reply.code if reply.__class__ is ReplyError else ""
        if isinstance(reply, Push) and reply.fields[0] not in _CONFIRMATIONS:
            self._on_push(reply)
        elif code == "MOVED":
            self._end(ConnectionError("the keys are on another master now"))
        elif code == "READONLY" and time.monotonic() - self._opened_at > STAY_SECONDS:
            self._end(ConnectionError("it takes no writes any more, and another server may be the master now"))
        elif self._waiting:
            self._waiting.popleft()(reply)

    def is_silent(self) -> bool:
        """Whether commands wait for a reply, and none has come since this was asked last."""
        replies, self._replies = self._replies, 0
        return bool(self._waiting) and not replies

    # -- the end

    def give_up(self, error: Exception) -> None:
        """Treat the connection as lost."""
        self._end(error)

    def drain_no_longer(self) -> None:
        """Do not wait for replies any more."""
        self._close_drained()

    def drain(self, on_drained: Callable[[], None]) -> None:
        """Close once all commands have their replies; `on_drained` follows in any case."""
        self._on_drained = on_drained
        if self._is_flush_due:
            self._flush()  # this turn may be the loop's last
        if self._is_over or not self._waiting:
            self._loop.call_soon(self._close_drained)

    def _close_drained(self) -> None:
        on_drained, self._on_drained = self._on_drained, None
        if on_drained is not None:
            self.close()
            on_drained()

    def close(self) -> None:
        """Close it now; commands without a reply are forgotten."""
        if self._is_over:
            return
        self._is_over = True
        self._timer.cancel()
        self._waiting.clear()
        if self._sock is not None:
            fd = self._sock.fileno()
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
            self._sock.close()

    def _end(self, error: Exception) -> None:
        if self._is_over:
            return
        unanswered = list(self._waiting)
        if not self._replies:
            avoid(self._address)
        self.close()
        lost = ConnectionError(str(error))
        for on_reply in unanswered:
            on_reply(lost)
        if self._on_drained is not None:
            self._close_drained()
        else:
            self._on_end(error)
