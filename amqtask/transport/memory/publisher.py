"""MemoryPublisher and MemoryLoopPublisher: the publishers' contracts on a MemoryBroker; confirms come at once."""

from __future__ import annotations

import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from amqtask.exceptions import BrokerUnreachable, ConnectionBlocked, PublishError
from amqtask.protocol.entities import Binding, Declaration
from amqtask.protocol.message import Message
from amqtask.topology.declarations import describe_difference
from amqtask.transport.errors import PRECONDITION_FAILED, channel_error, declare_error, refused, unroutable
from amqtask.transport.memory.broker import MemoryBroker, Verdict
from amqtask.transport.memory.refusals import Refused
from amqtask.transport.names import entity_name

if TYPE_CHECKING:
    from amqtask.ground.loop import Loop

OnDone = Callable[["PublishError | None"], None]
RETRY_PAUSE = 0.05


def declare_all(
    broker: MemoryBroker, entities: Sequence[Declaration], warn: Callable[[str], None], session: object = None
) -> None:
    """Declare in order; an entity that exists with other arguments is used as it is. Raises: Refused."""
    for entity in entities:
        try:
            broker.declare(entity, session)
        except Refused as error:
            if error.reply_code != PRECONDITION_FAILED or isinstance(entity, Binding):
                raise DeclarationRefused(entity, error) from error
            try:
                broker.declare(entity, session, passive=True)
            except Refused:
                raise DeclarationRefused(entity, error) from error
            warn(describe_difference(entity, error.reply_text))


class DeclarationRefused(Exception):
    """The broker refuses to declare an entity."""

    def __init__(self, entity: Declaration, refused: Refused) -> None:
        super().__init__(str(refused))
        self.entity = entity
        self.refused = refused


def publish_now(broker: MemoryBroker, message: Message, warn: Callable[[str], None]) -> PublishError | None:
    """Declare the message's entities and publish it; the error, or None when it is stored."""
    try:
        declare_all(broker, message.declare, warn)
        verdict = broker.publish(message)
    except DeclarationRefused as error:
        return declare_error(entity_name(error.entity), error.refused)
    except Refused as error:
        return channel_error(error, message)
    except PublishError as error:
        return error
    if verdict is Verdict.RETURNED:
        return unroutable(message)
    return refused(message) if verdict is Verdict.REFUSED else None


class Warnings:
    """Gives each warning once, like a publisher that remembers what it declared."""

    def __init__(self, warn: Callable[[str], None]) -> None:
        self._warn = warn
        self._warned: set[str] = set()

    def __call__(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=6)


