"""pika's connection on a loop, with less work for each message; what we use of its channels; and its log records, dropped.

Writing: pika hands each frame to the socket with a call of its own, and only after it has asked the poller whether the
socket takes writes: four system calls for each. A socket nearly always takes them, so the frames of a burst are one write, made
at once. A frame that is larger than the broker takes fails before any of its message is written.

Reading: a delivery is three frames, which pika takes one by one through eleven calls each. Where all three have come (they
nearly always have), they are decoded together and handed to pika's channel; all other frames are left to pika. The usual
properties are read here, all others by pika: this is most of a consumer's time per message. The layouts are those of AMQP 0-9-1,
sections 2.3.5 and 4.2 (4.2.6.1: properties), and Basic.Deliver.

We report the errors of our own connections ourselves, once, so pika's log records on them are dropped. A program that also uses
pika by itself still sees those of its own connections. With pika's logger at level DEBUG all records are kept.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import socket
import struct
import sys
import termios
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol

from pika import frame, spec
from pika.adapters.select_connection import SelectConnection
from pika.adapters.utils.io_services_utils import _AsyncPlaintextTransport
from pika.adapters.utils.nbio_interface import AbstractIOReference
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.connection import Connection

from amqtask.ground.loop import TurnLoop
from amqtask.protocol.message import Properties
from amqtask.transport.content import check_frame, decode_short_string, decode_table
from amqtask.transport.loop import PikaLoop
from amqtask.transport.resolving import Answer, avoid, look_up_in_thread

if TYPE_CHECKING:
    from amqtask.protocol.message import PropertiesLike


_flags = struct.Struct(">H").unpack_from
_tag = struct.Struct(">Q").unpack_from
_TAG_SIZE = 8
_FLAGS = spec.BasicProperties
# The properties of task messages, and those that only some have: of callers that want a result, of our publishers.
_USUAL = (
    _FLAGS.FLAG_CONTENT_TYPE
    | _FLAGS.FLAG_CONTENT_ENCODING
    | _FLAGS.FLAG_HEADERS
    | _FLAGS.FLAG_DELIVERY_MODE
    | _FLAGS.FLAG_PRIORITY
    | _FLAGS.FLAG_CORRELATION_ID
)
_REPLY_TO, _MESSAGE_ID = _FLAGS.FLAG_REPLY_TO, _FLAGS.FLAG_MESSAGE_ID
_MANDATORY = ~(_REPLY_TO | _MESSAGE_ID)
# Loggers with pika's error records; a logger's filter does not see the records of its children.
_LOGGERS = (
    "pika.adapters.base_connection",
    "pika.adapters.blocking_connection",
    "pika.adapters.select_connection",
    "pika.adapters.utils.connection_workflow",
    "pika.adapters.utils.io_services_utils",
    "pika.adapters.utils.selector_ioloop_adapter",
    "pika.callback",
    "pika.channel",
    "pika.connection",
    "pika.heartbeat",
)
# Modules that stand on the stack between pika's code and its caller.
_BETWEEN = ("pika", "logging", "functools", __name__)
Callback = Callable[..., object]
# Bytes gathered before they are handed to the socket, and read from it at once (pika reads 4096: seven task messages).
BURST, MOST_READ = 65536, 65536
# A frame is its type, channel and size, the payload, and a mark for its end. The first frame of a delivery is Basic.Deliver,
# the second begins with class, weight (0) and the body's size.
_FRAMING = 8
_method_head = struct.Struct(">BHLI").unpack_from
_header_head = struct.Struct(">BHLHHQ").unpack_from
_body_head = struct.Struct(">BHL").unpack_from
_method_size, _header_size, _body_size = (struct.calcsize(form) for form in (">BHLI", ">BHLHHQ", ">BHL"))
_ENDS = (spec.FRAME_END,) * 3


# -- reading deliveries


def read_deliver(arguments: bytes) -> Any:
    """pika's Basic.Deliver. All but the delivery tag is the same for many messages."""
    tag_begin = 1 + arguments[0]
    (tag,) = _tag(arguments, tag_begin)
    tag_end = tag_begin + _TAG_SIZE
    consumer_tag, redelivered, exchange, routing_key = _without_tag(arguments[:tag_begin] + arguments[tag_end:])
    return spec.Basic.Deliver(consumer_tag, tag, redelivered, exchange, routing_key)


