"""A queue that is deleted and made anew within milliseconds: RabbitMQ 3 keeps its consumers, and drops what it delivers to them.

The channel of a deleted quorum queue consumes the queue of that name again by itself, because the name may have moved to another
node (rabbit_channel.erl, `handle_consuming_queue_down_or_eol`; RabbitMQ 4 cancels the consumers). The client is told nothing, and
the channel goes on counting from the deliveries of the old queue: as many of the new one do not come, and stay unanswered until
the channel is closed.

The channel may not consume a quorum queue while it has a global prefetch (error 540; a running consumer heeds no such prefetch).
So it gets one once all its consumers have started. Then that attempt fails, and the client is told that the consumer is
cancelled, as for other deleted queues. Classic queues are told anyway, and would ask for leave before each delivery: a channel
that has one gets no global prefetch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from amqtask.topology.declarations import is_quorum

if TYPE_CHECKING:
    from collections.abc import Iterable

    from amqtask.protocol.entities import Queue
    from amqtask.transport.wire import Wire

# basic.qos has 16 bits; 0 is none.
GLOBAL_PREFETCH, NONE = 65535, 0


def keeps_consumers_of_deleted(connection: Wire) -> bool:
    """Whether the broker is a RabbitMQ before 4."""
    return 0 < connection.server_major < 4


class RecreationGuard:
    """The global prefetch of one channel."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel
        self._is_set = False

    def lift(self) -> None:
        """A consumer is about to be started."""
        if self._is_set:
            self._is_set = False
            self._channel.basic_qos(prefetch_count=NONE, global_qos=True)

    def set(self, queues: Iterable[Queue]) -> None:
        """All consumers of the channel have started, and these are the queues."""
        if not self._is_set and all(map(is_quorum, queues)):
            self._is_set = True
            self._channel.basic_qos(prefetch_count=GLOBAL_PREFETCH, global_qos=True)
