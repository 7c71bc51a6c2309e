"""MemoryConsumer: the consumer's contract on a MemoryBroker, with reconnects and epochs like pika's."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from amqtask.exceptions import OperationalError
from amqtask.ground.printable import clause
from amqtask.protocol.entities import Declaration, Queue
from amqtask.protocol.message import Delivery
from amqtask.topology.declarations import consumption
from amqtask.transport.contract import ConsumerListener
from amqtask.transport.memory.broker import MemoryBroker
from amqtask.transport.memory.publisher import DeclarationRefused, Warnings, declare_all
from amqtask.transport.memory.refusals import Refused
from amqtask.transport.memory.session import Delivered, Session
from amqtask.transport.names import entity_name

if TYPE_CHECKING:
    from amqtask.ground.loop import Loop, Timer

RETRY_PAUSE = 0.05


@dataclass(slots=True)
class _Consumed:
    queue: Queue
    declare: tuple[Declaration, ...]
    prefetch: int
    tags: list[str] = field(default_factory=list)


class MemoryConsumer:
    """See amqtask.transport.contract.Consumer; runs on the loop's thread, except the broker's callbacks."""

    def __init__(self, broker: MemoryBroker, loop: Loop, listener: ConsumerListener, *, no_ack: bool = False) -> None:
        self._broker = broker
        self._loop = loop
        self._listener = listener
        self._no_ack = no_ack
        self._warn = Warnings(listener.on_warning)
        self._session: Session | None = None
        self._queues: dict[str, _Consumed] = {}
        self._epoch = 0
        self._tag_number = 0
        self._is_paused = False
        self._is_consuming = False
        self._is_stopped = False
        self._timer: Timer | None = None
        # Deliveries that the loop has not taken yet.
        self._inbox: deque[tuple[int, Delivered]] = deque()

    # -- the contract

    @property
    def epoch(self) -> int:
        """The number of the present channel."""
        return self._epoch

    @property
    def is_consuming(self) -> bool:
        """Whether all queues are being consumed."""
        return self._is_consuming and not self._is_paused

    def start(self) -> None:
        """Connect in the next turn."""
        self._is_stopped = False
        self._broker.drive(self._loop)
        self._loop.call_soon(self._connect)

    def add_queue(
        self,
        queue: Queue,
        *,
        prefetch: int,
        dead_letter: Queue | None = None,
        declare: tuple[Declaration, ...] | None = None,
    ) -> None:
        """Consume one more queue; `declare` (default: the queue, its dead-letter queue and its bindings) is declared first."""
        plan = consumption(queue, dead_letter) if declare is None else declare
        self._queues[queue.name] = _Consumed(queue, plan, prefetch)
        self._set_up_soon()

    def cancel_queue(self, name: str) -> None:
        """Stop deliveries of one queue."""
        consumed = self._queues.pop(name, None)
        if consumed is not None:
            self._cancel(consumed, list(consumed.tags))

    def set_prefetch(self, queue: str, prefetch: int) -> None:
        """Change the window with another subscriber, as over AMQP: to grow, it gets the difference; to shrink, it replaces the
        others."""
        consumed = self._queues.get(queue)
        if consumed is None or consumed.prefetch == prefetch:
            return
        before, consumed.prefetch = consumed.prefetch, prefetch
        if consumed.tags and self._session is not None and not self._is_paused:
            old = list(consumed.tags)
            if prefetch > before:
                self._consume(self._session, consumed, prefetch - before)
            else:
                self._consume(self._session, consumed, prefetch)
                self._cancel(consumed, old)

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """basic.ack."""
        self._answer(lambda session: session.ack(tag, multiple=multiple))

    def reject(self, tag: int, *, requeue: bool) -> None:
        """basic.reject."""
        self._answer(lambda session: session.reject(tag, requeue=requeue))

    def nack(self, tag: int, *, requeue: bool = True) -> None:
        """basic.nack."""
        self._answer(lambda session: session.nack(tag, requeue=requeue))

    def pause(self) -> None:
        """No more deliveries; the channel stays for answers."""
        self._is_paused = True
        for consumed in self._queues.values():
            self._cancel(consumed, list(consumed.tags))

    def resume(self) -> None:
        """Deliveries again."""
        self._is_paused = False
        self._set_up_soon()

    def stop(self, *, on_stopped: Callable[[], None] | None = None) -> None:
        """Close; unanswered deliveries go back to their queues."""
        self._is_stopped, self._is_consuming = True, False
        self._broker.drive(None)
        if self._timer is not None:
            self._timer.cancel()
        session, self._session = self._session, None
        if session is not None:
            session.close()
        self._inbox.clear()
        if on_stopped is not None:
            self._loop.call_soon(on_stopped)

    # -- connecting

    def _connect(self) -> None:
        self._timer = None
        if self._is_stopped or self._session is not None:
            return
        try:
            session = self._broker.connect(lambda error: self._loop.call_soon_threadsafe(lambda: self._lost(error)))
        except ConnectionRefusedError as error:
            self._listener.on_warning(f"{clause(error)}. Trying again.")
            self._connect_later()
            return
        self._session = session
        self._epoch += 1
        self._set_up()

    def _connect_later(self) -> None:
        self._timer = self._loop.call_later(RETRY_PAUSE, self._connect)

    def _lost(self, error: Exception) -> None:
        if self._session is None or self._session.is_open:
            return
        self._session = None
        self._is_consuming = False
        self._epoch += 1
        self._inbox.clear()
        for consumed in self._queues.values():
            consumed.tags.clear()
        self._listener.on_connection_lost(error)
        self._connect_later()

    # -- consuming

    def _set_up_soon(self) -> None:
        if self._session is not None:
            self._loop.call_soon(self._set_up)

    def _set_up(self) -> None:
        session = self._session
        if session is None or not session.is_open:
            return
        missing = [] if self._is_paused else [consumed for consumed in self._queues.values() if not consumed.tags]
        try:
            for consumed in missing:
                declare_all(self._broker, consumed.declare, self._warn, session)
            for consumed in missing:
                self._consume(session, consumed, consumed.prefetch)
        except (DeclarationRefused, Refused) as error:
            self._refused(session, error)
            return
        if not self._is_consuming:
            self._is_consuming = True
            self._listener.on_consuming(self._epoch)

    def _refused(self, session: Session, error: DeclarationRefused | Refused) -> None:
        self._session = None
        session.close()
        if isinstance(error, DeclarationRefused):
            subject, text = entity_name(error.entity), error.refused.reply_text
        else:
            subject, text = "a queue", error.reply_text
        self._listener.on_fatal(OperationalError(f"{subject} cannot be consumed: {text}"))

    def _consume(self, session: Session, consumed: _Consumed, prefetch: int) -> None:
        self._tag_number += 1
        tag = f"amqtask-{self._tag_number}"
        consumed.tags.append(tag)
        epoch = self._epoch
        session.consume(
            consumed.queue.name,
            tag,
            lambda delivered: self._received(epoch, delivered),
            lambda tag: self._loop.call_soon_threadsafe(lambda: self._cancelled(epoch, tag)),
            prefetch=prefetch,
            no_ack=self._no_ack,
        )

    def _cancel(self, consumed: _Consumed, tags: list[str]) -> None:
        for tag in tags:
            consumed.tags.remove(tag)
            if self._session is not None:
                self._session.cancel(tag)

    def _cancelled(self, epoch: int, tag: str) -> None:
        if epoch != self._epoch:
            return
        for name, consumed in self._queues.items():
            if tag in consumed.tags:
                consumed.tags.remove(tag)
                self._listener.on_cancelled(name, "cancelled by the broker")
        self._set_up_soon()

    # -- deliveries and answers

    def _received(self, epoch: int, delivered: Delivered) -> None:
        """Under the broker's lock, from any thread."""
        self._inbox.append((epoch, delivered))
        if len(self._inbox) == 1:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        while self._inbox:
            epoch, delivered = self._inbox.popleft()
            if epoch != self._epoch:
                continue
            stored = delivered.stored
            self._listener.on_delivery(
                Delivery(
                    stored.body,
                    delivered.properties,
                    stored.exchange,
                    stored.routing_key,
                    delivered.redelivered,
                    delivered.queue,
                    delivered.tag,
                    epoch,
                )
            )

    def _answer(self, answer: Callable[[Session], None]) -> None:
        session = self._session
        if session is None or not session.is_open:
            return  # the broker has requeued it
        try:
            answer(session)
        except Refused as error:
            session.lose(error)
