"""MemoryServer: a MemoryBroker for other processes. AMQP 0-9-1 over a socket, so that every client library speaks to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from amqtask.ground.accepting import Acceptor
from amqtask.transport.loop import PikaLoop
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.peer import Peer
from amqtask.transport.stream import CHUNK, GREETING

if TYPE_CHECKING:
    from typing_extensions import Self


class MemoryServer:
    """Listens from the beginning; serves between `start` and `stop`, in a thread. Port 0 is a free one; any login and virtual
    host is taken, and all virtual hosts are one. Raises: OSError for an address that cannot be listened on."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.broker = MemoryBroker()
        listener = socket.create_server((host, port), backlog=128)
        self.host, self.port = host, int(listener.getsockname()[1])
        self._loop = PikaLoop()
        self._acceptor = Acceptor(self._loop, listener, self._accepted)
        self._ends: set[_End] = set()
        self._thread = threading.Thread(target=self._loop.run, name="amqtask broker", daemon=True)

    @property
    def url(self) -> str:
        """For clients of this machine."""
        return f"amqp://guest:guest@{self.host}:{self.port}//"

    def start(self) -> Self:
        """Begin to serve."""
        self._acceptor.start()
        self._thread.start()
        return self

    def stop(self) -> None:
        """End all connections; what is in the queues stays in `broker`."""
        self._loop.call_soon_threadsafe(self._end)
        self._thread.join()
        self._loop.close()

    def _accepted(self, connected: socket.socket) -> None:
        self._ends.add(_End(connected, self.broker, self._loop, self._ends.discard))

    def _end(self) -> None:
        self._acceptor.stop()
        for end in list(self._ends):
            end.close()
        self._loop.stop()


class _End:
    """The server's end of one connection: bytes between a socket and the broker's Peer."""

    def __init__(
        self, connected: socket.socket, broker: MemoryBroker, loop: PikaLoop, closed: Callable[[_End], None]
    ) -> None:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket, self._loop, self._closed = connected, loop, closed
        self._greeting = b""
        self._unsent = b""
        self._is_due = self._is_closed = False
        self._peer = Peer(broker, self._wake, loop)
        loop.add_reader(connected.fileno(), self._read)

    def close(self) -> None:
        """The connection ends; may be called twice."""
        if not self._is_closed:
            self._is_closed = True
            self._peer.hang_up()
            self._loop.remove_reader(self._socket.fileno())
            self._loop.remove_writer(self._socket.fileno())
            self._socket.close()
            self._closed(self)

    def _read(self) -> None:
        try:
            data = self._socket.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
        elif len(self._greeting) == len(GREETING):
            self._peer.receive(data)
        else:
            self._greet(self._greeting + data)

    def _greet(self, data: bytes) -> None:
        """A client begins with the protocol's name and version, and is told ours when it has another (AMQP 0-9-1, 4.2.2)."""
        self._greeting = data[: len(GREETING)]
        if not GREETING.startswith(self._greeting):
            self._unsent = GREETING
            self._write()
            self.close()
        elif len(data) >= len(GREETING):
            self._peer.receive(data)

    def _wake(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon_threadsafe(self._write)

    def _write(self) -> None:
        self._is_due = False
        if self._is_closed:
            return
        self._unsent += self._peer.take()
        try:
            while self._unsent:
                self._unsent = self._unsent[self._socket.send(self._unsent) :]
        except BlockingIOError:
            self._loop.add_writer(self._socket.fileno(), self._write)
            return
        except OSError:
            self.close()
            return
        self._loop.remove_writer(self._socket.fileno())
        if not self._peer.is_open:
            self.close()
