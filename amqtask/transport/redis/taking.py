"""What a consumer asks Redis for by itself: messages for which there is room, delayed ones that are due, what the dead held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from amqtask.ground.loop import OneTimer
from amqtask.ground.printable import clause
from amqtask.transport.redis.layout import list_keys
from amqtask.transport.redis.link import Link, Timers
from amqtask.transport.redis.publishing import passes, publish_error
from amqtask.transport.redis.scripts import RELEASE_DUE, RESERVE, SWEEP
from amqtask.transport.redis.wire import ReplyError, ignore_reply

if TYPE_CHECKING:
    from amqtask.transport.redis.answers import Consumed


# Messages of one script.
MOST_AT_ONCE = 200
# Seconds between two attempts at a script that Redis refused, and between looks at queues of which Redis has said nothing: usual
# ones, such that another consumer may have alone, and where Redis does not say anything.
RETRY_SECONDS, LOOK_SECONDS, LOOK_ALONE_SECONDS, LOOK_OFTEN_SECONDS = 0.5, 5.0, 1.0, 0.1


# What a script says of a queue in place of a message's failures.
NO_LIST = b"!"
# Seconds that one who stops waits for what is on its way.
FINISH_SECONDS = 5.0


class Taker(Protocol):
    """For whom messages are taken."""

    @property
    def takes(self) -> bool:
        """Whether it wants messages now."""

    @property
    def lists(self) -> list[Consumed]:
        """Its queues that are lists, and set up."""

    @property
    def lease(self) -> float | str:
        """Seconds for which a message is its own; "": it does not acknowledge."""

    def received(self, first: int, queue: str, texts: Sequence[bytes], failed: bytes) -> None:
        """Messages with tags from `first` on; `failed` is how often the delivery of each failed, b"" if none was ever
        delivered."""

    def deleted(self, queue: str) -> None:
        """Somebody has deleted a queue."""

    def complain(self, text: str) -> None:
        """For the operator."""


class Taking:
    """Messages are numbered as they are taken: asked again with the same number, Redis answers the same."""

    def __init__(self, link: Link, timers: Timers, consumer: str, taker: Taker) -> None:
        self._link = link
        self._timers = timers
        self._consumer = consumer
        self._taker = taker
        self._next = 1
        # Whether messages may have been taken that have not come, as the connection was lost: they are asked for alone.
        self._is_unsure = False
        self._is_taking = False
        # How many messages of each queue the script on its way may still take.
        self._asked: dict[str, int] = {}
        # The queues whose lists are empty, and of which Redis says so when something comes.
        self._watched: set[str] = set()
        # Those that were asked for in the table of queues, since when Redis says so when that changes.
        self._declared: set[str] = set()
        self._queues_key = link.layout.key("amqtask.queues")
        # Those whose key is no list, until the next look.
        self._odd: set[str] = set()
        self._is_told = True
        self._on_taken: Callable[[list[tuple[int, bytes]]], None] | None = None

    # -- events

    def opened(self) -> None:
        """A new connection."""
        self._link.send(self._tracks, "CLIENT", "TRACKING", "ON", "OPTIN")
        self._look_later()

    def _tracks(self, reply: Any) -> None:
        self._is_told = not isinstance(reply, ReplyError)
        if not self._is_told:
            self._taker.complain(
                f"Redis at {self._link.server} refuses CLIENT TRACKING ({clause(str(reply))}): it is asked for messages ten "
                "times a second"
            )
            self._look_later()

    def lost(self) -> None:
        """The connection is gone."""
        self._is_taking = False
        self._watched.clear()
        self._declared.clear()

    def changed(self, keys: list[bytes] | None) -> None:
        """Redis says that these have changed (None: perhaps all), lists among them or not."""
        if keys is None or self._queues_key.encode() in keys:
            self._declared.clear()
        self._watched.clear()
        self.take_soon()

    def finish(self, on_taken: Callable[[list[tuple[int, bytes]]], None]) -> None:
        """Take no more; `on_taken` gets what is on its way: tags, and how often each has failed."""
        if self._is_taking and self._link.is_open:
            self._on_taken = on_taken
            self._link.loop.call_later(FINISH_SECONDS, lambda: self._finish([]))
        else:
            on_taken([])

    def _finish(self, on_the_way: list[tuple[int, bytes]]) -> None:
        on_taken, self._on_taken = self._on_taken, None
        if on_taken is not None:
            on_taken(on_the_way)

    # -- taking

    def take_soon(self) -> None:
        """At the end of this turn."""
        if not self._is_taking:
            self._link.loop.call_soon(self.take)

    def take(self) -> None:
        """Ask for as many messages as there is room for."""
        if self._is_taking or not self._link.is_open or not self._taker.takes:
            return
        arguments: list[Any] = []
        self._asked.clear()
        for consumed in self._taker.lists:
            if consumed.room and consumed.queue.name not in self._watched and consumed.queue.name not in self._odd:
                self._asked[consumed.queue.name] = consumed.room
                arguments += (consumed.queue.name, consumed.room, "1" if consumed.is_alone else "")
        most = 0 if self._is_unsure else MOST_AT_ONCE
        if arguments:
            self._is_taking = True
            self._link.run(self._taken, RESERVE, self._consumer, self._next, self._taker.lease, most, *arguments)

    def _taken(self, reply: Any) -> None:
        self._is_taking = False
        if self._on_taken is not None:
            groups = [] if isinstance(reply, Exception) else reply[1:]
            failed = [text for _, text, *texts in groups if text != NO_LIST for _ in texts]
            self._finish([(self._next + at, text) for at, text in enumerate(failed)])
            return
        if isinstance(reply, ReplyError):
            self._taker.complain(str(publish_error(reply, self._link.server)))
            self._timers.later("take", RETRY_SECONDS, self.take)
        if isinstance(reply, Exception):
            self._is_unsure |= isinstance(reply, ConnectionError)
            return
        has_more, *groups = reply
        for name, failed, *texts in groups:
            queue = name.decode()
            if failed == NO_LIST:
                self._leave_alone(queue, texts[0].decode(errors="replace"))
                continue
            first, self._next = self._next, self._next + len(texts)
            self._asked[queue] = self._asked.get(queue, 0) - len(texts)
            self._taker.received(first, queue, texts, failed)
        if self._is_unsure:
            self._is_unsure = False
            self._next += MOST_AT_ONCE  # one between them may have gone to others: no number is used twice
        # Of a queue that gave fewer than it was asked for, the script has seen the end.
        if has_more or 0 in self._asked.values():
            self.take_soon()
        else:
            self._watch()

    def _leave_alone(self, queue: str, text: str) -> None:
        self._odd.add(queue)
        error = ReplyError(text)
        if error.code != "WRONGTYPE":
            self._taker.complain(f"queue {queue!r} cannot be read: {publish_error(error, self._link.server)}")
            return
        self._taker.complain(
            f"queue {queue!r} cannot be read: its key in Redis is not a list of messages ({clause(text)}). Somebody else has "
            "written there; look at it with TYPE, and delete or rename it. Its other messages wait"
        )

    # -- watching

    def _watch(self) -> None:
        """Have Redis say when something comes; what came meanwhile is in its answer. Queues that another consumer may have
        alone are looked at now and then: they hold something all the time."""
        names = [
            consumed.queue.name
            for consumed in self._taker.lists
            if consumed.room and not consumed.is_alone and consumed.queue.name not in self._odd
        ]
        if not names or not self._link.is_open:
            return
        self._watched.update(names)
        keys = [key for name in names for key in list_keys(self._link.layout.prefix, name)]
        self._link.send(ignore_reply, "CLIENT", "CACHING", "YES")
        self._link.send(self._counted, "EXISTS", *keys)
        if not self._declared.issuperset(names):
            self._declared.update(names)
            self._link.send(ignore_reply, "CLIENT", "CACHING", "YES")
            self._link.send(partial(self._found, names), "HMGET", self._queues_key, *names)

    def _counted(self, reply: Any) -> None:
        if reply != 0:
            self.changed([])

    def _found(self, names: list[str], reply: Any) -> None:
        """Which of the queues are declared: an operator may have deleted one."""
        if isinstance(reply, list):
            for name, arguments in zip(names, reply, strict=True):
                if arguments is None:
                    self._taker.deleted(name)

    def _look_later(self) -> None:
        has_alone = any(consumed.is_alone for consumed in self._taker.lists)
        seconds = LOOK_ALONE_SECONDS if has_alone else LOOK_SECONDS
        self._timers.later("look", seconds if self._is_told else LOOK_OFTEN_SECONDS, self._look)

    def _look(self) -> None:
        """Whatever Redis has said or not said."""
        self._watched.clear()
        self._declared.clear()
        self._odd.clear()
        self.take()
        self._look_later()


# Seconds between two looks for dead consumers, and at the least between two looks at delayed messages.
SWEEP_SECONDS, SHORTEST_WAIT, LONGEST_WAIT = 5.0, 0.02, 5.0
# When nobody has looked for the dead for so long (seconds), the living get as long to say that they live.
PATIENCE_SECONDS = 15.0


class Housekeeping:
    """Runs while the consumer's link is open. Redis says when a message is delayed (CLIENT TRACKING), so
    that it asks only when one is due."""

    def __init__(self, link: Link, warn: Callable[[str], None], renew: Callable[[], None]) -> None:
        self._link = link
        self._key = link.layout.key("amqtask.delay")
        self._channels = link.layout.channels
        self._warn = warn
        self._renew = renew
        self._due, self._sweep = OneTimer(link.loop), OneTimer(link.loop)
        self._is_asking = self._has_changed = False
        self._has_warned = self._has_looked = self._has_said_why = False

    def start(self) -> None:
        """A connection is open."""
        self.stop()
        self._is_asking = False
        self._link.send(self._look_at_settings, "INFO", "memory")
        self._look_at_delayed()
        self._look_for_the_dead()

    def _look_at_settings(self, reply: Any) -> None:
        """A Redis that makes room by itself deletes queues."""
        if not isinstance(reply, bytes) or self._has_looked:
            return
        self._has_looked = True
        fields = dict(line.partition(":")[::2] for line in reply.decode(errors="replace").splitlines())
        policy = fields.get("maxmemory_policy", "")
        if policy.startswith("allkeys"):
            self._warn(
                f"Redis at {self._link.server} has maxmemory-policy {policy}: when its memory is full it deletes queues with "
                "their messages. Set noeviction"
            )

    def stop(self) -> None:
        """Look no more."""
        self._due.cancel()
        self._sweep.cancel()

    def changed(self, keys: list[bytes] | None) -> None:
        """These keys have changed (None: all)."""
        if keys is None or self._key.encode() in keys:
            self._has_changed = True
            self._look_later(SHORTEST_WAIT)

    def _look_later(self, seconds: float) -> None:
        self._due.set(seconds, self._look_at_delayed)

    def _look_at_delayed(self) -> None:
        if not self._link.is_open or self._is_asking:
            return
        self._is_asking, self._has_changed = True, False
        self._link.send(ignore_reply, "CLIENT", "CACHING", "YES")
        self._link.send(ignore_reply, "EXISTS", self._key)
        self._link.run(self._looked, RELEASE_DUE, MOST_AT_ONCE, self._channels)

    def _looked(self, reply: Any) -> None:
        self._is_asking = False
        if not self._link.is_open:
            return
        if isinstance(reply, Exception):
            if isinstance(reply, ReplyError) and not passes(reply) and not self._has_said_why:
                self._has_said_why = True
                self._warn(
                    f"delayed messages cannot be looked at, so they wait. {publish_error(reply, self._link.server)}"
                )
            self._look_later(1.0)
            return
        self._has_said_why = False
        released, wait, homeless = reply
        if homeless and not self._has_warned:
            self._has_warned = True
            self._warn(f"{homeless} delayed messages are due, and their exchanges have no queues for them. They wait")
        seconds = LONGEST_WAIT if wait < 0 else min(LONGEST_WAIT, wait / 1000)
        if released == MOST_AT_ONCE or self._has_changed:
            seconds = min(seconds, SHORTEST_WAIT)
        self._look_later(max(seconds, SHORTEST_WAIT if released < MOST_AT_ONCE else 0.0))

    def _look_for_the_dead(self) -> None:
        if self._link.is_open:
            self._renew()  # what is its own is not to be swept, though it, or Redis, was away for longer than a lease
            self._link.run(ignore_reply, SWEEP, MOST_AT_ONCE, PATIENCE_SECONDS)
            self._sweep.set(SWEEP_SECONDS, self._look_for_the_dead)
