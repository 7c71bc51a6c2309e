"""Copies of a received message that are published again: to the dead-letter queue, or to be delayed.

All headers of a message have to go into one frame (AMQP 0-9-1, section 4.2.6.1), which RabbitMQ bounds at 131,072 bytes unless
configured otherwise; for a larger one it closes the connection. So the largest of a received message are replaced by a short
text until the others fit (`fitted`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask.ground.printable import printable
from amqtask.protocol.message import Message, Properties, properties_of_copy, strip_transit_headers
from amqtask.protocol.task import saferepr
from amqtask.transport.content import field_size

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.ground.shapes import HeaderDict, Headers
    from amqtask.protocol.message import PropertiesLike

# The copy would be routed by these headers, too (https://www.rabbitmq.com/docs/sender-selected).
_NOT_COPIED = frozenset({"CC", "BCC"})
# Characters of a dead letter's reason and exception.
_LONGEST_REASON, _LONGEST_EXCEPTION = 1000, 4000


def copied_headers(properties: PropertiesLike) -> HeaderDict:
    """The headers for a copy of a message, without those that the broker or a delay added."""
    headers = strip_transit_headers(properties.headers or {})
    return {name: value for name, value in headers.items() if name not in _NOT_COPIED}


def copied_properties(properties: PropertiesLike, headers: HeaderDict | None = None) -> Properties:
    """The properties for a copy of a message, with these headers or its own."""
    return properties_of_copy(properties, copied_headers(properties) if headers is None else headers)


def back_to_its_queue(request: Request) -> Message:
    """The same message to the same queue, through the default exchange: that works whatever exchange the queue is bound to."""
    delivery = request.delivery
    return Message(delivery.body, copied_properties(delivery.properties), exchange="", routing_key=request.queue)


def dead_letter(request: Request, *, to: str, reason: str, exception: str, hostname: str, died_at: str) -> Message:
    """The copy for the dead-letter queue; its headers say why, where, when and after how many attempts.

    The body is complete. Headers that do not fit, or that cannot be encoded again, are shortened.
    """
    delivery = request.delivery
    headers = fitted(copied_headers(delivery.properties))
    headers |= {
        "x-amqtask-reason": printable(reason, _LONGEST_REASON),
        "x-amqtask-exception": printable(exception, _LONGEST_EXCEPTION),
        "x-amqtask-host": hostname,
        "x-amqtask-attempts": request.attempts + 1,
        "x-amqtask-queue": request.queue,
        "x-amqtask-died-at": died_at,
    }
    return Message(delivery.body, copied_properties(delivery.properties, headers), exchange="", routing_key=to)


def bare_dead_letter(dead: Message) -> Message:
    """The same dead letter with only the reason in its headers, for a broker that refuses the others."""
    headers = {name: value for name, value in dead.properties.headers.items() if name.startswith("x-amqtask-")}
    properties = Properties(content_type=dead.properties.content_type, headers=headers)
    return Message(dead.body, properties, dead.exchange, dead.routing_key, dead.declare)


# Bytes; leaves room in a frame for the properties, for the headers of a dead letter, and for those that brokers add.
ROOM = 98_304
# The names of headers that were shortened or dropped.
CUT_HEADER = "x-amqtask-cut"
# Characters of the text that replaces a value, and of the list of such headers.
_SHORT, _LISTED = 200, 1000
# These are dropped last.
_FIRST = ("task", "id", "lang", "root_id", "parent_id", "group", "retries", "eta", "expires")


def fitted(headers: Headers) -> HeaderDict:
    """The headers, shortened where they do not fit or cannot be encoded; CUT_HEADER names those that were changed."""
    kept, sizes, cut = dict(headers), {}, []
    for name in sorted(headers, key=lambda name: name not in _FIRST):
        size = field_size(name, headers[name])
        if size is None:
            cut.append(name)
            kept[name] = _shortened(headers[name])
            size = field_size(name, kept[name]) or 0
        sizes[name] = size
    cut += _make_room(kept, sizes)
    if cut:
        names = ", ".join(printable(name, _SHORT) for name in cut[:_SHORT])
        kept[CUT_HEADER] = printable(f"{len(cut)} of {len(headers)}: {names}", _LISTED)
    return kept


def _make_room(kept: HeaderDict, sizes: dict[str, int]) -> list[str]:
    """Shorten the largest headers, then drop the last ones, until the headers fit; the names of those that changed."""
    cut: list[str] = []
    total_size = sum(sizes.values())
    for name in sorted(sizes, key=sizes.__getitem__, reverse=True):
        if total_size <= ROOM:
            return cut
        shortened = _shortened(kept[name])
        size = field_size(name, shortened) or 0
        if size < sizes[name]:
            total_size += size - sizes[name]
            kept[name], sizes[name] = shortened, size
            cut.append(name)
    for name in reversed(list(sizes)):
        if total_size <= ROOM:
            break
        total_size -= sizes[name]
        del kept[name]
        cut.append(name)
    return cut


def _shortened(value: object) -> str:
    return printable(saferepr(value, _SHORT), _SHORT)
