"""pika's connection, with fewer system calls: what a burst says is one write, and that write is made at once.

pika hands each frame to the socket with a call of its own, and only after it has asked the poller whether the socket takes
writes: four system calls for each. A socket nearly always takes them.
"""

from __future__ import annotations

from typing import Any

from pika.adapters.select_connection import SelectConnection
from pika.adapters.utils.io_services_utils import _AsyncPlaintextTransport

# Bytes gathered before they are handed to the socket.
BURST = 65536


class Wire(SelectConnection):  # type: ignore[misc]  # pika is untyped here
    """Writes go out when they are made, unless they are gathered."""

    _gathered: bytearray | None = None

    def gather(self) -> None:
        """Keep what is written from now on, until `flush`."""
        if self._gathered is None:
            self._gathered = bytearray()

    def flush(self) -> None:
        """Write what was kept, and write at once again."""
        gathered, self._gathered = self._gathered, None
        if gathered and not self.is_closed:
            self._write(bytes(gathered))

    def _adapter_emit_data(self, data: bytes) -> None:
        gathered = self._gathered
        if gathered is None:
            self._write(data)
            return
        gathered += data
        if len(gathered) >= BURST:
            self._gathered = bytearray()
            self._write(bytes(gathered))

    def _write(self, data: bytes) -> None:
        transport: Any = self._transport
        if _takes_writes(transport):
            try:
                sent = transport._sock.send(data)
            except OSError:
                sent = 0  # full, or broken: then pika finds out, and closes the connection in its way
            if sent == len(data):
                return
            data = data[sent:]
        super()._adapter_emit_data(data)


def _takes_writes(transport: Any) -> bool:
    """Whether nothing waits to be written before us. A TLS socket may want to read first: that is left to pika."""
    return (
        type(transport) is _AsyncPlaintextTransport
        and transport._state == transport._STATE_ACTIVE
        and not transport._tx_buffered_byte_count
    )