class MemoryPublisher:
    """See amqtask.transport.contract.Publisher."""

    def __init__(
        self,
        broker: MemoryBroker,
        *,
        timeout: float | None = 5.0,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self._broker = broker
        self._timeout = timeout
        self._warn = Warnings(on_warning or _warn)

    def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish; raises the named error of what went wrong."""
        error = self.publish_many((message,), timeout=timeout)[0]
        if error is not None:
            raise error

    def publish_many(self, messages: Sequence[Message], *, timeout: float | None = None) -> list[PublishError | None]:
        """One entry per message, None for a stored one."""
        seconds = self._timeout if timeout is None else timeout
        deadline = None if seconds is None else time.monotonic() + seconds
        errors: list[PublishError | None] = []
        for message in messages:
            error = self._wait_for_broker(deadline)
            errors.append(error or publish_now(self._broker, message, self._warn))
        return errors

    def declare(self, entities: Sequence[Declaration], *, timeout: float | None = None) -> None:
        """Declare now. Raises: PublishError."""
        try:
            declare_all(self._broker, entities, self._warn)
        except DeclarationRefused as error:
            raise declare_error(entity_name(error.entity), error.refused) from error

    def close(self) -> None:
        """Nothing to close."""

    def _wait_for_broker(self, deadline: float | None) -> PublishError | None:
        broker = self._broker
        with broker.changed:
            seconds_left = None if deadline is None else max(0.0, deadline - time.monotonic())
            if broker.changed.wait_for(lambda: broker.is_up and broker.blocked_reason is None, seconds_left):
                return None
            if not broker.is_up:
                return BrokerUnreachable("the in-memory broker is stopped")
            return ConnectionBlocked(f"the in-memory broker blocks publishing: {broker.blocked_reason}")


class MemoryEventPublisher:
    """See amqtask.transport.contract.EventPublisher."""

    def __init__(self, broker: MemoryBroker, *, on_warning: Callable[[str], None] = lambda text: None) -> None:
        self._broker = broker
        self._warn = Warnings(on_warning)

    def publish(self, messages: Sequence[Message]) -> None:
        """Publish these messages, or drop them."""
        if self._broker.is_up and self._broker.blocked_reason is None:
            for message in messages:
                publish_now(self._broker, message, self._warn)

    def close(self) -> None:
        """Nothing to close."""


class MemoryAsyncPublisher:
    """See amqtask.transport.contract.AsyncPublisher; waits for nothing but a broker that is down or blocked."""

    def __init__(
        self,
        broker: MemoryBroker,
        *,
        timeout: float | None = 5.0,
        on_warning: Callable[[str], None] | None = None,
    ) -> None:
        self._publisher = MemoryPublisher(broker, timeout=timeout, on_warning=on_warning)

    async def connect(self, *, timeout: float | None = None) -> None:
        """Nothing to connect."""

    async def publish(self, message: Message, *, timeout: float | None = None) -> None:
        """Publish; raises the named error of what went wrong."""
        self._publisher.publish(message, timeout=timeout)

    async def publish_many(
        self, messages: Sequence[Message], *, timeout: float | None = None
    ) -> list[PublishError | None]:
        """One entry per message, None for a stored one."""
        return self._publisher.publish_many(messages, timeout=timeout)

    async def close(self) -> None:
        """Nothing to close."""


class MemoryLoopPublisher:
    """See amqtask.transport.contract.LoopPublisher."""

    def __init__(
        self, broker: MemoryBroker, loop: Loop, *, on_warning: Callable[[str], None] = lambda text: None
    ) -> None:
        self._broker = broker
        self._loop = loop
        self._warn = Warnings(on_warning)
        self._waiting: deque[tuple[Message, OnDone]] = deque()
        self._confirmed: list[tuple[OnDone, PublishError | None]] = []
        self._is_due = False
        self._is_stopped = False

    @property
    def outstanding(self) -> int:
        """How many messages are not confirmed yet."""
        return len(self._waiting) + len(self._confirmed)

    @property
    def oldest(self) -> Message | None:
        """The message that waits longest, while the broker could take it."""
        is_able = self._broker.is_up and self._broker.blocked_reason is None
        return self._waiting[0][0] if self._waiting and is_able else None

    def start(self) -> None:
        """Nothing to connect."""
        self._is_stopped = False

    def publish(self, message: Message, on_done: OnDone) -> None:
        """Publish at the end of this turn, in order; `on_done` comes in a later one."""
        self._waiting.append((message, on_done))
        self._flush_soon()

    def stop(self) -> None:
        """Publish the waiting messages, if the broker takes them; their callbacks are not called any more."""
        self._publish_waiting()
        self._is_stopped = True

    def _flush_soon(self) -> None:
        if not self._is_due:
            self._is_due = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._is_due = False
        if self._is_stopped:
            return
        if not self._broker.is_up or self._broker.blocked_reason is not None:
            self._loop.call_later(RETRY_PAUSE, self._flush_soon)
            return
        self._publish_waiting()
        self._loop.call_soon(self._confirm)

    def _publish_waiting(self) -> None:
        while self._waiting and self._broker.is_up and self._broker.blocked_reason is None:
            message, on_done = self._waiting.popleft()
            self._confirmed.append((on_done, publish_now(self._broker, message, self._warn)))

    def _confirm(self) -> None:
        while self._confirmed:
            on_done, error = self._confirmed.pop(0)
            on_done(error)
