"""Steps of a chain one after the other: when the next one may run where the last one ran, and its request.

A slot that is a process of its own runs the next step by itself (SlotSteps) and only tells the worker, which would otherwise send
it the next step through two sockets. What only the worker knows (revoked tasks, changed limits, that it stops) reaches the slot
as a switch. For all other slots the worker does the same itself (amqtask.worker.chain_steps).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from amqtask.execution.request import request_of

if TYPE_CHECKING:
    from amqtask.execution.contract import TaskLike
    from amqtask.execution.outcome import Outcome
    from amqtask.execution.request import Request
    from amqtask.execution.shared_flag import Flag
    from amqtask.protocol.message import Message

_NO_LIMITS = (None, [None, None], (None, None))


def needs_no_broker(before: Request, message: Message) -> bool:
    """Whether the message would be delivered from the queue that `before` came from, at once and with the same priority."""
    headers, properties = message.properties.headers, message.properties
    return (
        not message.exchange
        and message.routing_key == before.queue
        and (properties.priority or 0) == (before.priority or 0)
        and headers.get("eta") is None
        and headers.get("expires") is None
    )


class SlotSteps:
    """For the process of a slot: makes the requests of next steps for `seconds` after the first one, while `is_allowed` is on."""

    def __init__(self, tasks: Mapping[str, TaskLike], seconds: float, is_allowed: Flag) -> None:
        self._tasks = tasks
        self._seconds = seconds
        self._is_allowed = is_allowed

    def after(self, before: Request, outcome: Outcome) -> Request | None:
        """The request of the next step, to be run now; None: the worker decides.

        It has a number of its own, which no request of the worker's has.
        """
        if not (outcome.is_step and self._is_allowed[0]) or before.redelivered:
            return None
        now = time.monotonic()
        until = before.until or now + self._seconds
        if now >= until or not self._may_follow(before, outcome.publish[0]):
            return None
        return _request(before, outcome.publish[0], until)

    def begun(self, before: Request, outcome: Outcome, until: float) -> Request:
        """The request that `after` returned, for the worker. Raises: ValueError for one that it would never return."""
        if not outcome.is_step or not outcome.publish or not self._may_follow(before, outcome.publish[0]):
            raise ValueError(f"a step that cannot follow {before.task}[{before.id}]")
        return _request(before, outcome.publish[0], until)

    def _may_follow(self, before: Request, message: Message) -> bool:
        headers = message.properties.headers
        task = self._tasks.get(headers.get("task"))  # type: ignore[arg-type]
        return (
            task is not None
            and isinstance(headers.get("id"), str)
            and task.acks_late
            and task.time_limit is None
            and task.soft_time_limit is None
            and headers.get("timelimit") in _NO_LIMITS
            and before.hard_limit is None
            and before.soft_limit is None
            and needs_no_broker(before, message)
        )


def _request(before: Request, message: Message, until: float) -> Request:
    headers = message.properties.headers
    number = before.number - 1 if before.number < 0 else -(before.number << 32) - 1
    step = request_of(message, number, task_id=headers["id"], task=headers["task"], queue=before.queue)
    step.until = until
    return step
