"""Steps: a worker goes on with a chain by itself for a moment, where a redelivery could be resumed (execution.resuming).

When a step has ended and its result is stored, the next one would be published to the queue that it came from, to come back
from there. Instead its message joins the line here as if it had been delivered, and the message that the chain came with stays
unanswered until the last of these steps has ended: it answers for all of them. Nothing waits in this worker that the broker
does not have; what a lost worker has done of the chain is not done again, because the store knows it.

It ends after `seconds`: then the next step is published, so that others get their turn and a long chain may go elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from typing import TYPE_CHECKING

from amqtask.message import Delivery
from amqtask.worker.strategy import read_request

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.message import Message
    from amqtask.worker.strategies import Strategies
    from amqtask.worker.throttle import Throttle


class Run:
    """The steps that run here on behalf of `first`, the request that was delivered; none begins after `until`."""

    __slots__ = ("first", "until")

    def __init__(self, first: Request, until: float) -> None:
        self.first = first
        self.until = until


def delivered(request: Request) -> Request:
    """The request whose message the broker waits to hear of."""
    run: Run | None = request.run
    return request if run is None else run.first


class Steps:
    """Makes requests of next steps. `consumed` are the names of the queues that this worker takes from."""

    def __init__(
        self,
        seconds: float,
        *,
        strategies: Strategies,
        throttle: Throttle,
        consumed: Container[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._seconds = seconds
        self._strategies = strategies
        self._throttle = throttle
        self._consumed = consumed
        self._clock = clock

    def request(self, before: Request, message: Message, number: int) -> Request | None:
        """The request of the step after `before`; None: it must be published."""
        now, run = self._clock(), before.run
        if now >= run.until if run is not None else not self._seconds or before.redelivered:
            return None
        properties = message.properties
        headers = properties.headers
        name = headers["task"]
        strategy = self._strategies[name]
        if (
            message.exchange
            or message.routing_key != before.queue
            or before.queue not in self._consumed
            or (properties.priority or 0) != (before.priority or 0)
            or headers.get("eta") is not None
            or headers.get("expires") is not None
            or not strategy.is_plain
            or self._throttle.limits(name)
        ):
            return None
        first = delivered(before)
        origin = first.delivery
        delivery = Delivery(message.body, properties, "", before.queue, False, before.queue, origin.tag, origin.epoch)
        request = read_request(delivery, number, name, strategy)
        request.run = run or Run(first, now + self._seconds)
        return request
