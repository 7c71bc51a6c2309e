"""Jobs on queues for the command line and others; the queue of history; a note; and what waits for its time.

Delayed messages are looked at as a queue named `amqtask.delay`.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from amqtask.exceptions import PublishError, PublishRefused, QueueNotFound
from amqtask.ground.strikes import let_through
from amqtask.protocol.entities import Exchange, Queue
from amqtask.protocol.message import Delivery, Message
from amqtask.topology.delays import TO_HEADER, UNTIL_HEADER
from amqtask.transport.contract import OFFSET, Moved, QueueState, Refusal
from amqtask.transport.errors import NOT_FOUND, PRECONDITION_FAILED
from amqtask.transport.redis.answers import MOST_ANSWERS, NEVER_CAME
from amqtask.transport.redis.layout import LEASE_SECONDS, SEPARATOR, Command, Layout, envelope, incoming, list_keys
from amqtask.transport.redis.publisher import FAILURES, answers_of
from amqtask.transport.redis.publishing import publish_error
from amqtask.transport.redis.scripts import ACK, DELETE, GIVE_BACK, RENEW, RESERVE, SWEEP, TRIM, Script
from amqtask.transport.redis.servers import close_idle
from amqtask.transport.redis.taking import NO_LIST

if TYPE_CHECKING:
    from amqtask.protocol.entities import Declaration
    from amqtask.topology.delays import Address
    from amqtask.transport.contract import Publisher
    from amqtask.transport.redis.servers import Deployment


# Seconds that Redis may take for an answer.
ANSWER_SECONDS = 10.0
# Seconds between looks into a list that is empty.
LOOK_SECONDS = 0.2


class RedisJobs:
    """See amqtask.transport.contract.QueueJobs."""

    def __init__(self, deployment: Deployment, layout: Layout) -> None:
        self._server = deployment.name
        self._client = deployment.client()
        self._layout = layout

    def __enter__(self) -> RedisJobs:
        self._ask(("PING",))
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections that nobody uses."""
        close_idle(self._client)

    def state(self, queue: str) -> QueueState:
        """How many messages are ready; Redis does not know consumers. Raises: QueueNotFound, PublishError."""
        state = self.states([queue]).get(queue)
        if state is None:
            raise QueueNotFound(f"there is no queue {queue!r} on this broker.")
        return state

    def states(self, queues: Sequence[str]) -> dict[str, QueueState]:
        """Of those of these queues that are there."""
        questions = [self._questions(queue) for queue in queues]
        answers = iter(self._ask(*(question for about_one in questions for question in about_one)) if questions else ())
        found = {}
        for queue, about_one in zip(queues, questions, strict=True):
            is_declared, has_bindings, *sizes = [next(answers) for _ in about_one]
            if is_declared or has_bindings or sum(sizes):
                found[queue] = QueueState(sum(sizes), 0)
        return found

    def _questions(self, queue: str) -> list[tuple[str, ...]]:
        return [
            ("HEXISTS", self._layout.key("amqtask.queues"), queue),
            ("EXISTS", self._layout.key(f"_kombu.binding.{queue}")),
            *(("LLEN", key) for key in self._keys(queue)),
        ]

    def purge(self, queue: str) -> int:
        """Delete the ready messages. Raises: QueueNotFound, PublishError."""
        ready = self.state(queue).ready
        self._ask(("DEL", *self._keys(queue)))
        return ready

    def delete(self, queue: str) -> None:
        """Delete the queue with its messages."""
        self._ask(("EVAL", DELETE.source, 1, self._layout.prefix, queue, queue))

    def take(self, queue: str) -> Delivery | None:
        """The first message, which is gone then."""
        self.state(queue)
        for key in self._keys(queue):
            (text,) = self._ask(("RPOP", key))
            if text is not None:
                return incoming(text).delivery(queue, 0)
        return None

    def _keys(self, queue: str) -> list[str]:
        return list_keys(self._layout.prefix, queue)

    def _ask(self, *commands: Command) -> list[Any]:
        try:
            return answers_of(self._client, commands, time.monotonic() + ANSWER_SECONDS)
        except FAILURES as error:
            let_through(error)
            raise publish_error(error, self._server) from error


