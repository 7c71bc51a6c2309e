"""pika's connection, with less work for each message.

Writing: pika hands each frame to the socket with a call of its own, and only after it has asked the poller whether the
socket takes writes: four system calls for each. A socket nearly always takes them, so the frames of a burst are one write, made
at once. A frame that is larger than the broker takes fails before any of its message is written.

Reading: a delivery is three frames, which pika takes one by one through eleven calls each. Where all three have come (they
nearly always have), they are decoded together with pika's own decoders and handed to pika's channel; all other frames are left
to pika. The frames are those of AMQP 0-9-1, sections 2.3.5 and 4.2.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct
import termios
from collections.abc import Callable
from typing import Any

from pika import frame, spec
from pika.adapters.select_connection import SelectConnection
from pika.adapters.utils.io_services_utils import _AsyncPlaintextTransport
from pika.adapters.utils.nbio_interface import AbstractIOReference
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter
from pika.connection import Connection

from amqtask.ground.loop import TurnLoop
from amqtask.transport.content import check_frame
from amqtask.transport.incoming import read_deliver, read_properties
from amqtask.transport.loop import PikaLoop
from amqtask.transport.pika_log import keep_quiet
from amqtask.transport.stream import Answer, look_up_in_thread

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
    """pika's threads that look up host names keep a process from ending for as long as the resolver hangs; ours do not."""

    def getaddrinfo(
        self, host: str, port: int, on_done: Callable[[Answer], None], *_: int, **__: int
    ) -> AbstractIOReference:
        return _Lookup(self.get_native_ioloop(), host, port, on_done)


class Wire(Connection):  # type: ignore[misc]  # pika is untyped here
    """pika's connection on a loop, without the way to the broker. Frames of one loop turn are written at its end, in one go."""

    # The loop, set by the constructors.
    turns: TurnLoop
    _gathered: bytearray | None = None
    # How many bytes of the buffer's front have been handed on.
    _taken = 0

    @property
    def server_major(self) -> int:
        """The first number of RabbitMQ's version; 0 for other brokers."""
        properties = self.server_properties or {}
        major = str(properties.get("version", "")).partition(".")[0]
        return int(major) if properties.get("product") == "RabbitMQ" and major.isdigit() else 0

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
        self._terminate_stream(error)

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
        super().__init__(*arguments, custom_ioloop=_Services(loop.pika))

    def _proto_connection_made(self, transport: Any) -> None:
        transport._MAX_RECV_BYTES = MOST_READ
        super()._proto_connection_made(transport)

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


def _takes_writes(transport: Any) -> bool:
    """Whether no earlier frames wait to be written. A TLS socket may have to read first: that is left to pika."""
    return (
        type(transport) is _AsyncPlaintextTransport
        and transport._state == transport._STATE_ACTIVE
        and not transport._tx_buffered_byte_count
    )
