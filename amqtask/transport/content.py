"""A message's properties and headers as AMQP writes them, what AMQP does not write, and how pika is made to read and write them.

The broker answers a frame that it cannot read, or that is larger than `frame_max`, by closing the connection, with all messages
under way on it, and does so each time the message is sent again. So such a message has to fail here, alone, before any of it is
written:

- pika's connections check each encoded frame before it is written (see Wire);
- all other publishers call `encode_properties`, which returns the bytes that pika would write.

Field tables (headers and arguments): pika up to 1.4.4 refuses to write a float (UnsupportedAMQPFieldException) and cuts the
fraction off when it reads one: a Celery producer's `soft_time_limit=0.5` would arrive as 0. It has no hook for that, so `install`
replaces its functions by these. They also matter most for a consumer's time per message: a task message has twenty headers. The
types are those of https://www.rabbitmq.com/amqp-0-9-1-errata (section 3); all other values are written as pika writes them.

Reading never raises: pika would close the connection, and the broker then counts a failed delivery for each message that
was delivered over it. A table that cannot be read becomes an OddHeaders, whose values are harmless; the consumer refuses that one
message. So there are two readers: the strict one, which is fast and raises, and the patient one, which is called only after
that.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from functools import lru_cache
from math import isfinite
from typing import TYPE_CHECKING, Any, Final

import pika
import pika.data
from pika.exceptions import AMQPError, ShortStringTooLong, UnsupportedAMQPFieldException

from amqtask.exceptions import MessageTooLarge, PublishError
from amqtask.ground.printable import printable
from amqtask.protocol.message import LARGEST_HEADERS, Message, OddHeaders, Properties
from amqtask.protocol.serialization import is_own
from amqtask.protocol.task import saferepr

if TYPE_CHECKING:
    from amqtask.ground.shapes import FieldTable


# Levels of nested tables and arrays; a task message has three (its stamps).
MOST_DEEP = 32
# A property is a short string, of 255 bytes at most; so many characters always fit.
_SAFE_LENGTH = 63

_read_size = struct.Struct(">I").unpack_from
_read_int = struct.Struct(">i").unpack_from
_write_size = struct.Struct(">I").pack
_write_string = struct.Struct(">cI").pack

# (encoded, offset, depth) to the value and where it ends.
Reader = Callable[[bytes, int, int], "tuple[Any, int]"]
Writer = Callable[[list[bytes], Any], int]

_STRING, _VOID, _INT = b"SVI"
_LONG_STRING: Final = b"S"
# The frame_max in use when neither end asks for less; RabbitMQ's default.
FRAME_MAX = 131_072
# Bytes of a frame besides its payload: type, channel, size, and a mark for its end.
FRAMING = 8
# Characters of a value, or of pika's text about one, that an error shows.
SHOWN = 100
# Bytes of a content header besides the properties: class, weight, and the body's size.
_HEADER_HEAD = 12
# Errors that pika raises for a message that AMQP cannot encode; pika encodes all of it before it writes anything.
UNWRITABLE = (
    AMQPError,
    struct.error,
    TypeError,
    ValueError,
    AssertionError,
    AttributeError,
    ArithmeticError,
)


# -- reading tables


class _Unreadable(ValueError):
    """A value in a table that must not be used."""


# The last second that a datetime can hold (year 9999).
_LAST_SECOND = int(datetime(9999, 12, 31, 23, 59, 59, tzinfo=timezone.utc).timestamp())
# Errors that the strict reader raises.
_TROUBLE = (ValueError, IndexError, OverflowError, struct.error)


def decode_table(encoded: bytes, offset: int) -> tuple[FieldTable, int]:
    """A table and the offset of its end; an OddHeaders for a table that cannot be read. Never raises."""
    try:
        (size,) = _read_size(encoded, offset)
    except struct.error:
        return OddHeaders("the table of headers ends too early"), len(encoded)
    try:
        table, end = _read_table(encoded, offset, 0)
    except _TROUBLE as error:
        if not is_own(error, lambda: _read_table(encoded, offset, 0)):
            raise
        end = min(offset + 4 + size, len(encoded))
        return _patiently(encoded, offset + 4, end), end
    if size > LARGEST_HEADERS:
        return OddHeaders(f"the headers have {size} bytes, and {LARGEST_HEADERS} at most are taken", table), end
    return table, end


def decode_value(encoded: bytes, offset: int) -> tuple[object, int]:
    """One value with its type in front, and the offset of its end."""
    return _read_value(encoded, offset, 0)


def decode_short_string(encoded: bytes, offset: int) -> tuple[str, int]:
    """A property or name, and the offset of its end; bytes that are no UTF-8 become escapes, and the text is cut, so that it can
    be written again."""
    begin = offset + 1
    end = begin + encoded[offset]
    raw = encoded[begin:end]
    try:
        return raw.decode("utf-8"), end
    except UnicodeDecodeError:
        return raw.decode("utf-8", "backslashreplace")[:_SAFE_LENGTH], end


def _read_table(encoded: bytes, offset: int, depth: int) -> tuple[FieldTable, int]:
    """The strict reader; the types that task headers are made of are read in this function."""
    if depth > MOST_DEEP:
        raise _Unreadable(f"tables or arrays within each other, more than {MOST_DEEP}")
    table: FieldTable = {}
    (size,) = _read_size(encoded, offset)
    offset += 4
    end = offset + size
    fields = _fields
    while offset < end:
        begin = offset + 1
        offset = begin + encoded[offset] + 1
        try:
            name, field_type = fields[encoded[begin:offset]]
        except KeyError:
            name, field_type = _field(encoded[begin:offset])
        if field_type == _VOID:
            table[name] = None
        elif field_type == _STRING:
            begin = offset + 4
            offset = begin + _read_size(encoded, offset)[0]
            try:
                table[name] = encoded[begin:offset].decode()
            except UnicodeDecodeError:
                table[name] = encoded[begin:offset]
        elif field_type == _INT:
            (table[name],) = _read_int(encoded, offset)
            offset += 4
        else:
            table[name], offset = _reader(field_type)(encoded, offset, depth + 1)
    if offset != end or end > len(encoded):
        raise _Unreadable("a field is longer than its table")
    return table, offset


# Names with the types behind them, as they are in tables: they are few and always the same.
_fields: dict[bytes, tuple[str, int]] = {}
_MOST_FIELDS = 1000


def _field(raw: bytes) -> tuple[str, int]:
    """A name and a type; an IndexError where neither is."""
    field = raw[:-1].decode("utf-8"), raw[-1]
    if len(_fields) >= _MOST_FIELDS:
        _fields.clear()
    _fields[raw] = field
    return field


def _read_value(encoded: bytes, offset: int, depth: int) -> tuple[object, int]:
    return _reader(encoded[offset])(encoded, offset + 1, depth)


def _reader(field_type: int) -> Reader:
    try:
        return _READERS[field_type]
    except KeyError:
        raise _Unreadable(f"a field of the unknown type {bytes([field_type])!r}") from None


def _text(raw: bytes) -> str | bytes:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _fixed(form: str, convert: Callable[[Any], object] | None = None) -> Reader:
    packed = struct.Struct(f">{form}")
    size, unpack = packed.size, packed.unpack_from

    def read(encoded: bytes, offset: int, _depth: int) -> tuple[Any, int]:
        value = unpack(encoded, offset)[0]
        return (value if convert is None else convert(value)), offset + size

    return read


def _read_text(encoded: bytes, offset: int, depth: int) -> tuple[object, int]:
    raw, offset = _read_bytes(encoded, offset, depth)
    return _text(raw), offset


def _read_bytes(encoded: bytes, offset: int, _depth: int) -> tuple[bytes, int]:
    begin = offset + 4
    end = begin + _read_size(encoded, offset)[0]
    return encoded[begin:end], end


def _read_array(encoded: bytes, offset: int, depth: int) -> tuple[object, int]:
    if depth > MOST_DEEP:
        raise _Unreadable(f"tables or arrays within each other, more than {MOST_DEEP}")
    end = offset + 4 + _read_size(encoded, offset)[0]
    offset += 4
    elements = []
    while offset < end:
        value, offset = _read_value(encoded, offset, depth + 1)
        elements.append(value)
    if offset != end:
        raise _Unreadable("a field is longer than its array")
    return elements, offset


def _read_decimal(encoded: bytes, offset: int, _depth: int) -> tuple[object, int]:
    (raw,) = _read_int(encoded, offset + 1)
    return Decimal(raw).scaleb(-encoded[offset]), offset + 5


def _read_void(_encoded: bytes, offset: int, _depth: int) -> tuple[object, int]:
    return None, offset


def _moment(seconds: int) -> datetime:
    if seconds > _LAST_SECOND:
        raise _Unreadable(f"a time beyond the calendar, {seconds} s")
    return datetime.fromtimestamp(seconds, timezone.utc)


_READERS: dict[int, Reader] = {
    ord(letter): reader
    for letter, reader in {
        "t": _fixed("B", bool),
        "b": _fixed("b"),
        "B": _fixed("B"),
        "s": _fixed("h"),
        "U": _fixed("h"),
        "u": _fixed("H"),
        "I": _fixed("i"),
        "i": _fixed("I"),
        "l": _fixed("q"),
        "L": _fixed("q"),
        "f": _fixed("f"),
        "d": _fixed("d"),
        "T": _fixed("Q", _moment),
        "D": _read_decimal,
        "S": _read_text,
        "x": _read_bytes,
        "A": _read_array,
        "F": _read_table,
        "V": _read_void,
    }.items()
}
# How many bytes a value of each type has; values of other types begin with their size.
_SIZES = dict(zip(b"VtbBsUuIilLfdTD", (0, 1, 1, 1, 2, 2, 2, 4, 4, 8, 8, 4, 8, 8, 5), strict=True))


# -- reading tables that the strict reader refuses


def _patiently(encoded: bytes, offset: int, end: int) -> OddHeaders:
    """The patient reader, field by field: a field that cannot be read becomes a text, the others keep their values."""
    headers = OddHeaders("")
    while offset < end:
        try:
            name, offset = _odd_name(encoded, offset, headers)
            field_type = encoded[offset]
            offset += 1
            size = _SIZES[field_type] if field_type in _SIZES else 4 + _read_size(encoded, offset)[0]
            if field_type not in _READERS or offset + size > end:
                headers.note(f"the header {printable(name)!r} is of an unknown type or has no end")
                break
        except (IndexError, struct.error):
            headers.note("the table of headers ends too early")
            break
        try:
            headers[name], _ = _READERS[field_type](encoded, offset, 1)
        except _TROUBLE as error:
            headers.note(f"the header {printable(name)!r}: {error}")
            headers[name] = f"<{printable(str(error))}>"
        offset += size
    return headers


def _odd_name(encoded: bytes, offset: int, headers: OddHeaders) -> tuple[str, int]:
    begin = offset + 1
    end = begin + encoded[offset]
    try:
        return encoded[begin:end].decode("utf-8"), end
    except UnicodeDecodeError:
        name = encoded[begin:end].decode("utf-8", "backslashreplace")[:_SAFE_LENGTH]
        headers.note(f"the header name {printable(name)} is no UTF-8")
        return name, end


# -- writing tables

_BYTES = [bytes((number,)) for number in range(256)]


def encode_table(pieces: list[bytes], table: FieldTable | None) -> int:
    """Append a table to the pieces; its size in bytes.

    Raises: UnsupportedAMQPFieldException; RecursionError where the caller's stack has no room for a table of any kind."""
    try:
        return _write_fields(pieces, table)
    except RecursionError:
        if not _is_deep(table):
            raise
        raise UnsupportedAMQPFieldException([], "tables or lists within each other, too many") from None