class RedisTail(RedisJobs):
    """See amqtask.transport.contract.Tail. Messages stay in the list until they are acknowledged."""

    def __init__(self, deployment: Deployment, layout: Layout, queue: str) -> None:
        super().__init__(deployment, layout)
        self._queue = queue
        self._key = list_keys(layout.prefix, queue)[0]
        # What was read and is not acknowledged, the oldest first.
        self._held: list[bytes] = []

    def read(self, limit: int, seconds: float) -> list[Delivery]:
        """See the contract."""
        deadline = time.monotonic() + seconds
        while True:
            held = len(self._held)
            # Pushed left, so the oldest is the rightmost.
            (page,) = self._ask(("LRANGE", self._key, -(held + limit), -(held + 1)))
            page.reverse()
            self._held += page
            if page or time.monotonic() >= deadline:
                return [incoming(text).delivery(self._queue, tag) for tag, text in enumerate(page, start=held + 1)]
            time.sleep(max(0.0, min(LOOK_SECONDS, deadline - time.monotonic())))

    def acknowledge(self) -> None:
        """See the contract."""
        held, self._held = self._held, []
        if held:
            names = ("EVAL", TRIM.source, 1, self._layout.prefix, self._queue)
            self._ask((*names, held[0], held[-1], len(held)))


class RedisNote(RedisJobs):
    """See amqtask.transport.contract.Note."""

    def __init__(self, deployment: Deployment, layout: Layout, name: str) -> None:
        super().__init__(deployment, layout)
        self._key = layout.key(name)

    def read(self) -> str | None:
        """See the contract."""
        (text,) = self._ask(("GET", self._key))
        self.close()
        return None if text is None else text.decode(errors="replace")

    def write(self, text: str) -> None:
        """See the contract."""
        self._ask(("SET", self._key, text))
        self.close()


# Messages that a journal has at most, about.
MOST_KEPT = 50_000


class RedisJournal(RedisJobs):
    """See amqtask.transport.contract.Journal. Entries beyond MOST_KEPT are dropped, the oldest first."""

    def __init__(self, deployment: Deployment, layout: Layout, name: str, *, max_age: float) -> None:
        super().__init__(deployment, layout)
        self._deployment = deployment
        self._name = name
        self._max_age = max_age

    def write(self, message: Message) -> None:
        """See the contract."""
        self._ask(_entry(message, self._layout, self._name))
        self.close()

    def tail(self, position: object) -> RedisJournalTail:
        """See the contract."""
        oldest = max(0, int((time.time() - self._max_age) * 1000))
        return RedisJournalTail(self._deployment, self._layout, self._name, str(position or oldest))


def _entry(message: Message, layout: Layout, name: str) -> Command:
    text = envelope(message.body, message.properties, "", name)
    return ("XADD", layout.key(name), "MAXLEN", "~", MOST_KEPT, "*", "message", text)


class RedisJournalTail(RedisJobs):
    """See amqtask.transport.contract.JournalTail. `position` is the id of the last entry that was read."""

    def __init__(self, deployment: Deployment, layout: Layout, name: str, position: str) -> None:
        super().__init__(deployment, layout)
        self._name = name
        self._position = position

    def read(self, limit: int, seconds: float) -> list[Delivery]:
        """See the contract."""
        block = ("BLOCK", max(1, int(seconds * 1000)))
        key = self._layout.key(self._name)
        (streams,) = self._ask(("XREAD", "COUNT", limit, *block, "STREAMS", key, self._position))
        # A map by key, or pairs where the client speaks RESP2.
        entries = dict(streams or ()).get(key.encode(), ())
        deliveries = []
        for tag, (entry, fields) in enumerate(entries, start=1):
            self._position = entry.decode()
            delivery = incoming(fields[1]).delivery(self._name, tag)
            delivery.properties.headers = {**(delivery.properties.headers or {}), OFFSET: self._position}
            deliveries.append(delivery)
        return deliveries

    def write(self, message: Message) -> None:
        """See the contract."""
        self._ask(_entry(message, self._layout, self._name))

    def acknowledge(self) -> None:
        """Nothing waits for that."""


