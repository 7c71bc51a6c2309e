"""MemoryWire: pika's connection on a loop, to a broker in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pika.exceptions import StreamLostError

from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.peer import Peer
from amqtask.transport.pika_log import keep_quiet
from amqtask.transport.wire import Wire

if TYPE_CHECKING:
    from amqtask.ground.loop import Timer, TurnLoop


class MemoryWire(Wire):
    """Bytes go to the broker at once, and come from it with one of the loop's next turns."""

    def __init__(self, broker: MemoryBroker, loop: TurnLoop, *arguments: object) -> None:
        """`arguments`: pika's parameters, and its callbacks for an open, a failed and a closed connection."""
        keep_quiet()
        self.turns = loop
        self._broker = broker
        self._peer: Peer | None = None
        self._is_ended = False
        self._is_due = False
        super().__init__(*arguments)

    # -- what pika asks of the stream under it

    def _adapter_connect_stream(self) -> None:
        self.turns.call_soon(self._connect)

    def _connect(self) -> None:
        if self._is_ended:
            return
        try:
            self._peer = Peer(self._broker, self._wake, self.turns)
        except ConnectionRefusedError as error:
            self._on_stream_terminated(error)
        else:
            self._on_stream_connected()

    def _adapter_disconnect_stream(self) -> None:
        self._hang_up()
        self.turns.call_soon(lambda: self._on_stream_terminated(None))

    def _hang_up(self) -> None:
        self._is_ended = True
        peer, self._peer = self._peer, None
        if peer is not None:
            peer.hang_up()

    def _write(self, data: bytes) -> None:
        if self._peer is not None:
            self._peer.receive(data)

    def _wake(self) -> None:
        if not self._is_due:
            self._is_due = True
            self.turns.call_soon_threadsafe(self._read)

    def _read(self) -> None:
        self._is_due = False
        peer = self._peer
        if peer is None:
            return
        is_open = peer.is_open
        data = peer.take()
        if data:
            self._on_data_available(data)
        if not is_open and self._peer is not None:
            self._peer = None
            self._on_stream_terminated(StreamLostError("the broker ended the connection"))

    def _adapter_call_later(self, delay: float, callback: Callable[[], None]) -> Timer:
        return self.turns.call_later(delay, callback)

    def _adapter_remove_timeout(self, timeout_id: Timer) -> None:
        timeout_id.cancel()

    def _adapter_add_callback_threadsafe(self, callback: Callable[[], None]) -> None:
        self.turns.call_soon_threadsafe(callback)
