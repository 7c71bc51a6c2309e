"""RedisConsumer: queues over one connection on a worker's loop. What it takes stays its own for as long as it renews its lease.

Taking is one script: pop, and note who holds it until when (scripts.RESERVE). When nothing is there, the consumer has Redis
watch the lists (CLIENT TRACKING): Redis says when one changes, whoever writes to it, and keeps nothing else for that. So an idle
worker asks nothing, and no message is on its way where nobody has noted it.

A lost connection is no lost delivery: the consumer goes on with what it holds over the next one. What a dead worker held goes
back when its lease is over: every consumer looks for that.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import AccessRefused, OperationalError, PublishError
from amqtask.ground.printable import clause
from amqtask.protocol.entities import Binding, Declaration, Queue
from amqtask.protocol.message import Delivery
from amqtask.topology.declarations import consumption
from amqtask.transport.deaths import DELIVERY_LIMIT, REJECTED
from amqtask.transport.redis.batch import Declared
from amqtask.transport.redis.consumed import Consumed, Held, dead_letter
from amqtask.transport.redis.envelope import incoming, with_failures
from amqtask.transport.redis.errors import publish_error
from amqtask.transport.redis.housekeeping import Housekeeping
from amqtask.transport.redis.keys import list_keys
from amqtask.transport.redis.layout import LEASE_ALONE_SECONDS, LEASE_SECONDS, Layout
from amqtask.transport.redis.link import Link
from amqtask.transport.redis.resp import Push, ReplyError
from amqtask.transport.redis.scripts import ACK, BURY, DELETE, GIVE_BACK, LEAVE, PUBLISH, RENEW, RESERVE

if TYPE_CHECKING:
    from amqtask.ground.loop import Timer, TurnLoop
    from amqtask.transport.contract import ConsumerListener
    from amqtask.transport.redis.places import Way

# Messages of one script, and tags of one answer.
MOST_AT_ONCE, MOST_ANSWERS = 200, 1000
# Failures of a message that was not delivered, and of one that is given back without blame.
NEVER_CAME, NO_FAILURE, FAILURE = -1, 0, 1
# Seconds between two attempts at a script that Redis refused, and looks at queues of which Redis has said nothing.
RETRY_SECONDS, LOOK_SECONDS, LOOK_ALONE_SECONDS, LOOK_OFTEN_SECONDS = 0.5, 5.0, 1.0, 0.1


class RedisConsumer:
    """See amqtask.transport.contract.Consumer."""

    def __init__(
        self,
        way: Way,
        layout: Layout,
        loop: TurnLoop,
        listener: ConsumerListener,
        *,
        name: str,
        connect_timeout: float,
        no_ack: bool = False,
    ) -> None:
        self._layout = layout
        self._loop = loop
        self._listener = listener
        self._no_ack = no_ack
        self._declared = Declared(layout, listener.on_warning)
        self._link = Link(way, layout, loop, self, name=name, connect_timeout=connect_timeout)
        self._housekeeping = Housekeeping(self._link, layout, loop, listener.on_warning)
        # By which Redis knows it, and the number of its next delivery.
        self._id = uuid.uuid4().hex
        self._next = 1
        self._epoch = 0
        self._queues: dict[str, Consumed] = {}
        self._held: dict[int, Held] = {}
        # Answers that are not sent, or not confirmed: numbers to ack; (number, failures) to give back.
        self._acks: list[int] = []
        self._returns: list[tuple[int, int]] = []
        self._is_answer_due = self._is_taking = False
        # The queues whose lists are empty, and of which Redis says so when something comes.
        self._watched: set[str] = set()
        self._is_consuming = self._is_paused = self._is_stopped = False
        self._timers: dict[str, Timer] = {}
        # It is being stopped, and waits for what it has asked for.
        self._on_taken: Callable[[], None] | None = None
        # Whether Redis says when a list changes.
        self._is_told = True
        self._complaint = ""

    # -- the contract

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
            self._take_soon()

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        """It is done."""
        for number, held in self._settled(tag, multiple=multiple):
            if held.is_stored:
                self._acks.append(number)
        self._answer_soon()

    def reject(self, tag: int, *, requeue: bool) -> None:
        """Give it back as a failed delivery, or dead-letter it."""
        for number, held in self._settled(tag):
            limit = held.consumed.delivery_limit
            if not requeue:
                self._bury(number, held, REJECTED)
            elif limit is not None and held.failures >= limit:
                self._bury(number, held, DELIVERY_LIMIT)
            else:
                self._give_back(number, held, FAILURE)

    def nack(self, tag: int, *, requeue: bool = True) -> None:
        """Give it back without blame, or dead-letter it."""
        for number, held in self._settled(tag):
            if requeue:
                self._give_back(number, held, NO_FAILURE)
            else:
                self._bury(number, held, REJECTED)

    def pause(self) -> None:
        """Take no more."""
        self._is_paused = True
        for consumed in self._queues.values():
            self._unsubscribe(consumed)

    def resume(self) -> None:
        """Take again."""
        self._is_paused = False
        self._set_up_soon()

    def stop(self, *, on_stopped: Callable[[], None] | None = None) -> None:
        """Send the answers, give back what is unanswered, disconnect."""
        self._is_stopped, self._is_consuming = True, False
        for timer in self._timers.values():
            timer.cancel()
        self._housekeeping.stop()
        if self._is_taking and self._link.is_open:  # what is on its way goes back as well
            self._on_taken = partial(self._stop, on_stopped)
        else:
            self._stop(on_stopped)

    def _stop(self, on_stopped: Callable[[], None] | None) -> None:
        if self._link.is_open:
            # The newest first, so that the oldest is the first again.
            self._returns += [(number, NO_FAILURE) for number, held in self._held.items() if held.is_stored]
            self._returns.sort(reverse=True)
            self._held.clear()
            self._send_answers()
            alone = [name for name, consumed in self._queues.items() if consumed.is_alone]
            if alone:
                self._link.run(_nothing, LEAVE, self._id, *alone)
            for consumed in self._queues.values():
                self._leave(consumed)
        self._link.stop(on_stopped)

    def _leave(self, consumed: Consumed) -> None:
        """A queue that is its consumer's own goes with it."""
        queue = consumed.queue
        if (queue.exclusive or queue.auto_delete) and consumed.pattern is None:
            sources = [entity.source.name for entity in consumed.declare if isinstance(entity, Binding)]
            self._link.run(_nothing, DELETE, queue.name, *sources)

    # -- the link's events

    def on_open(self) -> None:
        """Log in is done: declare, and take."""
        self._complaint = ""
        self._declared.forget_all()
        self._link.send(self._tracks, "CLIENT", "TRACKING", "ON", "OPTIN")
        for consumed in self._queues.values():
            consumed.is_set_up = False
        if not self._no_ack:
            self._housekeeping.start()
            self._renew()
        self._send_answers()
        self._set_up()
        self._look_later()

    def _tracks(self, reply: Any) -> None:
        """Without CLIENT TRACKING the lists are looked at often."""
        self._is_told = not isinstance(reply, ReplyError)
        if not self._is_told:
            self._complain(
                f"Redis at {self._link.server} refuses CLIENT TRACKING ({clause(str(reply))}): it is asked for messages ten "
                "times a second"
            )
            self._look_later()

    def on_lost(self, error: Exception) -> None:
        """What is held stays held."""
        self._is_taking = False
        self._watched.clear()
        self._listener.on_warning(
            f"the connection to Redis at {self._link.server} was lost ({clause(str(error))}). What this worker holds stays "
            f"its own for {self._lease:g} s. Connecting again."
        )

    def on_unreachable(self, error: PublishError) -> None:
        """Another attempt follows."""
        if isinstance(error, AccessRefused) and not self._is_consuming:
            self._fail(error)
        elif self._complaint != str(error):
            self._complaint = str(error)
            self._listener.on_warning(f"{error} Trying again.")

    def on_push(self, push: Push) -> None:
        """A list has changed, or a message was published."""
        kind, *fields = push.fields
        if kind == b"invalidate":
            self._housekeeping.changed(fields[0])
            self._watched.clear()
            self._take_soon()
        elif kind == b"pmessage":
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
        missing = [] if self._is_paused else [each for each in self._queues.values() if not each.is_set_up]
        for consumed in missing:
            consumed.is_set_up = True
            try:
                commands = self._declared.missing(consumed.declare)
            except PublishError as error:
                self._fail(OperationalError(str(error)))
                return
            for command, on_reply in commands:
                self._link.send(partial(self._declared_one, consumed, on_reply), *command)
            if consumed.pattern is not None:
                self._link.send(partial(self._declared_one, consumed, _nothing), "PSUBSCRIBE", consumed.pattern)
        self._link.send(self._set_up_is_done, "PING")

    def _declared_one(self, consumed: Consumed, on_reply: Callable[[Any], None], reply: Any) -> None:
        if isinstance(reply, ReplyError):
            consumed.is_set_up = False
            error = publish_error(reply, self._link.server)
            if isinstance(error, AccessRefused):
                self._fail(error)
            else:
                self._complain(str(error))
                self._later("set up", RETRY_SECONDS, self._set_up)
        elif not isinstance(reply, ConnectionError):
            on_reply(reply)

    def _set_up_is_done(self, reply: Any) -> None:
        if self._is_stopped or isinstance(reply, Exception):
            return
        if not self._is_consuming:
            self._is_consuming = True
            self._epoch = max(1, self._epoch)
            self._listener.on_consuming(self._epoch)
        self._take()

    def _unsubscribe(self, consumed: Consumed) -> None:
        if consumed.pattern is not None and consumed.is_set_up:
            consumed.is_set_up = False
            if self._link.is_open:
                self._link.send(_nothing, "PUNSUBSCRIBE", consumed.pattern)

    # -- taking

    def _take_soon(self) -> None:
        if not self._is_taking:
            self._loop.call_soon(self._take)

    def _take(self) -> None:
        """Ask for as many messages as there is room for."""
        if self._is_taking or not self._link.is_open or not self.is_consuming:
            return
        wanted: list[Any] = []
        for consumed in self._lists():
            if consumed.room and consumed.queue.name not in self._watched:
                wanted += (consumed.queue.name, consumed.room, "1" if consumed.is_alone else "")
        if wanted:
            self._is_taking = True
            lease = "" if self._no_ack else self._lease
            self._link.run(self._taken, RESERVE, self._id, self._next, lease, MOST_AT_ONCE, *wanted)

    def _lists(self) -> list[Consumed]:
        return [consumed for consumed in self._queues.values() if consumed.pattern is None and consumed.is_set_up]

    def _taken(self, reply: Any) -> None:
        self._is_taking = False
        on_taken, self._on_taken = self._on_taken, None
        if on_taken is not None:
            fields = [] if isinstance(reply, Exception) else reply[1:]
            self._returns += [
                (self._next + at // 3, NO_FAILURE if fields[at + 2] else NEVER_CAME) for at in range(0, len(fields), 3)
            ]
            on_taken()
            return
        if isinstance(reply, ReplyError):
            self._complain(str(publish_error(reply, self._link.server)))
            self._later("take", RETRY_SECONDS, self._take)
        if isinstance(reply, Exception):
            return
        has_more, *fields = reply
        for at in range(0, len(fields), 3):
            self._received(fields[at].decode(), fields[at + 1], fields[at + 2])
        if has_more or fields:
            self._take_soon()
        else:
            self._watch()

    def _received(self, queue: str, text: bytes, failed: bytes) -> None:
        number, self._next = self._next, self._next + 1
        consumed = self._queues.get(queue)
        message = incoming(text)
        failures = int(failed or 0)
        if consumed is None or self._is_paused or self._is_stopped:  # since it was asked for
            if not self._no_ack:
                self._returns.append((number, NEVER_CAME if not failed else NO_FAILURE))
                self._answer_soon()
            return
        is_again = bool(failed) or message.redelivered
        if self._no_ack:
            self._deliver(number, queue, message, failures, is_again=is_again)
            return
        held = Held(consumed, message, failures, is_stored=True)
        consumed.held += 1
        self._held[number] = held
        limit = consumed.delivery_limit
        if limit is not None and failures > limit:
            self._settled(number)
            self._bury(number, held, DELIVERY_LIMIT)
        else:
            self._deliver(number, queue, message, failures, is_again=is_again)

    def _published(self, pattern: str, text: bytes) -> None:
        """A message off a channel: it is nowhere else."""
        consumed = next((each for each in self._queues.values() if each.pattern == pattern), None)
        if consumed is None or self._is_paused or self._is_stopped:
            return
        number, self._next = self._next, self._next + 1
        message = incoming(text)
        if not self._no_ack:
            consumed.held += 1
            self._held[number] = Held(consumed, message, 0, is_stored=False)
        self._deliver(number, consumed.queue.name, message, 0, is_again=False)

    def _deliver(self, number: int, queue: str, message: Any, failures: int, *, is_again: bool) -> None:
        self._listener.on_delivery(
            Delivery(
                message.body,
                with_failures(message.properties, failures),
                message.exchange,
                message.routing_key,
                is_again,
                queue,
                number,
                self._epoch,
            )
        )

    # -- watching

    def _watch(self) -> None:
        """Have Redis say when something comes; what came meanwhile is in its answer. Queues that another consumer may have
        alone are looked at now and then: they hold something all the time."""
        names = [each.queue.name for each in self._lists() if each.room and not each.is_alone]
        if not names or not self._link.is_open:
            return
        self._watched.update(names)
        keys = [key for name in names for key in list_keys(self._layout.prefix, name)]
        self._link.send(_nothing, "CLIENT", "CACHING", "YES")
        self._link.send(self._counted, "EXISTS", *keys)
        self._link.send(_nothing, "CLIENT", "CACHING", "YES")
        self._link.send(partial(self._found, names), "HMGET", self._layout.key("amqtask.queues"), *names)

    def _counted(self, reply: Any) -> None:
        if reply != 0:
            self._watched.clear()
            self._take_soon()

    def _found(self, names: list[str], reply: Any) -> None:
        """Which of the queues are declared: an operator may have deleted one."""
        if not isinstance(reply, list):
            return
        for name, arguments in zip(names, reply, strict=True):
            consumed = self._queues.get(name)
            if arguments is None and consumed is not None and not consumed.queue.passive and not self._is_stopped:
                consumed.is_set_up = False
                self._declared.forget(consumed.declare)
                self._listener.on_cancelled(name, "it was deleted")
                self._set_up_soon()

    def _look_later(self) -> None:
        has_alone = any(consumed.is_alone for consumed in self._queues.values())
        seconds = LOOK_ALONE_SECONDS if has_alone else LOOK_SECONDS
        self._later("look", seconds if self._is_told else LOOK_OFTEN_SECONDS, self._look)

    def _look(self) -> None:
        """Whatever Redis has said or not said."""
        self._watched.clear()
        self._take()
        self._look_later()

    # -- answers

    def _settled(self, tag: int, *, multiple: bool = False) -> list[tuple[int, Held]]:
        numbers = [number for number in self._held if number <= tag] if multiple else [tag]
        settled = [(number, self._held.pop(number)) for number in numbers if number in self._held]
        for _, held in settled:
            held.consumed.held -= 1
        return settled

    def _give_back(self, number: int, held: Held, failures: int) -> None:
        if held.is_stored:
            self._returns.append((number, failures))
            self._answer_soon()
        else:  # it is nowhere else: it comes again at once
            held.consumed.held += 1
            again = held._replace(failures=held.failures + failures)
            self._held[number] = again
            queue = held.consumed.queue.name
            self._loop.call_soon(lambda: self._deliver(number, queue, held.message, again.failures, is_again=True))

    def _bury(self, number: int, held: Held, reason: str) -> None:
        letter = dead_letter(held, reason)
        if letter is None:
            if held.is_stored:
                self._acks.append(number)
                self._answer_soon()
        elif self._link.is_open:
            answered = partial(self._buried, number, held, reason)
            if held.is_stored:
                self._link.run(answered, BURY, f"{self._id}:{number}", *letter)
            else:
                self._link.run(answered, PUBLISH, self._layout.channels, *letter[:4])
            self._take_soon()
        else:
            self._later(f"bury {number}", RETRY_SECONDS, lambda: self._bury(number, held, reason))

    def _buried(self, number: int, held: Held, reason: str, reply: Any) -> None:
        if isinstance(reply, Exception):
            self._later(f"bury {number}", RETRY_SECONDS, lambda: self._bury(number, held, reason))

    def _answer_soon(self) -> None:
        if not self._is_answer_due:
            self._is_answer_due = True
            self._loop.call_last(self._send_answers)

    def _send_answers(self) -> None:
        """All answers of this turn, then ask for what there is room for now."""
        self._is_answer_due = False
        if not self._link.is_open:
            return
        acks, self._acks = self._acks, []
        for start in range(0, len(acks), MOST_ANSWERS):
            some = acks[start : start + MOST_ANSWERS]
            self._link.run(partial(self._acked, some), ACK, self._id, *some)
        returns, self._returns = self._returns, []
        for start in range(0, len(returns), MOST_ANSWERS):
            pairs = returns[start : start + MOST_ANSWERS]
            words = [word for pair in pairs for word in pair]
            self._link.run(partial(self._returned, pairs), GIVE_BACK, self._id, *words)
        if acks or returns:
            self._take()

    def _acked(self, numbers: list[int], reply: Any) -> None:
        if isinstance(reply, Exception):
            self._acks += numbers
            self._answer_later(reply)

    def _returned(self, pairs: list[tuple[int, int]], reply: Any) -> None:
        if isinstance(reply, Exception):
            self._returns += pairs
            self._answer_later(reply)

    def _answer_later(self, error: Exception) -> None:
        """Over the next connection, or when Redis takes it."""
        if isinstance(error, ReplyError):
            self._complain(str(publish_error(error, self._link.server)))
            self._later("answer", RETRY_SECONDS, self._send_answers)

    # -- the lease

    def _renew(self) -> None:
        self._later("renew", self._lease / 3, self._renew)
        if not self._link.is_open:
            return
        alone = [consumed.queue.name for consumed in self._lists() if consumed.is_alone and consumed.held]
        numbers = deque(number for number, held in self._held.items() if held.is_stored)
        while numbers or alone:
            some = [numbers.popleft() for _ in range(min(MOST_ANSWERS, len(numbers)))]
            self._link.run(self._renewed, RENEW, self._id, self._lease, len(alone), *alone, *some)
            alone = []

    @property
    def _lease(self) -> float:
        return LEASE_ALONE_SECONDS if any(each.is_alone for each in self._queues.values()) else LEASE_SECONDS

    @property
    def sole_right(self) -> tuple[str, str] | None:
        """The queue that it has alone and what it is called, for as long as it believes so."""
        queue = next((name for name, each in self._queues.items() if each.is_alone and each.held), None)
        return None if queue is None else (queue, self._id)

    def _renewed(self, reply: Any) -> None:
        if isinstance(reply, Exception) or self._is_stopped:
            return
        lost = [int(number) for number in reply[0] if int(number) in self._held]
        for number in lost:
            self._settled(number)
        if lost or reply[1]:
            self._lost(lost)

    def _lost(self, numbers: list[int]) -> None:
        """The lease was over before it was renewed, or Redis has forgotten: others have these messages now."""
        error = TimeoutError(f"the lease of {len(numbers) or 'a queue'} was over: another consumer has it now")
        if any(consumed.is_alone for consumed in self._queues.values()):
            for number in sorted(self._held, reverse=True):
                if self._held[number].is_stored:
                    self._returns.append((number, NO_FAILURE))
            self._held.clear()
            for consumed in self._queues.values():
                consumed.held = 0
            self._epoch += 1
            self._listener.on_connection_lost(error)
            self._listener.on_consuming(self._epoch)
            self._answer_soon()
            return
        self._complain(
            f"{len(numbers)} messages were given to other workers, because this one did not renew its hold on them for "
            f"{self._lease:g} s; their tasks may run twice"
        )

    # -- helpers

    def _complain(self, text: str) -> None:
        if text != self._complaint:
            self._complaint = text
            self._listener.on_warning(text)

    def _later(self, name: str, seconds: float, call: Callable[[], None]) -> None:
        before = self._timers.pop(name, None)
        if before is not None:
            before.cancel()

        def run() -> None:
            self._timers.pop(name, None)
            if not self._is_stopped:
                call()

        self._timers[name] = self._loop.call_later(seconds, run)


def _nothing(reply: object) -> None:
    """The command's reply says nothing."""
