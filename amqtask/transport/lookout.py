"""Lookout: whether a queue that delivers nothing has nothing to deliver.

A broker may keep a connection, answer on it, and yet deliver nothing: its node has lost the others and goes on without them
(RabbitMQ 4 with Khepri has no `pause_minority`), is about to stop, or has mixed up the consumer (see RecreationGuard). So a queue
that has delivered nothing since the last tick is declared passively, on a channel of its own. These are bad signs:

* it has no consumers, although ours was confirmed: this node does not reach the one that leads the queue;
* messages are ready, although we may take more, and the next look shows that again;
* a quorum queue that looks well does not answer `basic.get`, which takes a majority of its nodes. This is asked where there are
  other hosts, in the first ticks of silence and then now and then. (RabbitMQ 3 stops a node without a majority: it is not asked.)

Then the other hosts are asked (SecondOpinion). When one answers for the queue, and nothing has come over this connection
meanwhile, that one is gone to. Messages that are ready also come, in general, when the queue is consumed anew.

One queue per tick is looked at, with many queues some more, so that each has its turn within half a minute.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import pika
from pika.exceptions import AMQPError

from amqtask.ground.loop import Ticker
from amqtask.topology.declarations import CLASSIC, QUORUM, is_quorum
from amqtask.transport.connection import ConnectionListener

if TYPE_CHECKING:
    from amqtask.ground.loop import Loop
    from amqtask.protocol.entities import Queue
    from amqtask.protocol.message import PropertiesLike
    from amqtask.transport.connection import ConnectionUse
    from amqtask.transport.wire import PikaChannel, PikaFrame, PikaMethod, Wire


# How long another host may take to answer.
OPINION_SECONDS = 2.0
Connect = Callable[[ConnectionListener], "ConnectionUse"]
TICK_SECONDS = 1.5
QUEUES_PER_LOOK = 20
# How often in a row messages must be ready.
SIGNS = 2
# Without an answer for so many ticks the broker is asked again after REST more: RabbitMQ waits for nodes that stand still.
PATIENCE, REST = 3, 20
# For how many ticks of silence each is one with a `basic.get`, and each how many-th one after that.
EACH_TICK, LATER_TICKS = 4, 4
# Seconds until something is done about the same queue again, while nothing comes.
FIRST_PAUSE, LONGEST_PAUSE = 3.0, 600.0


class SecondOpinion:
    """Asks other hosts at once for a message of the queue, and gives it back; `on_done(the number of the first that answered)`,
    or `on_done(None)` when none did in time.

    A quorum queue answers `basic.get` when a majority of its nodes has agreed. A node that stands still keeps such an answer from
    everybody, also from those who are connected elsewhere, and may deliver to them all the same; then nothing is won by
    leaving."""

    def __init__(
        self, loop: Loop, connects: Sequence[Connect], queue: str, on_done: Callable[[int | None], None]
    ) -> None:
        self._on_done = on_done
        self._is_over = False
        self._timer = loop.call_later(OPINION_SECONDS, lambda: self._end(None))
        self._askers = [_Asker(connect, queue, self._end, number) for number, connect in enumerate(connects)]
        for asker in self._askers:
            asker.connection.start()

    def stop(self) -> None:
        """Nobody wants to know any more."""
        self._is_over = True
        self._timer.cancel()
        for asker in self._askers:
            if asker.connection.is_running:
                asker.connection.stop()

    def _end(self, number: int | None) -> None:
        if not self._is_over:
            self.stop()
            self._on_done(number)


class _Asker(ConnectionListener):
    """The question to one host. Whatever fails, time runs out."""

    def __init__(self, connect: Connect, queue: str, answered: Callable[[int], None], number: int) -> None:
        self._queue = queue
        self._answered = answered
        self._number = number
        self.connection = connect(self)

    def on_open(self, connection: Wire) -> None:
        connection.channel(on_open_callback=self._ask)

    def _ask(self, channel: PikaChannel) -> None:
        channel.add_callback(lambda _: self._answered(self._number), [pika.spec.Basic.GetEmpty])
        channel.basic_get(self._queue, self._got)

    def _got(self, channel: PikaChannel, method: PikaMethod, properties: PropertiesLike, body: bytes) -> None:
        channel.basic_nack(method.delivery_tag, requeue=True)
        self._answered(self._number)

    def on_refused(self, error: Exception) -> None:
        self.connection.stop()


@dataclass(slots=True, eq=False)
class Watch:
    """What is seen of one queue."""

    # Something came since the last tick, or its consumers changed.
    has_moved: bool = True
    # For how many ticks nothing has come.
    ticks: int = 0
    signs: int = 0
    # The number of the tick in which it was looked at.
    looked: int = 0
    pause: float = FIRST_PAUSE
    next_act: float = 0.0

    def tick(self) -> None:
        """Count, or begin anew."""
        self.ticks += 1
        if self.has_moved:
            self.has_moved = False
            self.ticks, self.signs, self.pause, self.next_act = 0, 0, FIRST_PAUSE, 0.0

    def may_act(self, now: float) -> bool:
        """Whether something may be done about it now; if so, the next time is after a pause."""
        if now < self.next_act:
            return False
        self.next_act = now + self.pause
        self.pause = min(self.pause * 2, LONGEST_PAUSE)
        self.signs = 0
        return True


class Watched(NamedTuple):
    """A queue with confirmed consumers, and how many more deliveries they may get."""

    queue: Queue
    watch: Watch
    room: int

    @property
    def has_room(self) -> bool:
        """Whether what is ready in the queue should come here."""
        return self.room > 0 and not _is_for_one(self.queue)


class Lookout:
    """Looks at what `watched()` returns.

    `on_stalled(queue, why)`: a queue should deliver and does not. `on_better(steps, why)`: the host that is so many `steps`
    further on answers for a queue, and this one does not. `elsewhere(steps, listener)` makes a connection to it."""

    def __init__(
        self,
        loop: Loop,
        *,
        watched: Callable[[], Sequence[Watched]],
        on_stalled: Callable[[str, str], None],
        on_better: Callable[[int, str], None],
        elsewhere: Callable[[int, ConnectionListener], ConnectionUse],
        hosts: int,
    ) -> None:
        self._loop = loop
        self._watched = watched
        self._on_stalled = on_stalled
        self._on_better = on_better
        self._connects = [partial(elsewhere, steps) for steps in range(1, hosts)]
        self._connection: Wire | None = None
        self._channel: Any = None
        self._ticker = Ticker(loop, TICK_SECONDS, self._tick)
        self._tick_number = 0
        # How many questions have no answer, and for how many ticks; how many ticks without questions follow.
        self._asked = 0
        self._ticks_waited = 0
        self._rest = 0
        # The queue that is being asked for a message; what other hosts are being asked.
        self._getting: Watched | None = None
        self._opinion: SecondOpinion | None = None

    def begin(self, connection: Wire) -> None:
        """Look over this connection."""
        self.end()
        self._connection = connection
        self._ticker.start()

    def end(self) -> None:
        """Stop looking."""
        self._ticker.stop()
        if self._opinion is not None:
            self._opinion.stop()
        self._connection = self._channel = self._getting = self._opinion = None
        self._asked = self._ticks_waited = self._rest = 0

    def _tick(self) -> None:
        self._tick_number += 1
        everything = self._watched()
        for watched in everything:
            watched.watch.tick()
        silent = [watched for watched in everything if watched.watch.ticks]
        if self._opinion is not None:
            return
        if self._getting is not None:
            self._ask_others(self._getting, f"this host does not answer for queue {self._getting.queue.name!r}")
        elif self._asked:
            self._wait_on()
        elif self._rest:
            self._rest -= 1
        elif silent:
            silent.sort(key=lambda watched: (not watched.watch.signs, watched.watch.looked))
            self._look(silent[: 1 + len(silent) // QUEUES_PER_LOOK])

    def _wait_on(self) -> None:
        self._ticks_waited += 1
        if self._ticks_waited >= PATIENCE:
            self._rest = REST
            self._drop_channel()

    def _drop_channel(self) -> None:
        channel, self._channel = self._channel, None
        self._getting = None
        self._asked = self._ticks_waited = 0
        if channel is not None and channel.is_open:
            channel.close()

    def _look(self, silent: Sequence[Watched]) -> None:
        # A connection without a free channel, or one that is about to close, is not asked.
        with contextlib.suppress(AMQPError):
            channel = self._channel
            if channel is None:
                self._open(partial(self._ask_all, silent))
            elif channel.is_open:
                self._ask_all(silent, channel)

    def _open(self, on_open: Callable[[PikaChannel], None]) -> None:
        if self._connection is not None and self._connection.is_open:
            self._asked = 1
            self._channel = self._connection.channel(on_open_callback=on_open)
            self._channel.add_on_close_callback(self._on_channel_closed)
            self._channel.add_callback(
                lambda frame, channel=self._channel: self._got_nothing(channel),
                [pika.spec.Basic.GetEmpty],
                one_shot=False,
            )

    def _ask_all(self, silent: Sequence[Watched], channel: PikaChannel) -> None:
        if channel is not self._channel:
            return
        self._asked, self._ticks_waited = len(silent), 0
        for watched in silent:
            watched.watch.looked = self._tick_number
            channel.queue_declare(watched.queue.name, passive=True, callback=partial(self._answered, watched, channel))

    def _on_channel_closed(self, channel: PikaChannel, error: Exception) -> None:
        """The queue does not exist any more, of which its consumer will be told; or the connection is gone."""
        if channel is self._channel:
            self._drop_channel()

    def _answered(self, watched: Watched, channel: PikaChannel, frame: PikaFrame) -> None:
        if channel is not self._channel:
            return
        self._asked -= 1
        self._ticks_waited = 0
        watch, ready = watched.watch, frame.method.message_count
        name = watched.queue.name
        if watch.has_moved:
            return
        if not frame.method.consumer_count:
            self._ask_others(watched, f"queue {name!r} has no consumers by the word of this host")
        elif ready and watched.has_room:
            watch.signs += 1
            if watch.signs >= SIGNS:
                self._is_stalled(watched, f"queue {name!r} has {ready} messages for us and delivers nothing")
        else:
            watch.signs = 0
            if not ready and not self._asked and self._is_to_answer(watched):
                self._getting = watched
                channel.basic_get(name, self._got)

    def _is_stalled(self, watched: Watched, why: str) -> None:
        if not self._ask_others(watched, why) and watched.watch.may_act(time.monotonic()):
            self._on_stalled(watched.queue.name, why)

    # -- whether the queue's nodes agree

    @property
    def _silence(self) -> int:
        """For how many ticks nothing has come from any queue; 0 also where none is consumed: the consumer's channel is gone."""
        return min((0 if each.watch.has_moved else each.watch.ticks for each in self._watched()), default=0)

    def _is_to_answer(self, watched: Watched) -> bool:
        silence = self._silence
        is_turn = silence > 0 and (silence <= EACH_TICK or not silence % LATER_TICKS)
        is_new = self._connection is not None and self._connection.server_version >= (4,)
        return is_new and is_turn and bool(self._connects) and watched.has_room and _can_be_asked(watched.queue)

    def _got(self, channel: PikaChannel, method: PikaMethod, properties: PropertiesLike, body: bytes) -> None:
        """It has come since we looked: our consumer gets it as well."""
        channel.basic_nack(method.delivery_tag, requeue=True)
        self._got_nothing(channel)

    def _got_nothing(self, channel: PikaChannel) -> None:
        if channel is self._channel:
            self._getting = None

    # -- other hosts

    def _ask_others(self, watched: Watched, why: str) -> bool:
        """Ask the other hosts. False: there are none, they cannot be asked, or this one delivers from other queues."""
        if not (self._silence and self._connects and _can_be_asked(watched.queue)):
            return False
        if self._opinion is None and watched.watch.may_act(time.monotonic()):
            self._opinion = SecondOpinion(self._loop, self._connects, watched.queue.name, partial(self._advised, why))
        return True

    def _advised(self, why: str, number: int | None) -> None:
        self._opinion = None
        self._drop_channel()  # it may wait for an answer for long
        if number is not None and self._silence:
            self._on_better(number + 1, f"{why}, and another host answers")


def _is_for_one(queue: Queue) -> bool:
    """Whether one consumer gets all its messages; nobody else can ask it for one."""
    return bool(queue.argument_map.get("x-single-active-consumer"))


def _can_be_asked(queue: Queue) -> bool:
    """Whether an answer to `basic.get` says that its nodes agree."""
    return is_quorum(queue) and not _is_for_one(queue)


def can_be_watched(queue: Queue) -> bool:
    """Whether a passive declaration says these things of the queue: of a stream it does not."""
    queue_type = queue.argument_map.get("x-queue-type")
    return queue_type in (QUORUM, CLASSIC) or (queue_type is None and not queue.passive)
