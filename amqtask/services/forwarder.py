"""The forwarder: takes delayed messages out of their queues when they are due, and publishes them to their destinations
(`topology.delays`).

Each worker consumes the queues in which messages wait for up to 23 minutes, on a connection of its own. Messages at the head of a
queue come here long before they are due and are held, unacknowledged, so the broker keeps them and delivers them to another
worker when this one ends. A message that is due is published; the broker's confirm is followed by the acknowledgement.

How many messages may be held is the queue's window. It grows while a queue has more messages than the window has room for, and
all windows together stop growing at MOST_HELD. Further messages wait in the queue: on level 0 that makes them late by at most the
4 s between two queues. A message of a higher level whose window is half full goes to a lower queue in time, which makes room for
others.

A window grows by a further consumer of its queue, on a channel of its own, and shrinks as that channel is closed: what it held
comes again. The consumers that are there are left alone. On a node of RabbitMQ 4.3 that has lost the others a channel that starts
or cancels a consumer stands still for a minute (`rabbit_fifo_client:checkout`), and when the nodes are together again, its other
consumers are given messages that nobody gets before the minute is over. A channel that begins has no others.

Deliveries and publishes share one connection: when it is lost, unconfirmed messages are delivered again, to this worker or
another, and are forwarded then (a second time, if only the confirm was lost). A message that cannot be published is tried again,
then it waits in the broker once more, each time for longer, so that other messages can be held.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from amqtask.exceptions import AccessRefused, MessageRefused, PublishError, PublishRefused, Unroutable
from amqtask.ground.loop import OneTimer, Ticker
from amqtask.ground.printable import bounded_logger
from amqtask.topology.delays import TO_HEADER, Address, DelayPlan, address_of, due_at, leaves_at
from amqtask.transport.contract import ConsumerListener, HostLeft, held_too_long

if TYPE_CHECKING:
    from amqtask.pool import Loop
    from amqtask.protocol.message import Delivery, Message
    from amqtask.topology.delays import HeldQueue
    from amqtask.transport.contract import Consumer, LoopPublisher

logger = bounded_logger("amqtask.worker")

# A queue's first window, its largest one, and how many messages all windows together may hold.
WINDOW = 100
MOST_IN_A_QUEUE = 1000
MOST_HELD = 2000
SHRINK_SECONDS = 10.0
# A window grows while it is full of messages that are due within so many seconds: later ones have time to come.
SOON_SECONDS = 8.0
# A message that cannot be published is tried again after this pause (seconds), so many times; then it waits in the broker.
PAUSE_SECONDS = 0.4
TRIES = 5
# The most different warnings.
MOST_COMPLAINTS = 100
# A publish that is not confirmed after STUCK_SECONDS needs another connection; how often to look, and the longest pause between
# two new connections (seconds).
STUCK_SECONDS, WATCH_SECONDS, LONGEST_RENEWAL_PAUSE = 3.0, 1.0, 60.0
# A wall clock that falls back behind the monotonic one by more than this (seconds) was put back.
CLOCK_STEP = 1.0
# Seconds until the next attempt when queues, rights or channels are missing.
RETRY_SECONDS = 60.0
# Its queues have many declarations: after so many seconds those of a worker that starts are not in the way of its first task.
START_SECONDS = 1.0


MakeConsumer = Callable[[ConsumerListener], "Consumer"]


class _Share:
    """What one consumer of a queue may hold of its window, and holds."""

    __slots__ = ("consumer", "has_begun", "held", "is_void", "publishing", "size", "window")

    def __init__(self, window: _Window, size: int, consumer: Consumer) -> None:
        self.window = window
        self.size = size
        self.consumer = consumer
        # How many are held, and how many of these are being published.
        self.held = 0
        self.publishing = 0
        self.has_begun = False
        # Its channel is gone, and its deliveries come again.
        self.is_void = False

    def ack(self, delivery: Delivery) -> None:
        """Acknowledge what was held."""
        self.held -= 1
        self.window.held -= 1
        self.consumer.ack(delivery.tag)


class _Further(ConsumerListener):
    """A further consumer of a queue: what comes is held, and when its channel is gone it is over."""

    def __init__(
        self,
        window: _Window,
        size: int,
        make_consumer: MakeConsumer,
        on_delivery: Callable[[_Share, Delivery], None],
        on_over: Callable[[_Share], None],
    ) -> None:
        self.share = _Share(window, size, make_consumer(self))
        self._hold, self._on_over = on_delivery, on_over

    def start(self) -> None:
        """The first consumer has declared the queue."""
        self.share.consumer.add_queue(self.share.window.queue, prefetch=self.share.size, declare=())
        self.share.consumer.start()

    def on_delivery(self, delivery: Delivery) -> None:
        self._hold(self.share, delivery)

    def on_consuming(self, epoch: int) -> None:
        self.share.has_begun = True

    def on_connection_lost(self, error: Exception) -> None:
        self._on_over(self.share)

    def on_fatal(self, error: Exception) -> None:
        self._on_over(self.share)

    def on_cancelled(self, queue: str, reason: str) -> None:
        """The queue was deleted, and the first consumer makes it anew: what is held goes out, and no more comes this way."""
        self.share.consumer.pause()

    def on_warning(self, text: str) -> None:
        logger.debug("delays: %s", text)

    def unanswered(self, queue: str) -> int:
        return self.share.held


class _Held:
    """A delivery that waits here, or is being published."""

    __slots__ = ("delivery", "due", "next_look", "share", "tries")

    def __init__(self, delivery: Delivery, due: float, next_look: float, share: _Share) -> None:
        self.delivery = delivery
        # Of whose channel it came on.
        self.share = share
        self.due = due
        # When to look at it next (Unix time).
        self.next_look = next_look
        self.tries = 0


class _Window:
    """A queue, how many of its messages may be held, and how many are held."""

    __slots__ = ("held", "level", "longest", "queue", "shares", "size")

    def __init__(self, held_queue: HeldQueue) -> None:
        self.queue = held_queue.queue
        self.level = held_queue.level
        self.longest = held_queue.longest
        self.size = WINDOW
        self.held = 0
        # Of its consumers: the first one's, then those of further ones. None while there is no channel.
        self.shares: list[_Share] = []

    def begin(self, consumer: Consumer | None) -> list[_Share]:
        """What came before is void, and this is the first consumer now; the shares of further ones."""
        before, self.shares = self.shares, []
        for share in before:
            share.is_void = True
        self.size, self.held = WINDOW, 0
        if consumer is not None:
            self.shares.append(_Share(self, WINDOW, consumer))
        return before[1:]


class Forwarder:
    """Forwards delayed messages while the worker runs; all on its loop. `make_ends` makes the consumer of all queues, the
    publisher, and what makes further consumers, all over one connection."""

    name = "delays"

    def __init__(
        self,
        *,
        loop: Loop,
        delays: DelayPlan,
        make_ends: Callable[[ConsumerListener], tuple[Consumer, LoopPublisher, MakeConsumer]],
        wall_clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop = loop
        self._delays = delays
        self._make_ends = make_ends
        self._wall_clock = wall_clock
        self._monotonic = monotonic
        # How far the wall clock was ahead of the monotonic one when it was last looked at.
        self._ahead = float("-inf")
        self._consumer: Consumer | None = None
        self._publisher: LoopPublisher | None = None
        self._make_further: MakeConsumer | None = None
        self._windows: dict[str, _Window] = {}
        # Of the first consumer; -1 while there is no channel.
        self._epoch = -1
        # No window grows before.
        self._grows_at = float("-inf")
        # Held messages that are not due yet: (when to look, number, held).
        self._waiting: list[tuple[float, int, _Held]] = []
        self._numbers = itertools.count()
        self._timer = OneTimer(loop)
        self._timer_at = float("inf")
        # When each publish under way began, the oldest first.
        self._attempts: dict[_Held, float] = {}
        self._watch = OneTimer(loop)
        self._renewed_at = float("-inf")
        self._renewal_pause = STUCK_SECONDS
        self._shrinking = Ticker(loop, SHRINK_SECONDS, self._look_at_sizes)
        self._restart = OneTimer(loop)
        self._complaints: set[str] = set()
        self._is_stopped = False

    @property
    def blocks(self) -> bool:
        """It holds them itself."""
        return False

    def soonest(self, limit: int) -> list[tuple[float, Delivery]]:
        """At most `limit` held deliveries with their due times, the soonest first."""
        first = heapq.nsmallest(limit, self._waiting, key=lambda entry: entry[2].due)
        return [(held.due, held.delivery) for _, _, held in first]

    def count(self, address: Address) -> int:
        """How many wait here that are to go there."""
        return sum(address_of(held.delivery) == address for _, _, held in self._waiting)

    def drop(self, address: Address) -> int:
        """Delete those that wait here and are to go there; how many that were."""
        dropped = [entry for entry in self._waiting if address_of(entry[2].delivery) == address]
        if self._consumer is None or not dropped:
            return 0
        for _, _, held in dropped:
            held.share.ack(held.delivery)
        numbers = {number for _, number, _ in dropped}
        self._waiting = [entry for entry in self._waiting if entry[1] not in numbers]
        heapq.heapify(self._waiting)
        return len(dropped)

    def release(self, is_meant: Callable[[Delivery], bool], *, revoked: bool = False) -> int:
        """Publish those that wait here and are meant now, see `DelayPlan.released`; how many."""
        meant = [entry for entry in self._waiting if is_meant(entry[2].delivery)]
        numbers = {number for _, number, _ in meant}
        self._waiting = [entry for entry in self._waiting if entry[1] not in numbers]
        heapq.heapify(self._waiting)
        for _, _, held in meant:
            self._publish(held, self._delays.released(held.delivery, revoked=revoked))
        return len(meant)

    # -- the service

    def start(self) -> None:
        """Consume the queues soon; this object is the consumer's listener."""
        if self._consumer is None and not self._is_stopped:
            self._restart.set(START_SECONDS, self._begin_consuming)

    def _begin_consuming(self) -> None:
        self._consumer, self._publisher, self._make_further = self._make_ends(self)
        for held_queue in self._delays.held():
            self._windows[held_queue.queue.name] = _Window(held_queue)
            self._consumer.add_queue(held_queue.queue, prefetch=WINDOW, declare=held_queue.declare)
        self._consumer.start()
        self._shrinking.start()

    def stop(self) -> None:
        """Requeue held messages; those that are being published are acknowledged, if the confirm comes before the second call."""
        if self._is_stopped:
            self._close()
            return
        self._is_stopped = True
        self._waiting.clear()
        self._shrinking.stop()
        for timer in (self._timer, self._restart, self._watch):
            timer.cancel()
        if self._consumer is not None and self._is_publishing:
            self._consumer.pause()
            for window in self._windows.values():
                for share in window.shares[1:]:
                    share.consumer.pause()
        else:
            self._close()

    @property
    def _is_publishing(self) -> bool:
        return any(share.publishing for window in self._windows.values() for share in window.shares)

    def _close(self) -> None:
        self._begin(-1)
        if self._consumer is not None:
            self._consumer.stop()
            self._consumer = None
        if self._publisher is not None:
            self._publisher.stop()
            self._publisher = None

    # -- the consumer's events

    def on_delivery(self, delivery: Delivery) -> None:
        """Hold the message, or forward it now."""
        if self._consumer is None:
            return  # it is requeued when the channel is closed
        if delivery.epoch != self._epoch:
            self._begin(delivery.epoch)
        window = self._windows.get(delivery.queue)
        if window is not None:
            self._hold(window.shares[0], delivery)

    def _hold(self, share: _Share, delivery: Delivery) -> None:
        if share.is_void or self._is_stopped:
            return  # it is requeued when the channel is closed
        window = share.window
        headers = delivery.properties.headers or {}
        if TO_HEADER not in headers:
            self._drop(share, delivery)
            return
        now = self._look_at_clock()
        due, next_look = due_at(headers), leaves_at(headers, window.level)
        # A message that claims to be due later than its queue allows must not be held for ever.
        due = min(now if due is None else due, now + window.longest)
        held = _Held(delivery, due, due if next_look is None else min(next_look, due), share)
        share.held += 1
        window.held += 1
        if held.next_look <= now:
            self._look(held, now)
        else:
            self._wait(held)
        if window.held >= window.size and held.next_look - now < SOON_SECONDS:
            self._grow(window)

    def _drop(self, share: _Share, delivery: Delivery) -> None:
        """Drop a message that was not delayed by us: it names no destination, and requeued it would come here again."""
        self._complain(
            f"delays: a message in {delivery.queue} does not say where it is to go, and is dropped; no more is said of others"
        )
        share.consumer.ack(delivery.tag)

    def on_consuming(self, epoch: int) -> None:
        """A new channel."""
        self._begin(epoch)
        logger.debug("delays: waiting messages are forwarded by this worker")

    def on_connection_lost(self, error: Exception) -> None:
        """The broker has requeued the held messages."""
        logger.info("delays: connection lost: %s", error)
        if held_too_long(error):
            self._complain(
                "delays: RabbitMQ's consumer_timeout is shorter than the 23 minutes for which workers hold delayed messages: all "
                "of them come again each time, and one that goes on at that moment may run twice. Raise consumer_timeout to half "
                "an hour, its default, or more"
            )
        further = [share for window in self._windows.values() for share in window.shares[1:]]
        if not isinstance(error, (TimeoutError, HostLeft)) and not all(share.has_begun for share in further):
            # The broker's user may have no channels left, which ends the connection.
            self._grows_at = self._monotonic() + RETRY_SECONDS
        self._begin(-1)

    def on_cancelled(self, queue: str, reason: str) -> None:
        """The consumer is set up again by itself."""

    def on_fatal(self, error: Exception) -> None:
        """The queues do not exist and may not be declared, or may not be read."""
        self._complain(
            f"delays: this worker does not forward delayed messages ({error}). The broker does, 6 to 10 s after their time, if "
            "their queues exist: `amqtask topology declare` makes them, and the worker's user needs the right to read them"
        )
        self._close()
        if not self._is_stopped:
            self._restart.set(RETRY_SECONDS, self._begin_consuming)

    def unanswered(self, queue: str) -> int:
        """How many of the queue's messages the first consumer holds."""
        return sum(share.held for share in self._windows[queue].shares[:1])

    def on_warning(self, text: str) -> None:
        """Log one line for the forty queues, which are all alike."""
        if self._complaints:
            logger.debug("delays: %s", text)
        else:
            self._complain(f"delays: {text}")

    def _complain(self, text: str) -> None:
        if text not in self._complaints and len(self._complaints) < MOST_COMPLAINTS:
            self._complaints.add(text)
            logger.warning("%s", text)

    def _begin(self, epoch: int) -> None:
        """Deliveries of other channels are void."""
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._attempts.clear()
        self._waiting.clear()
        for window in self._windows.values():
            for share in window.begin(None if epoch < 0 else self._consumer):
                share.consumer.stop()

    # -- waiting

    def _wait(self, held: _Held) -> None:
        heapq.heappush(self._waiting, (held.next_look, next(self._numbers), held))
        self._set_timer()

    def _set_timer(self) -> None:
        if not self._waiting or self._waiting[0][0] >= self._timer_at:
            return
        self._timer_at = self._waiting[0][0]
        # The wall clock may be set, so the timer is never longer than SHRINK_SECONDS.
        seconds = min(max(0.0, self._timer_at - self._wall_clock()), SHRINK_SECONDS)
        self._timer.set(seconds, self._on_time)

    def _on_time(self) -> None:
        self._timer_at = float("inf")
        now = self._look_at_clock()
        waiting = self._waiting
        while waiting and waiting[0][0] <= now:
            self._look(heapq.heappop(waiting)[2], now)
        self._set_timer()

    def _look_at_clock(self) -> float:
        """The wall clock; what waits here does not wait for as long as the clock was put back."""
        now = self._wall_clock()
        ahead_before, self._ahead = self._ahead, now - self._monotonic()
        seconds = ahead_before - self._ahead
        if seconds > CLOCK_STEP:
            for _, _, held in self._waiting:
                self._put_back(held, seconds, now)
            self._waiting = [(held.next_look, number, held) for _, number, held in self._waiting]
            heapq.heapify(self._waiting)
        return now

    def _put_back(self, held: _Held, seconds: float, now: float) -> None:
        if not (held.delivery.properties.headers or {}).get("eta"):  # it waits for so long, and not until a time of day
            held.due -= seconds
            held.next_look -= seconds
        held.due = min(held.due, now + held.share.window.longest)
        held.next_look = min(held.next_look, held.due)

    def _look(self, held: _Held, now: float) -> None:
        """Forward a message that is due, or that should make room for others."""
        if held.due <= now:
            self._publish(held, self._delays.addressed(held.delivery))
            return
        window = held.share.window
        if window.level and held.next_look < held.due and window.held * 2 > window.size:
            self._publish(held, self._delays.delayed_on(held.delivery, held.due - now))
        else:
            held.next_look = held.due
            self._wait(held)

    # -- windows

    def _grow(self, window: _Window) -> None:
        held = sum(queue_window.held for queue_window in self._windows.values())
        size = min(window.size, MOST_IN_A_QUEUE - window.size)
        if window.level or held >= MOST_HELD or not size or self._make_further is None:
            return
        if self._monotonic() < self._grows_at:
            return
        further = _Further(window, size, self._make_further, self._hold, self._end)
        window.shares.append(further.share)
        window.size += size
        further.start()

    def _look_at_sizes(self) -> None:
        for window in self._windows.values():
            if len(window.shares) > 1 and window.held * 4 < window.size and not window.shares[-1].publishing:
                self._end(window.shares[-1])

    def _end(self, share: _Share) -> None:
        """A further consumer's channel is gone, or to be closed: what it holds comes again."""
        if share.is_void:
            return
        share.is_void = True
        window = share.window
        window.shares.remove(share)
        window.size -= share.size
        window.held -= share.held
        self._waiting = [entry for entry in self._waiting if entry[2].share is not share]
        heapq.heapify(self._waiting)
        self._attempts = {held: began for held, began in self._attempts.items() if held.share is not share}
        share.consumer.stop()

    # -- forwarding

    def _publish(self, held: _Held, message: Message) -> None:
        held.share.publishing += 1
        self._publish_again(held, message)

    def _publish_again(self, held: _Held, message: Message) -> None:
        if self._publisher is not None and not held.share.is_void:
            self._attempts[held] = self._monotonic()
            if not self._watch.is_set:
                self._watch.set(WATCH_SECONDS, self._look_at_attempts)
            self._publisher.publish(message, lambda error: self._published(held, message, error))

    def _published(self, held: _Held, message: Message, error: PublishError | None) -> None:
        delivery, share = held.delivery, held.share
        if share.is_void:
            return  # its channel is gone: it is delivered again
        self._attempts.pop(held, None)
        is_hosts = isinstance(error, PublishRefused) and not isinstance(error, MessageRefused)
        if is_hosts and self._renew(f"a publish was refused: {error}"):
            return
        if error is not None and held.tries > 2 * TRIES:
            # We cannot publish it: the broker dead-letters it as it is, and its destination has to deal with it.
            share.consumer.reject(delivery.tag, requeue=False)
            share.held -= 1
            share.window.held -= 1
        elif error is not None and not self._is_stopped:
            self._loop.call_later(
                PAUSE_SECONDS, partial(self._publish_again, held, self._next_message(held, message, error))
            )
            return
        share.publishing -= 1
        if error is None:
            share.ack(delivery)
        if self._is_stopped and not self._is_publishing:
            self._close()

    def _look_at_attempts(self) -> None:
        """Look for publishes without a confirm: a channel whose queue lost its leader may wait for one for ever."""
        oldest = next(iter(self._attempts.values()), None)
        if oldest is None:
            return
        waited = self._monotonic() - oldest
        # While an alarm blocks us, written messages wait in the broker's socket; over a new connection they would be sent twice.
        could_be = self._publisher is not None and self._publisher.oldest is not None
        if (
            waited > STUCK_SECONDS
            and could_be
            and self._renew(f"the broker did not confirm a publish for {waited:.0f} s")
        ):
            return
        self._watch.set(WATCH_SECONDS, self._look_at_attempts)

    def _renew(self, reason: str) -> bool:
        """Go on over another connection, to another host if there is one: all held messages are delivered again. Not too often:
        the fault may be elsewhere."""
        now = self._monotonic()
        if self._consumer is None or self._is_stopped or now - self._renewed_at < self._renewal_pause:
            return False
        is_first = now - self._renewed_at > LONGEST_RENEWAL_PAUSE * 2
        self._renewal_pause = STUCK_SECONDS if is_first else min(self._renewal_pause * 2, LONGEST_RENEWAL_PAUSE)
        self._renewed_at = now
        logger.warning("delays: %.500s; another connection is made", reason)
        self._begin(-1)
        self._consumer.leave(reason)
        return True

    def _next_message(self, held: _Held, message: Message, error: PublishError) -> Message:
        """The message for the next attempt, after an error."""
        held.tries += 1
        delivery = held.delivery
        if isinstance(error, AccessRefused) and not message.exchange:
            # The broker's own dead-lettering needs no rights.
            return self._delays.through_the_net(delivery)
        if held.tries < TRIES and not isinstance(error, Unroutable):
            return message
        target = (delivery.properties.headers or {}).get(TO_HEADER)
        to = f"exchange {target!r}" if target else f"queue {delivery.routing_key!r}"
        self._complain(f"delays: a delayed message waits on, as it cannot be published to {to:.300}: {error}")
        return self._delays.delayed_again(delivery)
