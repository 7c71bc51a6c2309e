"""Results that no queue took: their reader has gone, or the node of its queue is down and comes back.

A classic queue is on one node. While that is down, RabbitMQ 3.10 returns messages for the queue as if it did not exist; when the
node is back, so is the queue, and its reader would wait for ever for results that were dropped meanwhile. A passive declaration
of the queue tells the two apart: "no queue", or "home node … is down or inaccessible".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from amqtask.exceptions import PublishRefused
from amqtask.ground.printable import bounded_logger
from amqtask.protocol.entities import Queue

if TYPE_CHECKING:
    from amqtask.exceptions import PublishError
    from amqtask.protocol.message import Message
    from amqtask.transport.contract import LoopPublisher

logger = bounded_logger(__name__)

OnEnd: TypeAlias = Callable[[], None]
# Publishes a message until it is stored; calls the first callback at the end, or the second one when the worker stops first.
Store: TypeAlias = Callable[["Message", Callable[["PublishError | None"], None], Callable[[], None]], None]
# How many names of deleted queues are remembered; names of result queues are not used again.
MOST_GONE = 1000


class Readers:
    """Handles returned results for one worker. The first result for a queue probes the queue; others wait for the answer."""

    def __init__(self, publisher: LoopPublisher, store: Store) -> None:
        self._publisher = publisher
        self._store = store
        self._gone_queues: dict[str, None] = {}
        self._waiting: dict[str, list[tuple[Message, OnEnd]]] = {}

    def returned(self, result: Message, on_end: OnEnd) -> None:
        """A result was returned as unroutable: publish it again when its queue is back. `on_end` is called when it is stored, or
        when its queue is gone."""
        queue = result.routing_key
        if queue in self._gone_queues:
            on_end()
        elif queue in self._waiting:
            self._waiting[queue].append((result, on_end))
        else:
            self._waiting[queue] = []
            probe = replace(result, declare=(Queue(queue, passive=True),))
            # A worker that stops first lets the others have their last attempt.
            self._store(probe, partial(self._probed, queue, on_end), partial(self._probed, queue, on_end, None))

    def _probed(self, queue: str, on_end: OnEnd, error: PublishError | None) -> None:
        waiting = self._waiting.pop(queue)
        if error is None:
            for result, on_stored in waiting:
                self._publisher.publish(result, partial(_stored, on_stored))
        else:
            if isinstance(error, PublishRefused):
                logger.warning("%d results for queue %s are lost: %s", 1 + len(waiting), queue, error)
            else:
                self._note_gone(queue, error)
            for _, on_lost in waiting:
                on_lost()
        on_end()

    def _note_gone(self, queue: str, error: PublishError) -> None:
        logger.debug("nobody reads the queue of results %s any more: %s", queue, error)
        if len(self._gone_queues) >= MOST_GONE:
            self._gone_queues.clear()
        self._gone_queues[queue] = None


def _stored(on_end: OnEnd, error: PublishError | None) -> None:
    if error is not None:
        logger.warning("a result is lost: %s", error)
    on_end()
