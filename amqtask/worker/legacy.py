"""Messages that are not protocol v2: protocol v1 (everything in the body), and what is no task at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask.exceptions import InvalidTaskError, MessageError
from amqtask.execution.request import Request
from amqtask.protocol.task import read_v1
from amqtask.worker.strategy import limits_in

if TYPE_CHECKING:
    from amqtask.message import Delivery


def bare_request(delivery: Delivery, number: int) -> Request:
    """A request that only stands for its delivery; it has an id, so that what becomes of it can be told."""
    properties = delivery.properties
    headers = properties.headers if isinstance(properties.headers, dict) else {}
    return Request(
        number=number,
        id=str(headers.get("id") or properties.correlation_id or properties.message_id or ""),
        task=str(headers.get("task") or ""),
        headers=headers,
        body=delivery.body,
        content_type=properties.content_type,
        content_encoding=properties.content_encoding,
        correlation_id=properties.correlation_id,
        reply_to=properties.reply_to,
        exchange=delivery.exchange,
        routing_key=delivery.routing_key,
        queue=delivery.queue,
        priority=properties.priority,
        redelivered=delivery.redelivered,
        delivery=delivery,
    )


def read_legacy(delivery: Delivery, number: int, accept: frozenset[str]) -> tuple[Request, MessageError | None]:
    """The request of a message without a `task` header, and why it is none if it is none.

    Its body has to be read here: name, id and ETA of a protocol v1 message stand in it.
    """
    request = bare_request(delivery, number)
    try:
        if request.task:
            raise InvalidTaskError(f"the header `task` is {request.headers['task']!r}, not a name")
        headers, request.decoded = read_v1(delivery.body, request.content_type, request.content_encoding, accept)
    except MessageError as error:
        return request, error
    request.headers = headers
    request.task = str(headers["task"])
    request.id = str(headers["id"])
    hard, soft = limits_in(headers)
    request.hard_limit, request.soft_limit = hard, soft
    if delivery.redelivered and delivery.properties.headers:
        request.attempts = delivery.properties.headers.get("x-delivery-count") or 0
    return request, None
