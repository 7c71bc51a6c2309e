"""RedisConsumer: queues over one connection on a worker's loop. What it takes stays its own for as long as it renews its lease.

Taking is one script: pop, and note who holds it until when (scripts.RESERVE). When nothing is there, the consumer has Redis
watch the lists (CLIENT TRACKING): Redis says when one changes, whoever writes to it, and keeps nothing else for that. So an idle
worker asks nothing, and no message is on its way where nobody has noted it.

A lost connection is no lost delivery: the consumer goes on with what it holds over the next one. What a dead worker held goes
back when its lease is over: every consumer looks for that.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import AccessRefused, OperationalError, PublishError
from amqtask.ground.printable import bounded_logger, clause, count
from amqtask.protocol.entities import Declaration, Queue
from amqtask.protocol.message import DELIVERY_LIMIT, REJECTED
from amqtask.topology.declarations import consumption
from amqtask.transport.redis.answers import (
    FAILURE,
    LOST,
    MOST_ANSWERS,
    NEVER_CAME,
    NO_FAILURE,
    Answers,
    Consumed,
    Held,
    Replacement,
)
from amqtask.transport.redis.layout import LEASE_ALONE_SECONDS, OWN_SECONDS, Outgoing, incoming, owner
from amqtask.transport.redis.link import Connect, LinkOwner, Timers
from amqtask.transport.redis.publishing import Declared, prepare, publish_error
from amqtask.transport.redis.scripts import DISOWN, LEAVE, OWN, RENEW
from amqtask.transport.redis.taking import Housekeeping, Taking
from amqtask.transport.redis.wire import Push, ReplyError, ignore_reply

if TYPE_CHECKING:
    from amqtask.protocol.message import Delivery, Message
    from amqtask.transport.contract import ConsumerListener

logger = bounded_logger("amqtask.transport")
# Seconds between two attempts to declare what Redis refused.
RETRY_SECONDS = 0.5


class RedisConsumer(LinkOwner):
    """See amqtask.transport.contract.Consumer."""

    def __init__(self, connect: Connect, listener: ConsumerListener, *, no_ack: bool = False) -> None:
        self._link = connect(self)
        self._layout, self._loop = self._link.layout, self._link.loop
        self._listener = listener
        self._no_ack = no_ack
        self._declared = Declared(self._layout, listener.on_warning)
        self._housekeeping = Housekeeping(self._link, listener.on_warning, self._renew)
        # By which Redis knows it.
        self._id = uuid.uuid4().hex
        self._timers = Timers(self._loop)
        self._taking = Taking(self._link, self._timers, self._id, self)
        self._answers = Answers(
            self._link,
            self._timers,
            self._id,
            self._declared,
            on_sent=self._taking.take,
            complain=self.complain,
        )
        # The number of the last delivery.
        self._number = 0
        self._epoch = 0
        self._queues: dict[str, Consumed] = {}
        self._held: dict[int, Held] = {}
        self._is_consuming = self._is_paused = self._is_stopped = False
        self._complaint = ""

    # -- the contract

    @property
    def host(self) -> str:
        """None that could be left for another one."""
        return ""

    @property
    def epoch(self) -> int:
        """It stays the same over lost connections."""
        return self._epoch

    @property
    def is_consuming(self) -> bool:
        """Whether all queues are being consumed."""
        return self._is_consuming and not self._is_paused

    def start(self) -> None:
        """Connect."""
        self._is_stopped = False
        self._link.start()

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
        self._queues[queue.name] = Consumed(queue, plan, prefetch, self._layout.pattern(queue))
        self._set_up_soon()

    def cancel_queue(self, name: str) -> None:
        """Stop deliveries of one queue."""
        consumed = self._queues.pop(name, None)
        if consumed is not None:
            self._unsubscribe(consumed)

    def set_prefetch(self, queue: str, prefetch: int) -> None:
        """How many messages of a queue may be unanswered."""
        consumed = self._queues.get(queue)
        if consumed is not None:
            consumed.prefetch = prefetch
            self._taking.take_soon()

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """It is done. There is room for more then, which is asked for with the answers of this turn."""
        self._answers.ack([held.tag for held in self._settled(tag, multiple=multiple) if held.is_stored])

    def reject(self, tag: int, *, requeue: bool) -> None:
        """Give it back as a failed delivery, or dead-letter it."""
        for held in self._settled(tag):
            limit = held.consumed.delivery_limit
            if not requeue:
                self._answers.bury(held, REJECTED)
            elif limit is not None and held.failures >= limit:
                self._answers.bury(held, DELIVERY_LIMIT)
            else:
                self._give_back(held, FAILURE)

    def nack(self, tag: int, *, requeue: bool = True) -> None:
        """Give it back without blame, or dead-letter it."""
        for held in self._settled(tag):
            if requeue:
                self._give_back(held, NO_FAILURE)
            else:
                self._answers.bury(held, REJECTED)

    def replace(self, delivery: Delivery, messages: Sequence[Message], on_done: Callable[[bool], None]) -> bool:
        """In one script. What came off a channel is not stored, and needs no answer; what others have now is theirs to follow."""
        held = self._held.get(delivery.tag) if delivery.epoch == self._epoch else None

        def done(is_done: bool) -> None:
            if is_done:
                self._settled(delivery.tag)
                self._taking.take_soon()
            on_done(is_done)

        if held is not None and held.is_lost:
            self._loop.call_soon(partial(done, True))
            return True
        leaving = [prepare(message) for message in messages]
        ready = [outgoing for outgoing in leaving if isinstance(outgoing, Outgoing)]
        if held is None or not held.is_stored or len(ready) < len(leaving) or len(ready) > MOST_ANSWERS:
            return False
        self._answers.replace(Replacement(held.tag, ready, done))
        return True

    def pause(self) -> None:
        """Take no more."""
        self._is_paused = True
        for consumed in self._queues.values():
            self._unsubscribe(consumed)

    def resume(self) -> None:
        """Take again."""
        self._is_paused = False
        self._set_up_soon()

    def leave(self, reason: str) -> None:
        """Nothing: there is one server at a time, and the link finds it."""

    def go_to(self, host: str, reason: str) -> None:
        """Nothing, as `leave`."""

    def stop(self, *, on_stopped: Callable[[], None] | None = None) -> None:
        """Send the answers, give back what is unanswered, disconnect."""
        self._is_stopped, self._is_consuming = True, False
        self._timers.stop()
        self._housekeeping.stop()
        self._taking.finish(partial(self._stop, on_stopped))

    def _stop(self, on_stopped: Callable[[], None] | None, on_the_way: list[tuple[int, bytes]]) -> None:
        if self._link.is_open:
            held = [(held.tag, NO_FAILURE) for held in self._held.values() if held.is_stored]
            self._held.clear()
            self._answers.give_back_all([*held, *((tag, _blame(failed)) for tag, failed in on_the_way)])
            sole_queues = [
                name for name, consumed in self._queues.items() if consumed.is_alone or consumed.is_exclusive
            ]
            if sole_queues:
                self._link.run(ignore_reply, LEAVE, self._id, *sole_queues)
            owned = self._owned_by(self._queues.values())
            if owned:
                self._link.run(ignore_reply, DISOWN, *owned)
        self._link.stop(on_stopped)

    def _owned_by(self, queues: Iterable[Consumed]) -> list[str]:
        """What goes with its last consumer."""
        return [
            owner(consumed.queue.name, self._id, consumed.declare)
            for consumed in queues
            if (consumed.queue.exclusive or consumed.queue.auto_delete) and consumed.pattern is None
        ]

    # -- the link's events

    def on_open(self) -> None:
        """Log in is done: declare, and take."""
        self._complaint = ""
        self._declared.forget_all()
        self._taking.opened()
        for consumed in self._queues.values():
            consumed.is_set_up = False
        if self._no_ack:
            self._renew()
        else:
            self._housekeeping.start()  # renews, too
        self._answers.send()
        self._set_up()

    def on_lost(self, error: Exception) -> None:
        """What is held stays held."""
        self._taking.lost()
        self._listener.on_warning(
            f"the connection to Redis at {self._link.server} was lost ({clause(str(error))}). What this worker holds stays "
            f"its own for {self._lease:g} s. Connecting again."
        )

    def on_unreachable(self, error: PublishError) -> None:
        """Another attempt follows."""
        if isinstance(error, AccessRefused) and not self._is_consuming:
            self._fail(error)
        else:
            self.complain(f"{error} Trying again.")

    def on_push(self, push: Push) -> None:
        """A list has changed, or a message was published."""
        push_type, *fields = push.fields
        if push_type == b"invalidate":
            self._housekeeping.changed(fields[0])
            self._taking.changed(fields[0])
        elif push_type == b"pmessage":
            self._published(fields[0].decode(), fields[2])

    def _fail(self, error: Exception) -> None:
        self._is_stopped = True
        self._link.stop()
        self._listener.on_fatal(error)

    # -- setting up

    def _set_up_soon(self) -> None:
        if self._link.is_open:
            self._loop.call_soon(self._set_up)

    def _set_up(self) -> None:
        """Declare and subscribe what is not set up over this connection."""
        if self._is_stopped or not self._link.is_open:
            return
        missing = [] if self._is_paused else [consumed for consumed in self._queues.values() if not consumed.is_set_up]
        for consumed in missing:
            consumed.is_set_up = True
            try:
                commands = self._declared.missing(consumed.declare)
            except PublishError as error:
                self._fail(OperationalError(str(error)))
                return
            for command, on_reply in commands:
                self._link.send(partial(self._declared_one, consumed, on_reply), *command)
            self._own(consumed)
            if consumed.pattern is not None:
                self._link.send(partial(self._declared_one, consumed, ignore_reply), "PSUBSCRIBE", consumed.pattern)
            if consumed.is_exclusive:
                key, lease = self._layout.key(f"amqtask.active.{consumed.queue.name}"), int(self._lease * 1000)
                claimed = partial(self._declared_one, consumed, ignore_reply)
                self._link.send(claimed, "SET", key, self._id, "NX", "PX", lease)
                self._link.send(partial(self._declared_one, consumed, partial(self._owned, consumed)), "GET", key)
        self._link.send(self._set_up_is_done, "PING")

    def _own(self, *consumed: Consumed) -> None:
        owned = self._owned_by(consumed)
        if owned:
            self._link.run(ignore_reply, OWN, OWN_SECONDS, *owned)

    def _declared_one(self, consumed: Consumed, on_reply: Callable[[Any], None], reply: Any) -> None:
        if isinstance(reply, ReplyError):
            consumed.is_set_up = False
            error = publish_error(reply, self._link.server)
            if isinstance(error, AccessRefused):
                self._fail(error)
            else:
                self.complain(str(error))
                self._timers.later("set up", RETRY_SECONDS, self._set_up)
        elif not isinstance(reply, ConnectionError):
            on_reply(reply)

    def _owned(self, consumed: Consumed, owner: Any) -> None:
        if consumed.is_set_up and owner != self._id.encode():
            name = consumed.queue.name
            self._fail(
                OperationalError(f"queue {name!r} cannot be consumed: it is exclusive, and another consumer has it")
            )

    def _set_up_is_done(self, reply: Any) -> None:
        if self._is_stopped or isinstance(reply, ConnectionError):
            return
        if isinstance(reply, ReplyError):  # a user who may not even do this, to whom nothing is said otherwise
            self.complain(str(publish_error(reply, self._link.server)))
            self._timers.later("set up", RETRY_SECONDS, self._set_up)
            return
        if not self._is_consuming:
            self._is_consuming = True
            self._epoch = max(1, self._epoch)
            self._listener.on_consuming(self._epoch)
        self._taking.take()

    def _unsubscribe(self, consumed: Consumed) -> None:
        if consumed.pattern is not None and consumed.is_set_up:
            consumed.is_set_up = False
            if self._link.is_open:
                self._link.send(ignore_reply, "PUNSUBSCRIBE", consumed.pattern)

    # -- what comes

    @property
    def takes(self) -> bool:
        """Whether it wants messages now."""
        return self.is_consuming and not self._is_stopped

    @property
    def lists(self) -> list[Consumed]:
        """The queues that are no channels, and set up."""
        return [consumed for consumed in self._queues.values() if consumed.pattern is None and consumed.is_set_up]

    @property
    def lease(self) -> float | str:
        """Seconds for which a message is its own; "" without acks."""
        return "" if self._no_ack else self._lease

    def received(self, first: int, queue: str, texts: Sequence[bytes], failed: bytes) -> None:
        """Messages off a list."""
        consumed = self._queues.get(queue)
        if consumed is None or self._is_paused or self._is_stopped:  # since they were asked for
            if not self._no_ack:
                for tag in reversed(range(first, first + len(texts))):
                    self._answers.give_back(tag, _blame(failed))
            return
        failures = int(failed or 0)
        limit = None if self._no_ack else consumed.delivery_limit
        is_over = limit is not None and failures > limit
        for tag, text in enumerate(texts, first):
            message = incoming(text)
            held = Held(consumed, message, failures, tag)
            if is_over:
                self._answers.bury(held, DELIVERY_LIMIT)
            else:
                self._deliver(held, is_again=bool(failed) or message.redelivered)

    def _published(self, pattern: str, text: bytes) -> None:
        """A message off a channel: it is nowhere else."""
        consumed = next((candidate for candidate in self._queues.values() if candidate.pattern == pattern), None)
        if consumed is not None and not self._is_paused and not self._is_stopped:
            self._deliver(Held(consumed, incoming(text), 0, 0), is_again=False)

    def _deliver(self, held: Held, *, is_again: bool) -> None:
        self._number += 1
        if not self._no_ack:
            held.consumed.held += 1
            self._held[self._number] = held
        delivery = held.message.delivery(
            held.consumed.queue.name, self._number, failures=held.failures, is_again=is_again, epoch=self._epoch
        )
        try:
            self._listener.on_delivery(delivery)
        except Exception:  # as over AMQP: it must not end the loop
            logger.exception("a message on %s could not be handled", held.consumed.queue.name)

    def deleted(self, queue: str) -> None:
        """An operator has deleted a queue: it is declared again."""
        consumed = self._queues.get(queue)
        if consumed is not None and not consumed.queue.passive and not self._is_stopped:
            consumed.is_set_up = False
            self._declared.forget(consumed.declare)
            self._listener.on_cancelled(queue, "it was deleted")
            self._set_up_soon()

    # -- answers

    def _settled(self, number: int, *, multiple: bool = False) -> list[Held]:
        """Forget these; those of them that are still its own need an answer."""
        numbers = [other for other in self._held if other <= number] if multiple else [number]
        settled = [self._held.pop(other) for other in numbers if other in self._held]
        for held in settled:
            held.consumed.held -= 1
        return [held for held in settled if not held.is_lost]

    def _give_back(self, held: Held, failures: int) -> None:
        if held.is_stored:
            self._answers.give_back(held.tag, failures)
        else:  # it is nowhere else: it comes again at once
            redelivery = held._replace(failures=held.failures + failures)
            self._loop.call_soon(lambda: self._deliver(redelivery, is_again=True))

    # -- the lease

    def _renew(self) -> None:
        self._timers.later("renew", self._lease / 3, self._renew)
        if not self._link.is_open:
            return
        sole_queues = [
            consumed.queue.name
            for consumed in self.lists
            if consumed.is_exclusive or (consumed.is_alone and consumed.held)
        ]
        self._own(*self.lists)
        tags = [held.tag for held in self._held.values() if held.is_stored]
        for start in range(0, max(len(tags), len(sole_queues)), MOST_ANSWERS):
            batch = tags[start : start + MOST_ANSWERS]
            self._link.run(self._renewed, RENEW, self._id, self._lease, len(sole_queues), *sole_queues, *batch)

    @property
    def _lease(self) -> float:
        return LEASE_ALONE_SECONDS if self._has_own else self._layout.lease

    @property
    def _has_own(self) -> bool:
        return any(consumed.is_alone or consumed.is_exclusive for consumed in self._queues.values())

    @property
    def sole_right(self) -> tuple[str, str] | None:
        """The queue that it has alone and what it is called, for as long as it believes so."""
        queue = next((name for name, consumed in self._queues.items() if consumed.is_alone and consumed.held), None)
        return None if queue is None else (queue, self._id)

    def _renewed(self, reply: Any) -> None:
        if isinstance(reply, Exception) or self._is_stopped:
            return
        tags = {int(tag) for tag in reply[0]} - self._answers.replacing
        lost = [number for number, held in self._held.items() if held.tag in tags]
        for number in lost:
            self._held[number] = self._held[number]._replace(tag=LOST)
        if lost or reply[1]:  # a queue that it had alone
            self._lost(len(lost))

    def _lost(self, number: int) -> None:
        """The lease was over before it was renewed, or Redis has forgotten: others have these messages now."""
        error = TimeoutError("its lease was over before it was renewed: another consumer may have it now")
        if self._has_own:
            self._answers.give_back_all((held.tag, NO_FAILURE) for held in self._held.values() if held.is_stored)
            self._held.clear()
            for consumed in self._queues.values():
                consumed.held = 0
            self._epoch += 1
            self._listener.on_connection_lost(error)
            self._listener.on_consuming(self._epoch)
            return
        self.complain(
            f"{count(number, 'message')} went to other workers, because this one did not renew its hold on them for "
            f"{self._lease:g} s; their tasks may run twice"
        )

    def complain(self, text: str) -> None:
        """Once for what goes on."""
        if text != self._complaint:
            self._complaint = text
            self._listener.on_warning(text)


def _blame(failed: bytes) -> int:
    """Whether a message that was taken and not delivered was delivered before."""
    return NO_FAILURE if failed else NEVER_CAME