@lru_cache(maxsize=256)
def _without_tag(arguments: bytes) -> tuple[str, bool, str, str]:
    consumer_tag, offset = decode_short_string(arguments, 0)
    redelivered = bool(arguments[offset] & 1)
    exchange, offset = decode_short_string(arguments, offset + 1)
    routing_key, _ = decode_short_string(arguments, offset)
    return consumer_tag, redelivered, exchange, routing_key


def read_properties(encoded: bytes, offset: int) -> PropertiesLike:
    """The properties that begin at `offset`."""
    (flags,) = _flags(encoded, offset)
    if flags & _MANDATORY == _USUAL:
        try:
            return _read_usual(encoded, offset + 2, flags)
        except UnicodeDecodeError:
            pass
    properties: PropertiesLike = spec.BasicProperties().decode(encoded, offset)
    return properties


def _read_usual(encoded: bytes, end: int, flags: int) -> Properties:
    # A short string is its length in one byte, and its bytes.
    begin = end + 1
    end = begin + encoded[end]
    content_type = encoded[begin:end].decode()
    begin = end + 1
    end = begin + encoded[end]
    content_encoding = encoded[begin:end].decode()
    headers, end = decode_table(encoded, end)
    delivery_mode, priority = encoded[end], encoded[end + 1]
    begin = end + 3
    end = begin + encoded[end + 2]
    correlation_id = encoded[begin:end].decode()
    reply_to = message_id = None
    if flags & _REPLY_TO:
        begin = end + 1
        end = begin + encoded[end]
        reply_to = encoded[begin:end].decode()
    if flags & _MESSAGE_ID:
        begin = end + 1
        message_id = encoded[begin : begin + encoded[end]].decode()
    return Properties(
        content_type, content_encoding, headers, delivery_mode, priority, correlation_id, reply_to, None, message_id
    )


# -- log records


