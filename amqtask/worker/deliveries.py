"""The deliveries of a worker and their answers: each gets exactly one of ack, reject or nack, on the channel that it came on.

This page has all that an answer needs: the open tags of the present channel (the ledger), the channel's epoch, the requests that
are acked before they run, and the memory of deliveries whose channel was lost. Nothing else answers the broker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NoReturn

from amqtask.execution.request import Answer
from amqtask.worker.chain_steps import delivered
from amqtask.worker.ledger import Ledger

if TYPE_CHECKING:
    from amqtask.execution.request import Request
    from amqtask.protocol.message import Delivery
    from amqtask.transport.contract import Consumer
    from amqtask.worker.redeliveries import Redeliveries

# The epoch of no channel: no delivery has it.
NO_EPOCH = -1


class Deliveries:
    """Answers deliveries. When their channel is lost, `unanswered` returns the requests that go on and those that had not begun;
    `changed` is called after each answer."""

    def __init__(
        self,
        consumer: Consumer,
        redeliveries: Redeliveries,
        *,
        unanswered: Callable[[], tuple[list[Request], list[Request]]],
        changed: Callable[[], None],
    ) -> None:
        self._consumer = consumer
        self._redeliveries = redeliveries
        self._unanswered = unanswered
        self._changed = changed
        self._ledger = Ledger(NO_EPOCH)
        # The numbers of requests of tasks that must run at most once: acked before the run.
        self.acks_early: set[int] = set()

    def came(self, delivery: Delivery) -> None:
        """A delivery came; from now on it needs an answer."""
        if delivery.epoch != self._ledger.epoch:
            self.begin(delivery.epoch)
        self._ledger.add(delivery.tag)

    def is_present(self, request: Request) -> bool:
        """Whether the channel that it came on is still open."""
        return bool(request.delivery.epoch == self._ledger.epoch)

    @property
    def outstanding(self) -> int:
        """How many deliveries have no answer yet."""
        return self._ledger.outstanding

    # -- answers

    def ack_early(self, request: Request) -> None:
        """Ack before the run, for a task that must run at most once."""
        delivery = request.delivery
        if delivery.epoch == self._ledger.epoch:
            self._ledger.drop(delivery.tag)
            self._consumer.ack(delivery.tag)

    def ack(self, requests: Sequence[Request]) -> None:
        """The answer of most: their outcomes publish nothing."""
        self.look_at_channel()
        epoch, finish, acked = self._ledger.epoch, self._ledger.finish, self._redeliveries.acked
        for request in requests:
            delivery = request.delivery
            if delivery.epoch == epoch and not self.acks_early and request.first is None:
                finish(delivery.tag)
                acked(request.headers)
            else:
                self.answer(request, Answer.ACK)

    def answer(self, request: Request, answer: Answer) -> None:
        """The end of a delivery: all messages of its outcome have been confirmed. Acks go out with the next `flush`."""
        self.look_at_channel()
        delivery, ledger = request.delivery, self._ledger
        if delivery.epoch != ledger.epoch:
            # Its channel is gone, so it cannot be answered; its redelivery will get this answer.
            self.acks_early.discard(request.number)
            for parked in self._redeliveries.ended(delivered(request), answer):
                self.answer(parked, answer)
        elif not ledger.is_open(delivery.tag):  # it was acked early
            self.acks_early.discard(request.number)
        else:
            self._tell_broker(delivery.tag, answer)
            if self.acks_early:
                self.acks_early.discard(request.number)
            if answer is not Answer.REQUEUE:
                self._redeliveries.acked(delivered(request).headers)
        self._changed()

    def _tell_broker(self, tag: int, answer: Answer) -> None:
        match answer:
            case Answer.ACK | Answer.DEAD_LETTER:  # the dead letter has been confirmed
                self._ledger.finish(tag)
            case Answer.REQUEUE:
                self._ledger.drop(tag)
                self._consumer.reject(tag, requeue=True)
            case Answer.DROP:
                self._ledger.drop(tag)
                self._consumer.reject(tag, requeue=False)
            case _:
                _never(answer)

    def give_back(self, requests: Iterable[Request]) -> None:
        """Requeue requests that have not run, but for those that were acked early."""
        for request in requests:
            self.give_back_delivery(request.delivery)
            self.acks_early.discard(request.number)

    def give_back_delivery(self, delivery: Delivery) -> None:
        """With nack, not reject: on RabbitMQ 4.3 that does not count as a failed delivery."""
        self.look_at_channel()
        if delivery.epoch == self._ledger.epoch and self._ledger.is_open(delivery.tag):
            self._ledger.drop(delivery.tag)
            self._consumer.nack(delivery.tag, requeue=True)

    def flush(self) -> None:
        """Send the acks of finished deliveries."""
        self.look_at_channel()
        acks = self._ledger.flush()
        if acks.upto:
            self._consumer.ack(acks.upto, multiple=True)
        for tag in acks.singles:
            self._consumer.ack(tag)

    # -- the channel

    def look_at_channel(self) -> None:
        """A channel may be gone before its event comes; its tags must not be answered on the next channel."""
        if self._consumer.epoch != self._ledger.epoch:
            self.begin(self._consumer.epoch)

    def begin(self, epoch: int) -> None:
        """Deliveries of the old channel are void: waiting requests are dropped, running ones become orphans."""
        if epoch == self._ledger.epoch:
            return
        alive, waiting = self._unanswered()
        orphans = [delivered(request) for request in alive if self.is_present(request)]
        self.acks_early.difference_update([request.number for request in waiting])
        self._redeliveries.adopt(orphans, [delivered(request) for request in waiting])
        self._ledger.begin(epoch)


def _never(value: NoReturn) -> NoReturn:
    raise AssertionError(f"unhandled: {value!r}")
