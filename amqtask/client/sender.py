"""How the messages of one application's calls leave it: to the broker with confirms, or into a transaction's outbox."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from amqtask import signals
from amqtask.client.message_builder import body_of
from amqtask.exceptions import PublishError
from amqtask.flow.keys import TAKEN
from amqtask.protocol.message import Message

if TYPE_CHECKING:
    from amqtask.client.runtime import Roof
    from amqtask.ground.shapes import JsonObject
    from amqtask.outbox.contract import NewRow, Transaction


class Sender:
    """Sends messages of one application, with signals and events about what was stored. Each method raises PublishError, or an
    error of the outbox's database, where it does not return errors."""

    def __init__(self, app: Roof) -> None:
        self._app = app

    @property
    def transaction(self) -> Transaction | None:
        """The outbox's transaction that a call is made in here, if any: its commit sends the call."""
        outbox = self._app.runtime.outbox
        return None if outbox is None else outbox.transaction()

    def store(self, message: Message, timeout: float | None = None) -> bool:
        """Send one message, without a word about it. False: it is a row of a transaction."""
        transaction = self.transaction
        if transaction is not None:
            transaction.write(self._rows((message,)))
            return False
        self._app.runtime.publisher.publish(message, timeout=timeout)
        return True

    def send(self, message: Message, timeout: float | None) -> None:
        """Send the message of one call."""
        try:
            is_published = self.store(message, timeout)
        except BaseException as error:
            self.settled(message, error)
            raise
        self.settled(message)
        if is_published and self._app.runtime.tells_sent:
            self._app.runtime.sent_events.sent((message,))

    async def asend(self, message: Message, timeout: float | None) -> None:
        """The same without blocking the event loop."""
        transaction = self.transaction
        try:
            if transaction is not None:
                await transaction.awrite(self._rows((message,)))
            else:
                await self._app.runtime.async_publisher.publish(message, timeout=timeout)
        except BaseException as error:
            await self._asettled(message, error)
            raise
        await self._asettled(message)
        if transaction is None:
            await self._atell_sent((message,))

    def send_many(self, messages: Sequence[Message], timeout: float | None) -> Sequence[PublishError | None]:
        """Send a burst; the errors of those that were not stored, in their order. `all_settled` comes next."""
        transaction = self.transaction
        if transaction is None:
            return self.send_now(messages, timeout=timeout)
        try:
            transaction.write(self._rows(messages))
        except BaseException as error:
            self._none_stored(messages, error)
            raise
        return [None] * len(messages)

    async def asend_many(self, messages: Sequence[Message], timeout: float | None) -> Sequence[PublishError | None]:
        """The same without blocking the event loop."""
        transaction = self.transaction
        if transaction is None:
            limit = self.limit(timeout, len(messages))
            errors = await self._app.runtime.async_publisher.publish_many(messages, timeout=limit)
            await self._atell_sent(_stored(messages, errors))
            return errors
        try:
            await transaction.awrite(self._rows(messages))
        except BaseException as error:
            self._none_stored(messages, error)
            raise
        return [None] * len(messages)

    def send_now(self, messages: Sequence[Message], *, timeout: float | None) -> Sequence[PublishError | None]:
        """Send a burst to the broker, whatever transaction there is."""
        errors = self._app.runtime.publisher.publish_many(messages, timeout=self.limit(timeout, len(messages)))
        if self._app.runtime.tells_sent:
            self._app.runtime.sent_events.sent(_stored(messages, errors))
        return errors

    def limit(self, timeout: float | None, count: int) -> float | None:
        """A burst has the deadline of one publish, and a second more for each thousand."""
        seconds = self._app.conf.broker_publish_timeout
        return timeout if timeout is not None or seconds is None else float(seconds) + count / 1000

    async def _atell_sent(self, messages: Sequence[Message]) -> None:
        """An event loop must not wait for the connection that events go over."""
        if self._app.runtime.tells_sent:
            await asyncio.to_thread(self._app.runtime.sent_events.sent, messages)

    def _rows(self, messages: Sequence[Message]) -> list[NewRow]:
        from amqtask.outbox.contract import as_row

        backend = self._app.runtime.backend
        queue = backend.reply_queue if backend is not None else None
        if queue is not None:
            messages = [
                replace(message, declare=(*message.declare, queue))
                if message.properties.reply_to == queue.name
                else message
                for message in messages
            ]
        return [as_row(message, self._app.runtime.delays) for message in messages]

    # -- what is said about it

    def settled(self, message: Message, error: BaseException | None = None) -> None:
        """Tell the store of a unique call's key, and send the signal after_task_publish, or with an error task_publish_failed."""
        if TAKEN in message.properties.headers:
            self._app.runtime.claims.settled(message, error)
        self._tell(message, error)

    def _tell(self, message: Message, error: BaseException | None = None) -> None:
        if error is None:
            if signals.after_task_publish.connected:
                signals.after_task_publish.send(**_described(message))
        elif signals.task_publish_failed:
            signals.task_publish_failed.send(exception=error, **_described(message))

    async def _asettled(self, message: Message, error: BaseException | None = None) -> None:
        if TAKEN in message.properties.headers:
            await asyncio.to_thread(self._app.runtime.claims.settled, message, error)
        self._tell(message, error)

    def all_settled(self, messages: Sequence[Message], errors: Sequence[PublishError | None]) -> None:
        """Send the signals about a burst. Raises: the first error."""
        for message, error in zip(messages, errors, strict=True):
            self.settled(message, error)
        failed = next((error for error in errors if error is not None), None)
        if failed is not None:
            raise failed

    def _none_stored(self, messages: Sequence[Message], error: BaseException) -> None:
        for message in messages:
            self.settled(message, error)


def _described(message: Message) -> JsonObject:
    headers = message.properties.headers
    return {
        "sender": headers["task"],
        "body": body_of(message),
        "exchange": message.exchange,
        "routing_key": message.routing_key,
        "headers": headers,
    }


def _stored(messages: Sequence[Message], errors: Sequence[PublishError | None]) -> Sequence[Message]:
    """The messages that the broker has stored."""
    return [message for message, error in zip(messages, errors, strict=True) if error is None]
