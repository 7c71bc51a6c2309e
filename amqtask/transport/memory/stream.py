"""MemoryStream: bytes to and from a broker in this process, for a connection that the calling thread drives."""

from __future__ import annotations

import threading

from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.peer import Peer


class MemoryStream:
    """See amqtask.transport.stream.ByteStream."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._news = threading.Event()
        self._peer: Peer | None = None

    def open(self, deadline: float) -> None:
        """Connect. Raises: OSError when the broker is stopped."""
        self._peer = Peer(self._broker, self._news.set)

    def read(self) -> bytes | None:
        """The bytes that have come; None when there are none now, b"" at the end of the stream."""
        peer = self._peer
        assert peer is not None
        self._news.clear()
        is_open = peer.is_open
        return peer.take() or (None if is_open else b"")

    def write(self, data: memoryview) -> int:
        """Write without waiting; how many bytes were taken."""
        assert self._peer is not None
        self._peer.receive(bytes(data))
        return len(data)

    @property
    def keeps_bytes(self) -> bool:
        """Never."""
        return False

    def wait(self, seconds: float, *, writable: bool = False) -> bool:
        """Wait until there are bytes to read (or the end); False after `seconds`."""
        return writable or self._news.wait(seconds)

    def close(self) -> None:
        """End the connection; may be called twice."""
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.hang_up()