def _is_deep(table: object) -> bool:
    """Whether there are more tables or lists within each other than anybody reads; so is one that holds itself."""
    level: list[Any] = [table or {}]
    for _ in range(MOST_DEEP):
        items = [item for one in level for item in (one.values() if isinstance(one, Mapping) else one)]
        level = list({id(item): item for item in items if isinstance(item, (Mapping, list, tuple))}.values())
    return bool(level)


def _write_fields(pieces: list[bytes], table: FieldTable | None) -> int:
    size_index = len(pieces)
    pieces.append(b"")
    size = 0
    for name, value in (table or {}).items():
        field = _name(name)
        if value is None:
            pieces += (field, b"V")
            size += len(field) + 1
        elif type(value) is str:
            raw = value.encode("utf-8")
            pieces += (field, _write_string(_LONG_STRING, len(raw)), raw)
            size += len(field) + 5 + len(raw)
        else:
            pieces.append(field)
            size += len(field) + encode_value(pieces, value)
    pieces[size_index] = _write_size(size)
    return size + 4


def encode_value(pieces: list[bytes], value: object) -> int:
    """Append one value with its type in front; its size in bytes. Raises: UnsupportedAMQPFieldException."""
    writer = _WRITERS.get(type(value))
    if writer is not None:
        return writer(pieces, value)
    # Everything else, and subclasses (a str enum), as pika does it.
    if isinstance(value, float):
        return _write_float(pieces, float(value))
    size: int = _pikas_encode_value(pieces, value)
    return size


