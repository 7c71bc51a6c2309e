"""RedisJobs: odd jobs on queues."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import QueueNotFound
from amqtask.protocol.message import Delivery
from amqtask.transport.contract import QueueState
from amqtask.transport.redis.envelope import incoming
from amqtask.transport.redis.errors import publish_error
from amqtask.transport.redis.keys import list_keys
from amqtask.transport.redis.layout import Command, Layout
from amqtask.transport.redis.publisher import FAILURES, borrowed, converse
from amqtask.transport.redis.scripts import DELETE

if TYPE_CHECKING:
    from amqtask.transport.redis.servers import Deployment

# Seconds that Redis may take for an answer.
ANSWER_SECONDS = 10.0


class RedisJobs:
    """See amqtask.transport.contract.QueueJobs."""

    def __init__(self, deployment: Deployment, layout: Layout) -> None:
        self._server = deployment.name
        self._client = deployment.client()
        self._layout = layout

    def __enter__(self) -> RedisJobs:
        self._ask(("PING",))
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def state(self, queue: str) -> QueueState:
        """How many messages are ready; Redis does not know consumers. Raises: QueueNotFound, PublishError."""
        is_declared, has_bindings, *sizes = self._ask(
            ("HEXISTS", self._layout.key("amqtask.queues"), queue),
            ("EXISTS", self._layout.key(f"_kombu.binding.{queue}")),
            *(("LLEN", key) for key in self._keys(queue)),
        )
        if not is_declared and not has_bindings and not sum(sizes):
            raise QueueNotFound(f"there is no queue {queue!r} on this broker.")
        return QueueState(sum(sizes), 0)

    def purge(self, queue: str) -> int:
        """Delete the ready messages. Raises: QueueNotFound, PublishError."""
        ready = self.state(queue).ready
        self._ask(("DEL", *self._keys(queue)))
        return ready

    def delete(self, queue: str) -> None:
        """Delete the queue with its messages."""
        self._ask(("EVAL", DELETE.source, 1, self._layout.prefix, queue, queue))

    def take(self, queue: str) -> Delivery | None:
        """The first message, which is gone then."""
        self.state(queue)
        for key in self._keys(queue):
            (text,) = self._ask(("RPOP", key))
            if text is not None:
                return incoming(text).delivery(queue, 0)
        return None

    def _keys(self, queue: str) -> list[str]:
        return list_keys(self._layout.prefix, queue)

    def _ask(self, *commands: Command) -> list[Any]:
        try:
            with borrowed(self._client) as connection:
                replies = converse(connection, commands, time.monotonic() + ANSWER_SECONDS)
        except FAILURES as error:
            raise publish_error(error, self._server) from error
        for reply in replies:
            if isinstance(reply, Exception):
                raise publish_error(reply, self._server) from reply
        return replies
