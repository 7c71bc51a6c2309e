"""Event messages: what happens to tasks and workers, under Celery's names (celery/events) on a topic exchange."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from json.encoder import encode_basestring_ascii
from typing import TYPE_CHECKING, Any, NamedTuple

from amqtask.exceptions import Undecodable
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue, arguments
from amqtask.protocol.message import Message, Properties
from amqtask.protocol.serialization import JSON, Encoded, content_type, dumps, loads

if TYPE_CHECKING:
    from amqtask.ground.shapes import EventDict, EventFields, QueueArgumentDict

EXCHANGE = "celeryev"  # the setting event_exchange
# The routing key of a message with several events of tasks.
SEVERAL = "task.multi"


def event_exchange(name: str = EXCHANGE) -> Exchange:
    """The exchange for events; Flower and `celery events` consume from it."""
    return Exchange(name, type="topic")


@lru_cache(maxsize=16)
def _to_declare(exchange: str) -> tuple[Exchange]:
    # The same tuple each time: publishers know by its identity that it is declared.
    return (event_exchange(exchange),)


def utc_offset() -> int:
    """Hours from local time to UTC, positive in the west (celery/utils/time.py)."""
    return (time.altzone if time.localtime().tm_isdst > 0 else time.timezone) // 3600


def receiver_queue(
    name: str, exchange: str = EXCHANGE, *, routing_key: str = "#", ttl: float = 5.0, expires: float = 60.0
) -> Queue:
    """The queue of one receiver, under a unique name; unread events are dropped after `ttl` seconds."""
    return Queue(
        name,
        exchange=event_exchange(exchange),
        routing_key=routing_key,
        durable=False,
        exclusive=True,
        auto_delete=True,
        arguments=arguments({"x-message-ttl": int(ttl * 1000), "x-expires": int(expires * 1000)}),
    )


# A segment of a stream is deleted as a whole, so that a small limit needs small segments (RabbitMQ's are of 500 MB).
_SEGMENTS, _LARGEST_SEGMENT, _SMALLEST_SEGMENT = 10, 500_000_000, 1_000_000
# Messages that wait in an ordinary queue of history, at most, where nobody reads them; later ones are refused.
MOST_UNREAD = 50_000
# The header of a task that was run again with other arguments: the id of the one that it stands for.
RERUN_OF = "rerun_of"
# Bodies of more bytes are not kept in history.
LARGEST_KEPT = 131_072


class Keeping(NamedTuple):
    """How events are kept (the setting task_history): in which queue, and how they come there.

    `declare` is what must exist before an event is published. The queue is bound to the events' exchange; where such an exchange
    reaches only those who listen (Redis), `copies` says that each message is also published to the queue itself. With
    `arguments`, events of workers have the whole message, so that the task can be run again.
    """

    queue: Queue
    declare: tuple[Declaration, ...]
    copies: bool = False
    arguments: bool = False

    def copy(self, message: Message) -> Message:
        """The message for the queue itself."""
        properties = replace(message.properties, delivery_mode=2)
        return Message(message.body, properties, "", self.queue.name, (self.queue,), mandatory=False)


def keeping(
    name: str,
    exchange: str,
    *,
    queue_type: str,
    max_age: float,
    max_bytes: int,
    is_bound: bool,
    with_arguments: bool,
) -> Keeping:
    """The queue `name` for the events of `exchange`: a stream, or a queue of another type. `max_age` is seconds; both limits are
    a stream's (https://www.rabbitmq.com/docs/streams#retention). Not `is_bound`: see `Keeping.copies`."""
    if not is_bound:
        bound: QueueArgumentDict = {"x-max-length": MOST_UNREAD, "x-overflow": "reject-publish"}
        queue = Queue(name, arguments=arguments(bound))
        return Keeping(queue, (event_exchange(exchange),), copies=True, arguments=with_arguments)
    limits: QueueArgumentDict = {"x-queue-type": queue_type, "x-max-length-bytes": max_bytes}
    if queue_type == "stream":
        segment = max(_SMALLEST_SEGMENT, min(_LARGEST_SEGMENT, max_bytes // _SEGMENTS))
        limits |= {"x-max-age": f"{max(1, int(max_age))}s", "x-stream-max-segment-size-bytes": segment}
    queue = Queue(name, arguments=arguments(limits))
    bindings = [Binding(event_exchange(exchange), name, key) for key in ("task.#", "worker.#")]
    return Keeping(queue, (event_exchange(exchange), queue, *bindings), arguments=with_arguments)


def event(
    event_type: str,
    /,
    hostname: str,
    *,
    timestamp: float,
    clock: int | None,
    pid: int,
    utcoffset: int = 0,
    **fields: object,
) -> EventDict:
    """An event with the fields that all events have. `timestamp` is Unix time, `utcoffset` hours west of UTC."""
    return {
        "type": event_type,
        "hostname": hostname,
        "utcoffset": utcoffset,
        "pid": pid,
        "clock": clock,
        "timestamp": timestamp,
        **fields,
    }


def json_text(value: Any) -> str:
    """A value as JSON, with short cuts for the types of most fields. Raises: EncodeError."""
    value_type = value.__class__
    if value_type is str:
        return encode_basestring_ascii(value)
    if value is None:
        return "null"
    return repr(value) if value_type is int else dumps(value, "json").body.decode()


def fields_text(fields: EventFields) -> str:
    """The middle of a JSON object. Raises: EncodeError."""
    return "".join(f'"{name}": {json_text(value)}, ' for name, value in fields.items())


class EventTexts:
    """Writes events of tasks as JSON text, one by one, when they happen.

    A busy worker sends three events per task. To write them like this takes half the time of making mappings and writing
    those together, and events that wait for the broker take less memory.
    """

    def __init__(self, hostname: str, *, pid: int, utcoffset: int) -> None:
        self._end = f'"hostname": {json_text(hostname)}, "utcoffset": {utcoffset}, "pid": {pid}}}'

    def text(self, event_type: str, task_id: str, fields: str, *, clock: int, timestamp: float) -> str:
        """An event as JSON; `fields` are its own fields, as `fields_text` writes them."""
        return (
            f'{{"type": "{event_type}", "uuid": {json_text(task_id)}, {fields}"clock": {clock}, '
            f'"timestamp": {timestamp:.6f}, {self._end}'
        )


def texts_message(
    texts: Sequence[str], exchange: str = EXCHANGE, *, hostname: str, serializer: str = "json"
) -> Message:
    """Like `events_message`, for events that are JSON texts already."""
    if content_type(serializer) == JSON:
        encoded = Encoded(f"[{', '.join(texts)}]".encode(), JSON, "utf-8")
    else:
        encoded = dumps([json.loads(text) for text in texts], serializer)
    return _in_message(encoded, SEVERAL, hostname, exchange)


def event_message(event: EventFields, exchange: str = EXCHANGE, *, serializer: str = "json") -> Message:
    """One event; the routing key is its type, `task.succeeded`."""
    return _in_message(dumps(event, serializer), event["type"].replace("-", "."), event.get("hostname"), exchange)


def events_message(events: Sequence[EventFields], exchange: str = EXCHANGE, *, serializer: str = "json") -> Message:
    """Several events of tasks in one message."""
    hostname = events[0].get("hostname") if events else None
    return _in_message(dumps(list(events), serializer), SEVERAL, hostname, exchange)


def _in_message(encoded: Encoded, routing_key: str, hostname: str | None, exchange: str) -> Message:
    properties = Properties(
        content_type=encoded.content_type,
        content_encoding=encoded.content_encoding,
        headers={"hostname": hostname},
        delivery_mode=1,
    )
    return Message(encoded.body, properties, exchange, routing_key, _to_declare(exchange), mandatory=False)


def read_events(
    body: bytes, content_type: str | None, content_encoding: str | None, accept: frozenset[str]
) -> list[EventDict]:
    """The events of a message, which holds one or a list. Raises: ContentDisallowed, Undecodable."""
    decoded = loads(body, content_type, content_encoding, accept)
    events = decoded if isinstance(decoded, list) else [decoded]
    if not all(isinstance(event_fields, dict) and isinstance(event_fields.get("type"), str) for event_fields in events):
        raise Undecodable("not an event: no mapping with a `type`")
    return events
