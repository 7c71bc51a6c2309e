"""`memory://`: the doors to a MemoryBroker of this application in this process, and the connections that lead to it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from pika.exceptions import StreamLostError

from amqtask.exceptions import PublishError
from amqtask.protocol.message import Message
from amqtask.transport.amqp import AmqpBroker
from amqtask.transport.contract import Publisher
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.peer import Peer
from amqtask.transport.url import BrokerAddress
from amqtask.transport.wire import Wire, keep_quiet

if TYPE_CHECKING:
    import pika

    from amqtask.ground.loop import Timer, TurnLoop
    from amqtask.transport.contract import AsyncPublisher, BrokerOptions, OnWarning


MEMORY_URL = "memory://"


class LocalBroker(AmqpBroker):
    """See amqtask.transport.broker.Broker. The doors are AMQP's; they lead to an address in this process."""

    transport = driver = "memory"
    is_shared = False

    def __init__(self, options: BrokerOptions, kept: dict[str, object]) -> None:
        super().__init__(options, kept)
        # Settings change; what is in the queues stays.
        self._memory = cast("MemoryBroker", kept.get("memory") or kept.setdefault("memory", MemoryBroker()))

    @property
    def memory(self) -> MemoryBroker:
        """The broker itself."""
        return self._memory

    def _parsed(self, urls: str | Sequence[str] | None) -> tuple[BrokerAddress, ...]:
        return (MemoryAddress(broker=self._memory),)

    def note(self, name: str) -> MemoryNote:
        """In this process."""
        return MemoryNote(self._memory.notes, name)

    def async_publisher(self, *, name: str, on_warning: OnWarning) -> AsyncPublisher:
        """In the event loop's thread."""
        return MemoryAsyncPublisher(self.publisher(name=name, on_warning=on_warning))


@dataclass(frozen=True, slots=True)
class MemoryAddress(BrokerAddress):
    """A host that is this process; any login is taken."""

    host: str = "memory"
    port: int = 0
    # Nothing can be silent here.
    heartbeat: int | None = 0
    broker: MemoryBroker = field(default_factory=MemoryBroker, repr=False)

    @property
    def safe_url(self) -> str:
        """`memory://`."""
        return MEMORY_URL

    url = safe_url

    def stream(self) -> MemoryStream:
        """A stream of bytes to the broker, not connected."""
        return MemoryStream(self.broker)

    def wire(
        self,
        loop: TurnLoop,
        parameters: pika.ConnectionParameters,
        on_open: Callable[[Wire], None],
        on_failed: Callable[[Wire, Exception], None],
        on_closed: Callable[[Wire, Exception], None],
    ) -> Wire:
        """A connection on a loop, that begins to connect."""
        return MemoryWire(self.broker, loop, parameters, on_open, on_failed, on_closed)


class MemoryStream:
    """See amqtask.transport.stream.ByteStream."""

    def __init__(self, broker: MemoryBroker) -> None:
        self._broker = broker
        self._news = threading.Event()
        self._peer: Peer | None = None

    def open(self, deadline: float) -> float:
        """Connect. Raises: OSError when the broker is stopped."""
        self._peer = Peer(self._broker, self._news.set)
        return deadline

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


class MemoryAsyncPublisher:
    """See amqtask.transport.contract.AsyncPublisher. Publishes in a thread: no alarm or full queue holds up the event loop."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def connect(self, *, timeout: float | None = None) -> None:
        """The publisher connects with the first message."""

    async def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish; raises the named error of what went wrong."""
        await asyncio.to_thread(self._publisher.publish, message, timeout=timeout)

    async def publish_many(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[PublishError | None]:
        """One entry per message, None for a stored one."""
        return await asyncio.to_thread(self._publisher.publish_many, messages, timeout=timeout)

    async def close(self) -> None:
        """Close idle connections; the publisher opens new ones when it is used again."""
        self._publisher.close()


class MemoryNote:
    """See amqtask.transport.contract.Note."""

    def __init__(self, notes: MutableMapping[str, str], name: str) -> None:
        self._notes = notes
        self._name = name

    def read(self) -> str | None:
        """See the contract."""
        return self._notes.get(self._name)

    def write(self, text: str) -> None:
        """See the contract."""
        self._notes[self._name] = text