# The queue in which delayed messages are for those who look at queues.
DELAYED = "amqtask.delay"


class RedisDelayed:
    """Asks Redis while the caller waits: some milliseconds, at most the client's timeout."""

    blocks = True

    def __init__(self, deployment: Deployment, layout: Layout) -> None:
        self._client: Any = deployment.client()
        self._due = layout.key("amqtask.delay")
        self._entries = layout.key("amqtask.delayed")

    def soonest(self, limit: int) -> list[tuple[float, Delivery]]:
        """At most `limit` delayed messages with their due times (Unix time), the soonest first; none while Redis is away."""
        try:
            due = self._client.zrange(self._due, 0, limit - 1, withscores=True)
            entries = self._client.hmget(self._entries, [name for name, _ in due]) if due else []
        except FAILURES:
            return []
        return [(at / 1000, delivery_of(entry, at)) for (_, at), entry in zip(due, entries, strict=True) if entry]

    def count(self, address: Address) -> int:
        """None: workers hold no delayed message."""
        return 0

    def drop(self, address: Address) -> int:
        """None."""
        return 0

    def release(self, is_meant: Callable[[Delivery], bool], *, revoked: bool = False) -> int:
        """None."""
        return 0


def delivery_of(entry: bytes, due: float) -> Delivery:
    """A delayed message with the headers that say where it goes, and when (milliseconds of Unix time)."""
    # Anybody can write to the hash.
    exchange, routing_key, _, text = (entry.split(SEPARATOR.encode(), 3) + [b""] * 3)[:4]
    message = incoming(text)
    to, key = exchange.decode(errors="replace"), routing_key.decode(errors="replace")
    headers = {**message.properties.headers, TO_HEADER: to, UNTIL_HEADER: int(due)}
    properties = replace(message.properties, headers=headers)
    addressed = message._replace(properties=properties, exchange=to, routing_key=key)
    return addressed.delivery(DELAYED, 0, is_again=False)


# How many messages are read at once.
PAGE = 500


