"""MemoryAsyncPublisher: the publisher's contract for asyncio, to a broker in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from amqtask.exceptions import PublishError
from amqtask.protocol.message import Message
from amqtask.transport.contract import Publisher


class MemoryAsyncPublisher:
    """See amqtask.transport.contract.AsyncPublisher. Publishes in a thread: no alarm or full queue holds up the event loop."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher

    async def connect(self, *, timeout: float | None = None) -> None:
        """The publisher connects with the first message."""

    async def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish; raises the named error of what went wrong."""
        await asyncio.to_thread(self._publisher.publish, message, timeout=timeout)

    async def publish_many(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[PublishError | None]:
        """One entry per message, None for a stored one."""
        return await asyncio.to_thread(self._publisher.publish_many, messages, timeout=timeout)

    async def close(self) -> None:
        """Close idle connections; the publisher opens new ones when it is used again."""
        self._publisher.close()
