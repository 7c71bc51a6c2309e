"""Steps: a worker runs the next steps of a chain without the broker for a while, if a redelivery could be resumed
(execution.resuming).

When a step has ended and its result is stored, the next step would be published to the queue that it came from, and be delivered
from there. Instead its message joins the line here as if it had been delivered, and the message that the chain came with stays
unanswered until the last of these steps has ended: its answer is the answer of all of them. So the broker still has a message of
all work in this worker; when the worker is lost, its finished steps do not run again, because their results are stored.

After `seconds` the next step is published, so that other tasks get their turn and a long chain may go to another worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from typing import TYPE_CHECKING

from amqtask.execution.chain_steps import needs_no_broker
from amqtask.protocol.message import Delivery
from amqtask.worker.strategy import read_request

if TYPE_CHECKING:
    from amqtask.execution.chain_steps import SharedFlag
    from amqtask.execution.request import Request
    from amqtask.protocol.message import Message
    from amqtask.worker.revoked import Revocations
    from amqtask.worker.strategy import Strategies
    from amqtask.worker.throttle import Throttle


def delivered(request: Request) -> Request:
    """The request whose message is unanswered: it stands for all steps of its chain that run here."""
    return request.first or request


class Steps:
    """Makes requests of next steps. `consumed` are the names of the queues that this worker consumes, `switch` tells slots that
    are processes whether they may run next steps by themselves."""

    def __init__(
        self,
        seconds: float,
        *,
        strategies: Strategies,
        throttle: Throttle,
        revoked: Revocations,
        consumed: Container[str],
        switch: SharedFlag | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._strategies = strategies
        self._throttle = throttle
        self._revoked = revoked
        self._consumed = consumed
        self._switch = switch
        self._limits_changed = False
        self._clock = clock

    def request(self, before: Request, message: Message, number: int) -> Request | None:
        """The request of the step after `before`; None: it must be published."""
        now = self._clock()
        until = before.until or now + self._seconds
        if now >= until or before.redelivered:
            return None
        name = message.properties.headers["task"]
        strategy = self._strategies[name]
        if (
            not strategy.is_plain
            or before.queue not in self._consumed
            or self._throttle.limits(name)
            or not needs_no_broker(before, message)
        ):
            return None
        request = read_request(_as_delivered(before, message), number, name, strategy)
        request.first, request.until = delivered(before), until
        return request

    def gone_on(self, before: Request, message: Message, step: Request) -> None:
        """A slot has begun with the next step by itself: complete its request with the values that only this process has."""
        step.delivery = _as_delivered(before, message)
        step.first = delivered(before)

    def look(self, *, is_quiet: bool = False, limits_changed: bool = False) -> None:
        """Let slots run next steps by themselves, or not: they do not know revoked tasks and changed limits."""
        if self._switch is None:
            return
        self._limits_changed |= limits_changed
        if self._seconds and not (is_quiet or self._limits_changed or self._throttle or self._revoked):
            self._switch.turn_on()
        else:
            self._switch.turn_off()


def _as_delivered(before: Request, message: Message) -> Delivery:
    origin = delivered(before).delivery
    queue = before.queue
    return Delivery(message.body, message.properties, "", queue, False, queue, origin.tag, origin.epoch)
