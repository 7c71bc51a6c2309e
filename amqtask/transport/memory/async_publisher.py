"""MemoryAsyncPublisher: the publisher's contract for asyncio, to a broker in this process."""

from __future__ import annotations

from collections.abc import Sequence

from amqtask.exceptions import PublishError
from amqtask.protocol.message import Message
from amqtask.transport.contract import Publisher


class MemoryAsyncPublisher:
    """See amqtask.transport.contract.AsyncPublisher. Publishes in the event loop's thread, because this broker answers at once;
    a broker that is stopped or blocked holds the event loop up."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def connect(self, *, timeout: float | None = None) -> None:
        """The publisher connects with the first message."""

    async def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish; raises the named error of what went wrong."""
        self._publisher.publish(message, timeout=timeout)

    async def publish_many(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[PublishError | None]:
        """One entry per message, None for a stored one."""
        return self._publisher.publish_many(messages, timeout=timeout)

    async def close(self) -> None:
        """Leave the publisher's connections open: others use them."""
