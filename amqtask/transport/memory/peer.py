"""Peer: the broker's end of one connection. AMQP 0-9-1 frames come in as bytes, and frames go out as bytes; no socket between.

So what a client does over a connection to RabbitMQ it does here, too, with the same code: handshake, channels, confirms, acks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pika import frame, spec

from amqtask.transport.content import FRAME_MAX
from amqtask.transport.fields import install
from amqtask.transport.frames import GREETING, Frames, Unreadable, decode_method
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.channel import PeerChannel

if TYPE_CHECKING:
    from amqtask.ground.loop import TurnLoop

_START = spec.Connection.Start(
    version_major=0,
    version_minor=9,
    server_properties={
        "product": "amqtask in-memory broker",
        "version": "4.3",
        "capabilities": {
            "publisher_confirms": True,
            "basic.nack": True,
            "consumer_cancel_notify": True,
            "connection.blocked": True,
            "exchange_exchange_bindings": True,
            "authentication_failure_close": True,
            "per_consumer_qos": True,
        },
    },
    mechanisms="PLAIN EXTERNAL",
    locales="en_US",
)
_MOST_CHANNELS = 2047


class Peer:
    """`wake` is called, in any thread, when there is something to `take`. `loop` is the client's, which lets messages expire.

    Raises: ConnectionRefusedError when the broker is stopped.
    """

    def __init__(self, broker: MemoryBroker, wake: Callable[[], None], loop: TurnLoop | None = None) -> None:
        install()
        self.loop = loop
        self.is_open = True
        self._broker = broker
        self._wake = wake
        self._frames = Frames()
        self._is_greeted = False
        # Frames that wait for the end of an alarm.
        self._waiting: deque[tuple[int, int, bytes]] = deque()
        self._is_blocked = False
        self._outgoing = bytearray()
        self._channels: dict[int, PeerChannel] = {}
        broker.connected(self)

    # -- the client's calls

    def receive(self, data: bytes) -> None:
        """The client has sent these bytes; they are lost when the connection has ended."""
        with self._broker.lock:
            if not self.is_open:
                return
            if not self._is_greeted:
                self._is_greeted = True
                data = data[len(GREETING) :]
                self._send(_START)
            try:
                self._waiting += self._frames.feed(data)
            except Unreadable as error:
                self._close(501, f"FRAME_ERROR - {error}")
            self.go_on()

    def take(self) -> bytes:
        """The bytes for the client; none: there are none now, or (`is_open` is False) the connection has ended."""
        with self._broker.lock:
            data, self._outgoing = bytes(self._outgoing), bytearray()
            return data

    def hang_up(self) -> None:
        """The client closes its end of the stream."""
        with self._broker.lock:
            self.cut()
            self._outgoing.clear()

    # -- the broker's calls, under its lock

    def go_on(self) -> None:
        """Handle the frames that have come, as far as no alarm keeps publishes back."""
        if self._is_blocked and self._broker.blocked_reason is None:
            self._is_blocked = False
            self._send(spec.Connection.Unblocked())
        while self._waiting and self.is_open:
            frame_type, number, payload = self._waiting[0]
            method = decode_method(payload) if frame_type == spec.FRAME_METHOD else None
            if isinstance(method, spec.Basic.Publish) and self._broker.blocked_reason is not None:
                if not self._is_blocked:
                    self._is_blocked = True
                    self._send(spec.Connection.Blocked(self._broker.blocked_reason))
                return
            self._waiting.popleft()
            if method is not None:
                self._hear(number, method)
            elif number in self._channels and frame_type == spec.FRAME_HEADER:
                self._channels[number].add_header(payload)
            elif number in self._channels and frame_type == spec.FRAME_BODY:
                self._channels[number].add_body(payload)

    def cut(self) -> None:
        """The connection ends; unanswered deliveries go back to their queues."""
        if self.is_open:
            self.is_open = False
            for channel in self._channels.values():
                channel.close()
            self._channels.clear()
            self._broker.disconnected(self)
            self._wake()

    # -- methods

    def _hear(self, number: int, method: Any) -> None:
        if number == 0:
            self._hear_about_connection(method)
        elif isinstance(method, spec.Channel.Open):
            self._channels[number] = PeerChannel(self._broker, number, self, self._write)
            self._send(spec.Channel.OpenOk(), number)
        elif number not in self._channels:
            self._close(504, "CHANNEL_ERROR - expected 'channel.open'")
        elif isinstance(method, spec.Channel.Close):
            self._channels.pop(number).close()
            self._send(spec.Channel.CloseOk(), number)
        elif isinstance(method, spec.Channel.CloseOk):
            del self._channels[number]
        else:
            self._channels[number].hear(method)

    def _hear_about_connection(self, method: Any) -> None:
        if isinstance(method, spec.Connection.StartOk):
            self._send(spec.Connection.Tune(_MOST_CHANNELS, FRAME_MAX, 0))
        elif isinstance(method, spec.Connection.Open):
            self._send(spec.Connection.OpenOk())
        elif isinstance(method, spec.Connection.Close):
            self._send(spec.Connection.CloseOk())
            self.cut()

    def _close(self, code: int, text: str) -> None:
        self._send(spec.Connection.Close(code, text, 0, 0))
        self.cut()

    def _send(self, method: Any, number: int = 0) -> None:
        self._write(frame.Method(number, method).marshal())

    def _write(self, data: bytes) -> None:
        self._outgoing += data
        self._wake()
