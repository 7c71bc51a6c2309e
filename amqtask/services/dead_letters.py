"""Dead letters: why a message died and where, and the message that goes back to work."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from amqtask.flow.deadline import HEADER as DEADLINE
from amqtask.flow.keys import OF_ONE_RUN
from amqtask.protocol.message import Delivery, Message, deaths_in
from amqtask.protocol.task import PUBLISHED_AT, saferepr, timestamp
from amqtask.topology.declarations import may_hold_tasks
from amqtask.worker.finisher import copied_properties

if TYPE_CHECKING:
    from amqtask.ground.shapes import Headers, JsonObject

REASON = "x-amqtask-reason"
OURS = "x-amqtask-"


def reason(headers: Headers) -> str:
    """Why a message died: by our header, else by the broker's x-death entry."""
    if REASON in headers:
        return str(headers[REASON])
    for death in deaths_in(headers):
        return f"{death.get('reason')} in {death.get('queue')} ({death.get('count')}×)"
    return "unknown"


def header_text(value: object) -> str | None:
    """The text of a header, which may be something else."""
    return value if value is None or isinstance(value, str) else saferepr(value)


def work_queue_of(delivery: Delivery, suffix: str) -> str:
    """The queue that the message died in: as its headers say, where that can be true."""
    headers = delivery.properties.headers or {}
    queue = headers.get(f"{OURS}queue")
    if queue is None:
        queue = next((death.get("queue") for death in deaths_in(headers)), None)
    # The headers of what no worker of ours has moved there are its sender's.
    is_one = isinstance(queue, str) and may_hold_tasks(queue)
    return str(queue) if is_one else delivery.queue.removesuffix(suffix)


def back_to_work(delivery: Delivery, queue: str, *, without_expiry: bool = False) -> Message:
    """The message as it was published, to `queue`: no deaths, deliveries or attempts are counted on it any more."""
    properties = copied_properties(delivery.properties)
    headers = {
        key: value
        for key, value in properties.headers.items()
        if not key.startswith(OURS) and key != PUBLISHED_AT and key not in OF_ONE_RUN
    }
    if without_expiry and headers.get("expires"):
        headers["expires"] = None
        headers.pop(DEADLINE, None)
    properties.headers = headers
    return Message(body=delivery.body, properties=properties, exchange="", routing_key=queue)


def has_expired(headers: Headers, now: float) -> bool:
    """Whether a worker would drop the task at once, because its `expires` has passed."""
    expires = headers.get("expires")
    if not expires:
        return False
    try:
        return timestamp(expires) <= now
    except (TypeError, ValueError, AttributeError, ArithmeticError):
        return False  # a worker says so, with the message


def as_entry(delivery: Delivery) -> JsonObject:
    """What `dead list --json` says about a message."""
    headers = delivery.properties.headers or {}
    return {
        "id": header_text(headers.get("id")),
        "task": header_text(headers.get("task")),
        "queue": delivery.queue,
        "reason": reason(headers),
        "exception": headers.get(f"{OURS}exception"),
        "attempts": headers.get(f"{OURS}attempts"),
        "host": headers.get(f"{OURS}host"),
        "died_at": _died_at(headers),
    }


def _died_at(headers: Headers) -> str | None:
    """When a message died, in ISO 8601: by our header, else by the broker's x-death entry."""
    died_at = headers.get(f"{OURS}died-at")
    if died_at is not None:
        return header_text(died_at)
    times = (death.get("time") for death in deaths_in(headers))
    return next((when.isoformat() for when in times if isinstance(when, datetime)), None)