class RedisAdmin(RedisJobs):
    """See amqtask.transport.contract.Admin."""

    def __enter__(self) -> RedisAdmin:
        super().__enter__()
        return self

    @property
    def server(self) -> str:
        """Redis, or what calls itself otherwise, and its version."""
        (text,) = self._ask(("INFO", "server"))
        fields = dict(line.partition(":")[::2] for line in text.decode().splitlines())
        name = fields.get("server_name", "redis")
        return f"{name.capitalize()} {fields.get(f'{name}_version', fields.get('redis_version', '?'))}"

    def about(self) -> dict[str, str]:
        """The fields of INFO; `save` (when snapshots are written) where CONFIG is allowed, and `server_time`."""
        text, (seconds, microseconds) = self._ask(("INFO",), ("TIME",))
        fields = dict(line.partition(":")[::2] for line in text.decode().splitlines() if ":" in line)
        fields["server_time"] = str(int(seconds) + int(microseconds) / 1e6)
        try:
            (save,) = self._ask(("CONFIG", "GET", "save"))
        except PublishError:
            return fields  # services that others run often refuse it
        return {**fields, "save": save[1].decode() if isinstance(save, list) and len(save) > 1 else ""}

    @property
    def delay_queues(self) -> tuple[str, ...]:
        """Where delayed messages wait."""
        return (DELAYED,)

    def states(self, queues: Sequence[str]) -> dict[str, QueueState]:
        """Also of what is delayed."""
        found = super().states([queue for queue in queues if queue != DELAYED])
        if DELAYED in queues:
            (size,) = self._ask(("ZCARD", self._layout.key("amqtask.delay")))
            found[DELAYED] = QueueState(size, 0)
        return found

    def count(self, queue: str) -> int:
        """How many messages are ready."""
        return self.state(queue).ready

    def has_exchange(self, name: str) -> bool:
        """Whether it was declared here, or has bindings."""
        keys = self._layout.key("amqtask.exchanges"), self._layout.key(f"_kombu.binding.{name}")
        return any(self._ask(("HEXISTS", keys[0], name), ("EXISTS", keys[1])))

    def browse(self, queue: str, limit: int) -> Iterator[Delivery]:
        """The first messages, which stay."""
        if queue == DELAYED:
            yield from (delivery for _, delivery in self._waiting(0, limit))
            return
        self.state(queue)
        number = 0
        for key in self._keys(queue):
            while number < limit:
                # The first is the rightmost.
                (page,) = self._ask(("LRANGE", key, -(number + PAGE), -(number + 1)))
                for text in reversed(page[-(limit - number) :]):
                    number += 1
                    yield incoming(text).delivery(queue, number)
                if len(page) < PAGE:
                    break

    def move(
        self,
        queue: str,
        publisher: Publisher,
        convert: Callable[[Delivery], Message | None],
        *,
        limit: int | None = None,
        acknowledge: bool = True,
        is_stopped: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Moved], None] = lambda _: None,
    ) -> Moved:
        """See amqtask.transport.contract.Admin. What does not move is held until the end, and goes back to where it was; what a
        move held that was killed goes back half a minute later, when somebody looks."""
        if queue == DELAYED:
            return self._move_delayed(publisher, convert, limit, acknowledge, is_stopped, on_progress)
        done, mover = Moved(), uuid.uuid4().hex
        self._run(SWEEP, MOST_ANSWERS)  # what one held that was killed: there may be no worker that looks for it
        remaining, first, held = self.count(queue), 1, list[int]()
        renew_at = time.monotonic() + LEASE_SECONDS / 3
        try:
            for most in done.batches(limit, is_stopped):
                taken = self._reserve(mover, first, queue, min(most, remaining)) if remaining else []
                if not taken:
                    break
                first, remaining = first + len(taken), remaining - len(taken)
                held += (delivery.tag for delivery in taken)
                stored = done.publish(publisher, taken, convert)
                if acknowledge and stored:
                    tags = [delivery.tag for delivery in stored]
                    self._run(ACK, mover, *tags)
                    held = sorted(set(held).difference(tags))
                if held and time.monotonic() > renew_at:
                    renew_at = time.monotonic() + LEASE_SECONDS / 3
                    for at in range(0, len(held), MOST_ANSWERS):
                        self._run(RENEW, mover, LEASE_SECONDS, 0, *held[at : at + MOST_ANSWERS])
                on_progress(done)
        finally:
            held.reverse()  # the newest first, so that the oldest is the first again
            for at in range(0, len(held), MOST_ANSWERS):
                batch = held[at : at + MOST_ANSWERS]
                self._run(GIVE_BACK, mover, *(argument for tag in batch for argument in (tag, NEVER_CAME)))
        return done

    def _reserve(self, mover: str, first: int, queue: str, size: int) -> list[Delivery]:
        _, *groups = self._run(RESERVE, mover, first, LEASE_SECONDS, size, queue, size, "")
        deliveries: list[Delivery] = []
        for _, failed, *texts in groups:
            if failed == NO_LIST:
                raise PublishRefused(f"queue {queue!r} cannot be read: {texts[0].decode(errors='replace')}")
            for tag, text in enumerate(texts, first + len(deliveries)):
                message = incoming(text)
                is_again = message.redelivered or bool(failed)
                deliveries.append(message.delivery(queue, tag, failures=int(failed or 0), is_again=is_again))
        return deliveries

    def sift(self, queue: str, is_meant: Callable[[Delivery], bool], *, delete: bool) -> int:
        """How many of the messages that are ready now are meant; with `delete` they are deleted."""
        if queue != DELAYED:
            self.state(queue)
            total = 0
            for key in self._keys(queue):
                (texts,) = self._ask(("LRANGE", key, 0, -1))
                meant = [text for text in texts if is_meant(incoming(text).delivery(queue, 0))]
                if delete:
                    self._ask(*(("LREM", key, 1, text) for text in meant))
                total += len(meant)
            return total
        names = [name for name, delivery in self._all_waiting() if is_meant(delivery)]
        if delete:
            self._drop(names)
        return len(names)

    def wait(self, seconds: float) -> None:
        """Do nothing for so long."""
        time.sleep(seconds)

    def declare(self, entity: Declaration, *, passive: bool) -> Refusal | None:
        """Declare an entity, or ask whether it exists; why that is refused."""
        if (
            passive
            and isinstance(entity, Queue)
            and not self._ask(("HEXISTS", self._layout.key("amqtask.queues"), entity.name))[0]
        ):
            return Refusal(NOT_FOUND, f"there is no queue {entity.name!r}")
        if passive and isinstance(entity, Exchange) and not self.has_exchange(entity.name):
            return Refusal(NOT_FOUND, f"there is no exchange {entity.name!r}")
        differences: list[str] = []
        try:
            commands = [] if passive else list(self._layout.declaring(entity, differences.append))
        except PublishError as error:
            return Refusal(PRECONDITION_FAILED, str(error))
        for (_, on_reply), reply in zip(commands, self._ask(*(command for command, _ in commands)), strict=True):
            on_reply(reply)
        return Refusal(PRECONDITION_FAILED, differences[0]) if differences else None

    # -- what waits for its time

    def _waiting(self, start: int, count: int) -> list[tuple[bytes, Delivery]]:
        (due,) = self._ask(("ZRANGE", self._layout.key("amqtask.delay"), start, start + count - 1, "WITHSCORES"))
        # In pairs with RESP3, one after the other with RESP2.
        names, times = zip(*due, strict=True) if due and isinstance(due[0], list) else (due[::2], due[1::2])
        (entries,) = self._ask(("HMGET", self._layout.key("amqtask.delayed"), *names)) if names else ([],)
        return [
            (name, delivery_of(entry, float(at)))
            for name, at, entry in zip(names, times, entries, strict=True)
            if entry is not None
        ]

    def _all_waiting(self) -> Iterator[tuple[bytes, Delivery]]:
        for start in range(0, self.count(DELAYED), PAGE):
            yield from self._waiting(start, PAGE)

    def _drop(self, names: list[bytes]) -> None:
        for at in range(0, len(names), MOST_ANSWERS):
            batch = names[at : at + MOST_ANSWERS]
            self._ask(
                ("ZREM", self._layout.key("amqtask.delay"), *batch),
                ("HDEL", self._layout.key("amqtask.delayed"), *batch),
            )

    def _move_delayed(
        self,
        publisher: Publisher,
        convert: Callable[[Delivery], Message | None],
        limit: int | None,
        acknowledge: bool,
        is_stopped: Callable[[], bool],
        on_progress: Callable[[Moved], None],
    ) -> Moved:
        """What is due meanwhile goes to its queue here, too: it may then be in both places."""
        done = Moved()
        waiting = list(self._all_waiting())
        for most in done.batches(limit, is_stopped):
            batch, waiting = waiting[:most], waiting[most:]
            if not batch:
                break
            stored = done.publish(publisher, [delivery for _, delivery in batch], convert)
            if acknowledge:
                self._drop([name for name, delivery in batch if any(delivery is other for other in stored)])
            on_progress(done)
        return done

    def _run(self, script: Script, *arguments: Any) -> Any:
        (reply,) = self._ask(("EVAL", script.source, 1, self._layout.prefix, *arguments))
        return reply
