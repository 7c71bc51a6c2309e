"""Copies of a received message that are published again: to the dead-letter queue, or to be delayed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from amqtask.message import Message, Properties, strip_transit_headers

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.message import PropertiesLike

# They would be routed once more (https://www.rabbitmq.com/docs/sender-selected).
_NOT_COPIED = frozenset({"CC", "BCC"})


def copied_properties(properties: PropertiesLike, more_headers: Mapping[str, Any] | None = None) -> Properties:
    """The properties of a message that goes out again.

    `expiration` is left out (its time in the work queue is over; `expires` in the headers still counts), and so
    is `user_id`, which the broker lets only that user's connections send.
    """
    headers = {
        key: value for key, value in strip_transit_headers(properties.headers or {}).items() if key not in _NOT_COPIED
    }
    if more_headers:
        headers.update(more_headers)
    return Properties(
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        headers=headers,
        delivery_mode=2,
        priority=properties.priority,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        message_id=properties.message_id,
        timestamp=properties.timestamp,
        type=properties.type,
        app_id=properties.app_id,
    )


def back_to_its_queue(request: Request) -> Message:
    """The same message to the same queue, through the default exchange: that works whatever the queue hangs on."""
    delivery = request.delivery
    return Message(delivery.body, copied_properties(delivery.properties), exchange="", routing_key=request.queue)


def dead_letter(request: Request, *, to: str, reason: str, exception: str, hostname: str, died_at: str) -> Message:
    """The copy for the dead-letter queue; its headers say why, where, when and after how many attempts."""
    more = {
        "x-amqtask-reason": reason,
        "x-amqtask-exception": exception[:4000],
        "x-amqtask-host": hostname,
        "x-amqtask-attempts": request.attempts + 1,
        "x-amqtask-queue": request.queue,
        "x-amqtask-died-at": died_at,
    }
    delivery = request.delivery
    return Message(delivery.body, copied_properties(delivery.properties, more), exchange="", routing_key=to)