class _NotOurs(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        """Whether pika was called by other code than ours."""
        if logging.getLogger("pika").level == logging.DEBUG:
            return True
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _is_between(frame):
            frame = frame.f_back
        return frame is None or not str(frame.f_globals.get("__name__")).startswith("amqtask.")


def _is_between(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    return name in _BETWEEN or name.startswith("pika.")


_not_ours = _NotOurs()


def keep_quiet() -> None:
    """Install the filter; may be called often."""
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_not_ours)


# -- what we use of pika's channels and of the methods that they hand out; pika has no types of its own


class PikaMethod(Protocol):
    """The fields of AMQP's methods that are read here; each method has some of them."""

    delivery_tag: int
    multiple: bool
    redelivered: bool
    exchange: str
    routing_key: str
    consumer_tag: str
    message_count: int
    consumer_count: int
    reason: str


class PikaFrame(Protocol):
    """A frame that a callback gets."""

    method: PikaMethod


class PikaChannel(Protocol):
    """A channel that calls back, on a loop."""

    is_open: bool
    is_closed: bool

    def close(self) -> object: ...

    def flow(self, active: bool, callback: Callback | None = None) -> object: ...

    def add_on_close_callback(self, callback: Callback) -> object: ...

    def add_on_cancel_callback(self, callback: Callback) -> object: ...

    def add_on_return_callback(self, callback: Callback) -> object: ...

    def add_callback(self, callback: Callback, replies: Sequence[type], one_shot: bool = True) -> object: ...

    def confirm_delivery(self, ack_nack_callback: Callback, callback: Callback | None = None) -> object: ...

    def basic_publish(
        self,
        exchange: str,
        routing_key: str,
        body: bytes,
        properties: PropertiesLike | None = None,
        mandatory: bool = False,
    ) -> object: ...

    def basic_get(self, queue: str, callback: Callback) -> object: ...

    def basic_nack(self, delivery_tag: int = 0, multiple: bool = False, requeue: bool = True) -> object: ...

    def queue_declare(self, queue: str, passive: bool = False, *, callback: Callback | None = None) -> object: ...

    def queue_delete(self, queue: str, *, callback: Callback | None = None) -> object: ...


class _Lookup(AbstractIOReference):  # type: ignore[misc]  # pika is untyped here
    """A host name that is being looked up."""

    def __init__(self, loop: Any, host: str, port: int, on_done: Callable[[Answer], None]) -> None:
        self._on_done: Callable[[Answer], None] | None = on_done
        look_up_in_thread(host, port, lambda answer: loop.add_callback_threadsafe(lambda: self._done(answer)))

    def _done(self, answer: Answer) -> None:
        on_done, self._on_done = self._on_done, None
        if on_done is not None:
            on_done(answer)

    def cancel(self) -> bool:
        """Drop the look-up; whether it was under way."""
        was_wanted, self._on_done = self._on_done is not None, None
        return was_wanted


class _Services(SelectorIOServicesAdapter):  # type: ignore[misc]  # pika is untyped here
    """pika's threads that look up host names keep a process from ending for as long as the resolver hangs; ours do not.

    `tried`: the address that was tried last."""

    tried: object = None

    def __init__(self, loop: PikaLoop) -> None:
        super().__init__(loop.pika)
        self.loop = loop

    def getaddrinfo(
        self, host: str, port: int, on_done: Callable[[Answer], None], *_: int, **__: int
    ) -> AbstractIOReference:
        return _Lookup(self.get_native_ioloop(), host, port, on_done)

    def connect_socket(self, sock: socket.socket, resolved_addr: object, on_done: Callback) -> AbstractIOReference:
        self.tried = resolved_addr
        self.loop.own(sock)
        return super().connect_socket(sock, resolved_addr, on_done)


class Wire(Connection):  # type: ignore[misc]  # pika is untyped here
    """pika's connection on a loop, without the way to the broker. Frames of one loop turn are written at its end, in one go."""

    # The loop, set by the constructors.
    turns: TurnLoop
    _gathered: bytearray | None = None
    # How many bytes of the buffer's front have been handed on.
    _taken = 0

    @property
    def server_version(self) -> tuple[int, ...]:
        """The first two numbers of RabbitMQ's version; empty for other brokers."""
        properties = self.server_properties or {}
        numbers = str(properties.get("version", "")).split(".")[:2]
        is_known = properties.get("product") == "RabbitMQ" and all(map(str.isdigit, numbers))
        return tuple(map(int, numbers)) if is_known else ()

    # -- what pika keeps to itself

    @property
    def heard(self) -> tuple[int, int]:
        """Bytes of the frames that came, and bytes of the one that is coming."""
        return self.bytes_received, len(self._frame_buffer)

    @property
    def unsent(self) -> int:
        """How many bytes the other end has not acknowledged yet; of an open connection."""
        return 0

    def give_up(self, error: Exception) -> None:
        """Drop the connection without a close: a dead connection cannot be closed."""
        self.avoid()
        self._terminate_stream(error)

    def avoid(self) -> None:
        """Nothing answers where this connection leads to: let the next one of a name that has several addresses go elsewhere."""

    def end(self) -> None:
        """Close the connection, also one in the handshake, which pika then treats as lost. (pika 1.4.4's own method to give up
        an attempt raises an AssertionError out of the loop; an attempt that has no socket yet ends by itself.)"""
        if self.is_open:
            self.close()
        elif not (self.is_closing or self.is_closed):
            self._hang_up()

    def _hang_up(self) -> None:
        """End the attempt to connect, if it has come as far as a stream of bytes."""
        raise NotImplementedError

    # -- writing

    def _write(self, data: bytes) -> None:
        """Send bytes to the broker."""
        raise NotImplementedError

    def _flush(self) -> None:
        gathered, self._gathered = self._gathered, None
        if gathered and not self.is_closed:
            self._write(bytes(gathered))

    def _output_marshaled_frames(self, marshaled_frames: list[bytes]) -> None:
        frame_max = self.params.frame_max
        for marshaled in marshaled_frames:
            check_frame(len(marshaled), frame_max)
        super()._output_marshaled_frames(marshaled_frames)

    def _adapter_emit_data(self, data: bytes) -> None:
        gathered = self._gathered
        if gathered is None:
            gathered = self._gathered = bytearray()
            self.turns.call_last(self._flush)
        gathered += data
        if len(gathered) >= BURST:
            self._gathered = bytearray()
            self._write(bytes(gathered))

    # -- reading

    def _on_data_available(self, data_in: bytes) -> None:
        self._frame_buffer += data_in
        while self._frame_buffer:
            self._take_deliveries()
            size, pika_frame = self._read_frame()
            if not pika_frame:
                return
            self._trim_frame_buffer(size)
            self._process_frame(pika_frame)

    def _take_deliveries(self) -> None:
        """Take complete deliveries from the buffer's front, up to what is unusual. Cut off once: each cut copies all the rest."""
        buffer: bytes = self._frame_buffer
        self._taken = 0
        try:
            while self._take_delivery(buffer, self._taken):
                pass
        finally:
            if self._taken:
                self._trim_frame_buffer(self._taken)

    def _take_delivery(self, buffer: bytes, begin: int) -> bool:
        """Take the complete delivery that begins there; False where there is none, or it is unusual."""
        try:
            frame_type, number, size, method_id = _method_head(buffer, begin)
            if frame_type != spec.FRAME_METHOD or method_id != spec.Basic.Deliver.INDEX:
                return False
            header = begin + size + _FRAMING
            header_type, header_number, size, _, _, body_size = _header_head(buffer, header)
            body = header + size + _FRAMING
            body_type, body_number, size = _body_head(buffer, body)
            end = body + size + _FRAMING
            marks = buffer[header - 1], buffer[body - 1], buffer[end - 1]
        except (struct.error, IndexError):
            return False  # not all of it has come yet
        if (header_type, body_type, size) != (spec.FRAME_HEADER, spec.FRAME_BODY, body_size):
            return False
        channel = self._channels.get(number)
        is_odd = channel is None or channel._content_assembler._method_frame is not None
        if is_odd or not number == header_number == body_number or marks != _ENDS:
            return False
        method = read_deliver(buffer[begin + _method_size : header - 1])
        properties = read_properties(buffer, header + _header_size)
        content = buffer[body + _body_size : end - 1]
        self._taken = end
        self.frames_received += len(marks)
        on_message = channel._consumers.get(method.consumer_tag)
        if on_message is None or method.consumer_tag in channel._cancelled:
            channel._on_deliver(frame.Method(number, method), frame.Header(number, body_size, properties), content)
        else:
            on_message(channel, method, properties, content)
        return True


class SocketWire(Wire, SelectConnection):  # type: ignore[misc]  # pika is untyped here
    """A connection over TCP or TLS, on a PikaLoop."""

    def __init__(self, loop: TurnLoop, *arguments: object) -> None:
        """`arguments`: pika's parameters, and its callbacks for an open, a failed and a closed connection."""
        if not isinstance(loop, PikaLoop):
            raise TypeError(f"a connection over a socket needs a PikaLoop, not {loop!r}")
        keep_quiet()
        self.turns = loop
        self._services = _Services(loop)
        super().__init__(*arguments, custom_ioloop=self._services)

    def _proto_connection_made(self, transport: Any) -> None:
        transport._MAX_RECV_BYTES = MOST_READ
        super()._proto_connection_made(transport)
        if self.sock is not None:  # with TLS it is another one than that which connected
            self._services.loop.own(self.sock)

    @property
    def sock(self) -> socket.socket | None:
        """None until there is one, and once it is closed."""
        # A transport that pika has not finished yet has none.
        return getattr(self._transport, "_sock", None)

    @property
    def unsent(self) -> int:
        """How many bytes the other end has not acknowledged yet; of an open connection."""
        sock = self.sock
        waiting = int(self._get_write_buffer_size())
        if sock is None:
            return waiting
        try:
            raw = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
        except OSError:
            return waiting
        return waiting + int(struct.unpack("i", raw)[0])

    def avoid(self) -> None:
        """See Wire."""
        avoid(self._services.tried)

    def _hang_up(self) -> None:
        sock = self.sock
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _write(self, data: bytes) -> None:
        transport: Any = self._transport
        if _takes_writes(transport):
            try:
                sent = transport._sock.send(data)
            except OSError:
                sent = 0  # full; or broken, which pika notices and handles
            if sent == len(data):
                return
            data = data[sent:]
        SelectConnection._adapter_emit_data(self, data)


def take_until_cancelled(channel: Any, tag: str) -> None:
    """Have deliveries taken that are under way to a consumer which is being cancelled, until the broker confirms the cancel.

    pika would reject them, and each reject counts towards the delivery limit of a quorum queue.
    """
    channel._cancelled.discard(tag)


def close_with_consumers(channel: Any) -> None:
    """Close the channel, unless that is under way. pika would cancel its consumers first, and a broker may take long for each."""
    if not (channel.is_closed or channel.is_closing):
        channel._cancelled.update(channel._consumers)
        channel.close()


def _takes_writes(transport: Any) -> bool:
    """Whether no earlier frames wait to be written. A TLS socket may have to read first: that is left to pika."""
    return (
        type(transport) is _AsyncPlaintextTransport
        and transport._state == transport._STATE_ACTIVE
        and not transport._tx_buffered_byte_count
    )