def field_size(name: str, value: object) -> int | None:
    """How many bytes a header takes in its table; None: it cannot be written."""
    try:
        return len(_name(name)) + encode_value([], value)
    except (AMQPError, struct.error, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None


# Header names are few and always the same.
@lru_cache(maxsize=1024)
def _name(name: str) -> bytes:
    raw = name.encode("utf-8")
    if len(raw) > 255:
        raise UnsupportedAMQPFieldException([], name)
    return _BYTES[len(raw)] + raw


def encode_short_string(pieces: list[bytes], value: str | bytes) -> int:
    """Append a short string to the pieces; its size in bytes. Raises: ShortStringTooLong."""
    raw = value if isinstance(value, bytes) else value.encode("utf-8")
    size = len(raw)
    if size > 255:
        raise ShortStringTooLong(raw)
    pieces += (_BYTES[size], raw)
    return 1 + size


def _write_float(pieces: list[bytes], value: float) -> int:
    if not isfinite(value):
        raise UnsupportedAMQPFieldException(pieces, value)  # the broker cannot read it, and closes the connection
    pieces.append(struct.pack(">cd", b"d", value))
    return 9


def _write_int(pieces: list[bytes], value: int) -> int:
    if -0x80000000 <= value < 0x80000000:
        pieces.append(struct.pack(">ci", b"I", value))
        return 5
    if not -(2**63) <= value < 2**63:
        raise UnsupportedAMQPFieldException([], value)
    pieces.append(struct.pack(">cq", b"l", value))
    return 9


def _write_array(pieces: list[bytes], value: Any) -> int:
    inner: list[bytes] = []
    for element in value:
        encode_value(inner, element)
    raw = b"".join(inner)
    pieces += (_write_string(b"A", len(raw)), raw)
    return 5 + len(raw)


def _write_void(pieces: list[bytes], _value: None) -> int:
    pieces.append(b"V")
    return 1


def _write_table(pieces: list[bytes], value: dict[str, object]) -> int:
    pieces.append(b"F")
    return 1 + _write_fields(pieces, value)


_WRITERS: dict[type, Writer] = {
    float: _write_float,
    int: _write_int,
    list: _write_array,
    tuple: _write_array,
    dict: _write_table,
    OddHeaders: _write_table,
    type(None): _write_void,
}
_pikas_encode_value = pika.data.encode_value


def install() -> None:
    """Make pika use these functions; may be called often. For every process that publishes or consumes."""
    pika.data.decode_table = decode_table
    pika.data.decode_value = decode_value
    pika.data.decode_short_string = decode_short_string
    pika.data.encode_short_string = encode_short_string
    pika.data.encode_table = encode_table
    pika.data.encode_value = encode_value


# -- properties, and what does not fit


class FrameTooLarge(AMQPError):  # type: ignore[misc]  # pika is untyped here
    """The broker would close the connection for this frame; nothing of it was written."""

    def __init__(self, size: int, frame_max: int) -> None:
        super().__init__(f"a frame of {size:,} bytes, and frame_max is {frame_max:,}")
        self.size = size
        self.frame_max = frame_max


def check_frame(size: int, frame_max: int) -> None:
    """Raises: FrameTooLarge when `size` (bytes, framing included) is above `frame_max`; a `frame_max` of 0 is no limit."""
    if size > frame_max > 0:
        raise FrameTooLarge(size, frame_max)


def basic_properties(properties: Properties) -> pika.BasicProperties:
    """pika's form of our properties."""
    timestamp = properties.timestamp
    return pika.BasicProperties(
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        headers=properties.headers,
        delivery_mode=properties.delivery_mode,
        priority=properties.priority,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        expiration=properties.expiration,
        message_id=properties.message_id,
        timestamp=int(timestamp.timestamp()) if isinstance(timestamp, datetime) else timestamp,
        type=properties.type,
        user_id=properties.user_id,
        app_id=properties.app_id,
    )


def encode_properties(message: Message, frame_max: int = FRAME_MAX) -> bytes:
    """The properties as on the wire. Raises: PublishError for values that AMQP cannot encode, MessageTooLarge for headers that
    do not fit into a frame; nothing was sent."""
    install()
    try:
        encoded = b"".join(basic_properties(message.properties).encode())
        check_frame(FRAMING + _HEADER_HEAD + len(encoded), frame_max)
        for name in (message.exchange, message.routing_key):
            if len(name.encode()) > 255:
                raise ValueError(f"{name[:20]!r}… is longer than 255 bytes")
    except UNWRITABLE as error:
        raise unwritable(message, error) from error
    return encoded


def unwritable(message: Message, error: BaseException) -> PublishError:
    """The error for headers or properties that AMQP cannot encode; nothing was sent."""
    to = f"the message for routing key {message.routing_key[:255]!r}"
    if isinstance(error, FrameTooLarge):
        return MessageTooLarge(
            f"{to} cannot be sent: its headers take {error.size:,} bytes, and the broker takes at most {error.frame_max:,} "
            "(frame_max). Arguments have no such limit; put large data there, or store it elsewhere and pass where it is."
        )
    return PublishError(
        f"{to} cannot be written as AMQP: {_reason(error)} "
        "(names and routing keys have at most 255 bytes; headers hold text, finite numbers, dates, lists and tables)"
    )


def _reason(error: BaseException) -> str:
    if isinstance(error, UnsupportedAMQPFieldException) and len(error.args) == 2:  # with all that was encoded before it
        return f"{saferepr(error.args[1], SHOWN)} of type {type(error.args[1]).__name__} has no form there"
    return f"{type(error).__name__}: {error}"[:SHOWN]
