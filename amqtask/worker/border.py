"""The border: reads unusual messages. A message that cannot be read is refused with a reason, and harms nothing else.

A protocol v2 message with the usual headers is read in strategy.py; all others come here. Protocol v1 has everything in the body,
so the worker itself has to read that, up to a bound; the slot that runs the task reads it once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from amqtask.exceptions import InvalidTaskError, MessageError
from amqtask.execution.request import request_of
from amqtask.ground.printable import printable
from amqtask.protocol.message import OddHeaders
from amqtask.protocol.task import LONGEST_ID, read_v1
from amqtask.worker.strategy import attempts_in, limits_in

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.protocol.message import Delivery


def bare_request(delivery: Delivery, number: int) -> Request:
    """A request that only stands for its delivery; it has an id where that is known, for logs and for the result."""
    properties = delivery.properties
    headers = properties.headers if isinstance(properties.headers, dict) else {}
    task_id = headers.get("id") or properties.correlation_id or properties.message_id
    request = request_of(
        delivery,
        number,
        task_id=task_id if isinstance(task_id, str) and len(task_id) <= LONGEST_ID and task_id.isprintable() else "",
        task=printable(str(headers.get("task") or ""), LONGEST_ID),
        queue=delivery.queue,
    )
    request.headers = headers
    request.redelivered = delivery.redelivered
    request.delivery = delivery
    return request


def read_strange(delivery: Delivery, number: int, accept: frozenset[str]) -> tuple[Request, MessageError | None]:
    """The request of a message that is no plain protocol v2, and the error if it is no task message."""
    request = bare_request(delivery, number)
    raw_headers = delivery.properties.headers
    try:
        if isinstance(raw_headers, OddHeaders):
            raise InvalidTaskError(raw_headers.problem)
        if request.task:
            raise InvalidTaskError(f"the header `task` is {request.task!r}, not a name")
        headers = read_v1(
            delivery.body,
            request.content_type,
            request.content_encoding,
            accept,
            compression=request.headers.get("compression"),
        )
    except MessageError as error:
        return request, error
    request.headers = headers
    request.task, request.id = headers["task"], headers["id"]
    request.hard_limit, request.soft_limit = limits_in(headers)
    if delivery.redelivered and raw_headers:
        request.attempts = attempts_in(raw_headers)
    return request, None
