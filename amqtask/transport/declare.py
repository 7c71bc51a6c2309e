"""Declare entities over any connection; an entity that exists with other arguments is used as it is.

A queue or exchange that exists with other arguments, or that exists and that the user may not declare, was made by an operator:
it is used as it is, with a warning. A passive declare asks whether it exists. The bindings of an exchange that was found may be
refused, too: a publish to the exchange shows whether it routes anywhere.

A refused declaration closes its channel (403, 404, 405, 406: https://www.rabbitmq.com/amqp-0-9-1-reference), and every
unanswered delivery and unconfirmed publish of that channel would be lost. So on a loop declarations have a channel of their own.

A broker may not answer a declaration at all: RabbitMQ 4.0 waits for a minute for a classic queue whose node is down, and for a
quorum queue whose leader stands still. Then what was declared before, over any connection, is taken to exist (KnownEntities);
who waits for others gets an error, and declares again over another channel.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pika import spec
from pika.exceptions import ChannelClosedByBroker

from amqtask.exceptions import OperationalError, PublishError, PublishRefused
from amqtask.ground.loop import OneTimer, TurnLoop
from amqtask.protocol.entities import Binding, Declaration, Exchange, Queue
from amqtask.topology.declarations import describe_difference, is_declarable
from amqtask.transport.content import UNWRITABLE
from amqtask.transport.errors import ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED, ChannelClosing, declare_error

if TYPE_CHECKING:
    from amqtask.transport.wire import PikaChannel, Wire


# Bytes of the name of a queue or exchange, or of a routing key: they are AMQP short strings.
LONGEST_NAME = 255
RESOURCE_LOCKED = 405
# Seconds for one entity; doubled after each that took longer, until one is declared.
PATIENCE, LONGEST_PATIENCE = 2.0, 60.0

# How many entities a connection remembers as declared, at most.
MOST_DECLARED = 10_000
OnDeclared = Callable[["OperationalError | None"], None]


def may_exist(entity: Declaration, refusal: ChannelClosing) -> bool:
    """Whether an entity that the broker refused to declare may exist, and is to be asked for."""
    return not isinstance(entity, Binding) and refusal.reply_code in (PRECONDITION_FAILED, ACCESS_REFUSED)


class FoundEntities(set[Declaration]):
    """The entities that are used as they are found."""

    def __init__(self) -> None:
        super().__init__()
        # Queues of which the broker said that they are of another type.
        self.of_other_types: set[Declaration] = set()

    def forget(self, entity: Declaration) -> None:
        """It is gone."""
        self.discard(entity)
        self.of_other_types.discard(entity)

    def excuse(self, entity: Declaration, refusal: ChannelClosing) -> bool:
        """Whether this is a binding of such an exchange, which need not be made."""
        return isinstance(entity, Binding) and refusal.reply_code == ACCESS_REFUSED and entity.source in self

    def note(self, entity: Declaration, refusal: ChannelClosing, warn: Callable[[str], None]) -> None:
        """The entity exists, though the broker refused to declare it: use it, and warn."""
        self.add(entity)
        if "'x-queue-type'" in refusal.reply_text:
            self.of_other_types.add(entity)
        if refusal.reply_code == ACCESS_REFUSED:
            warn(f"the broker's user may not declare {entity_name(entity)}; it exists and is used as found")
        elif not isinstance(entity, Binding):
            warn(describe_difference(entity, refusal.reply_text))


class KnownEntities(set[Declaration]):
    """What a publisher has declared, over any of its connections. When the broker does not answer a declaration, it is taken to
    exist: a message to a queue that is gone after all comes back as unroutable, and its entities are declared anew."""

    def note(self, entities: Iterable[Declaration]) -> None:
        """These exist."""
        if len(self) > MOST_DECLARED:
            self.clear()  # chords' queues come and go
        self.update(entities)


class DeclaredEntities(set[Declaration]):
    """The entities that exist, as far as one connection knows; for connections that declare them one by one."""

    def __init__(self) -> None:
        super().__init__()
        self._found = FoundEntities()

    def missing(self, entities: Iterable[Declaration]) -> list[Declaration]:
        """Those that are to be declared now."""
        self.update(entity for entity in entities if isinstance(entity, Exchange) and not is_declarable(entity))
        return [entity for entity in entities if entity not in self]

    def declare(
        self,
        entities: Iterable[Declaration],
        declare_one: Callable[[Declaration, bool], ChannelClosing | None],
        warn: Callable[[str], None],
    ) -> None:
        """Make sure that they exist; `declare_one(entity, passive)` returns why the broker refuses that. Raises: PublishError."""
        for entity in self.missing(entities):
            refusal = declare_one(entity, False)
            if self.is_in_doubt(entity, refusal) and refusal is not None:
                self.use_found(entity, refusal, declare_one(entity, True), warn)

    def is_in_doubt(self, entity: Declaration, refusal: ChannelClosing | None) -> bool:
        """After it was declared: whether it may exist, although the broker refused that, and is to be asked for.

        Raises: PublishError when it does not."""
        if refusal is None or self._found.excuse(entity, refusal):
            self._note(entity)
            return False
        if not may_exist(entity, refusal):
            raise _refused(entity, refusal)
        return True

    def use_found(
        self, entity: Declaration, refusal: ChannelClosing, absence: ChannelClosing | None, warn: Callable[[str], None]
    ) -> None:
        """After it was asked for: use it as it is; `absence` is why the broker did not find it. Raises: PublishError."""
        if absence is not None:
            raise _refused(entity, refusal)
        self._found.note(entity, refusal, warn)
        self._note(entity)

    def _note(self, entity: Declaration) -> None:
        if len(self) > MOST_DECLARED:
            self.clear()  # chords' queues come and go; the others are declared once more
        self.add(entity)


def _refused(entity: Declaration, refusal: ChannelClosing) -> OperationalError:
    error = declare_error(entity_name(entity), refusal)
    error.__cause__ = refusal if isinstance(refusal, ChannelClosedByBroker) else None
    return error


def _details(entity: Declaration, *, passive: bool) -> dict[str, Any]:
    """The arguments that have the same names in all libraries."""
    details: dict[str, Any] = {"arguments": dict(entity.arguments)}
    if isinstance(entity, Binding):
        return {**details, "routing_key": entity.routing_key}
    if isinstance(entity, Queue):
        details["exclusive"] = entity.exclusive
    passive = passive or entity.passive
    return {**details, "passive": passive, "durable": entity.durable, "auto_delete": entity.auto_delete}


def declaring(channel: Any, entity: Declaration, *, passive: bool) -> Callable[..., Any]:
    """The method that declares or binds the entity, of a channel of pika's or aiormq's: they have the same names."""
    details = _details(entity, passive=passive)
    if isinstance(entity, Binding):
        bind = channel.exchange_bind if entity.to_exchange else channel.queue_bind
        return partial(bind, entity.destination, entity.source.name, **details)
    if isinstance(entity, Exchange):
        return partial(channel.exchange_declare, entity.name, exchange_type=entity.type, **details)
    return partial(channel.queue_declare, entity.name, **details)


def declaration(entity: Declaration, *, passive: bool) -> tuple[object, type]:
    """pika's object of the method that declares or binds the entity, and the class of its answer."""
    details = _details(entity, passive=passive)
    if isinstance(entity, Exchange):
        return spec.Exchange.Declare(exchange=entity.name, type=entity.type, **details), spec.Exchange.DeclareOk
    if isinstance(entity, Queue):
        return spec.Queue.Declare(queue=entity.name, **details), spec.Queue.DeclareOk
    source, destination = entity.source.name, entity.destination
    if entity.to_exchange:
        return spec.Exchange.Bind(source=source, destination=destination, **details), spec.Exchange.BindOk
    return spec.Queue.Bind(exchange=source, queue=destination, **details), spec.Queue.BindOk


def entity_name(entity: Declaration) -> str:
    """The entity's type and name."""
    if isinstance(entity, Queue):
        return f"queue {entity.name!r}"
    if isinstance(entity, Exchange):
        return f"exchange {entity.name!r}"
    return f"the binding of {entity.destination!r} to {entity.source.name!r}"


def has_line_end(name: str) -> bool:
    """Whether a name has line ends, which RabbitMQ removes (rabbit_channel:strip_cr_lf): it then declares another queue or
    exchange, and a client that waits for the answer about this one waits for ever."""
    return "\r" in name or "\n" in name


def wrong_name(name: str, room: int = LONGEST_NAME) -> str:
    """Why no queue or exchange can have this name, of so many bytes at most; nothing for one that can be."""
    size = len(name.encode(errors="replace"))
    if size > room:
        return f"has {size} bytes, and can have {room}"
    return "has a line end, which RabbitMQ takes out" if has_line_end(name) else ""


def check_name(entity: Declaration) -> None:
    """Raises: PublishError for a name that no queue or exchange can have."""
    if not isinstance(entity, Binding) and (reason := wrong_name(entity.name)):
        raise PublishError(f"{entity_name(entity)} cannot be declared: its name {reason}")


def check_declarable(entity: Declaration) -> None:
    """Raises: PublishError for an entity that AMQP cannot name or write, before a broker is asked."""
    check_name(entity)
    try:
        declaration(entity, passive=False)[0].encode()  # type: ignore[attr-defined] # of pika, untyped
    except UNWRITABLE as error:
        raise _unwritable(entity, error) from error


def _unwritable(entity: Declaration, error: Exception) -> PublishError:
    return PublishError(f"{entity_name(entity)} cannot be declared: {type(error).__name__}: {error}")


@dataclass(slots=True, eq=False)
class _Run:
    """A list of entities to declare, for one caller."""

    entities: Sequence[Declaration]
    on_done: OnDeclared
    position: int = 0
    # Why the broker refused to declare the current entity; a passive declare then shows whether it exists.
    refusal: ChannelClosedByBroker | None = None


class Declarer:
    """Declares one list after the other. Its owner says when there is a connection and when it is gone."""

    def __init__(self, loop: TurnLoop, on_warning: Callable[[str], None]) -> None:
        self._warn = on_warning
        self._patience = PATIENCE
        self._timer = OneTimer(loop)
        # These are asked for, not declared, on later connections too.
        self._found = FoundEntities()
        self._runs: deque[_Run] = deque()
        self._connection: Wire | None = None
        self._channel: Any = None

    def connected(self, connection: Wire) -> None:
        """There is a connection."""
        self._connection = connection

    def lost(self) -> None:
        """The connection is gone: callers declare their lists again on the next one."""
        self._connection = self._channel = None
        self._runs.clear()
        self._set_timer()

    def is_of_other_type(self, queue: Queue) -> bool:
        """Whether the broker said so of the queue that it has."""
        return queue in self._found.of_other_types

    def declare(self, entities: Sequence[Declaration], on_done: OnDeclared) -> None:
        """Declare these in order; `on_done(None)` once all exist, `on_done(error)` for the first one that fails.

        `on_done` is not called when the connection is lost before."""
        if not entities and not self._runs:
            on_done(None)  # it needs no channel
            return
        self._runs.append(_Run(entities, on_done))
        if len(self._runs) == 1:
            self._go_on()

    def _set_timer(self) -> None:
        """Start the timer of the first run."""
        self._timer.cancel()
        if self._runs:
            self._timer.set(self._patience, self._too_late)

    def _too_late(self) -> None:
        """Fail all runs: those behind the first one have waited as long, and would wait on."""
        runs, channel, seconds = list(self._runs), self._channel, self._patience
        self._channel = None
        self._runs.clear()
        self._patience = min(self._patience * 2, LONGEST_PATIENCE)
        if channel is not None and channel.is_open:
            channel.close()
        head = runs[0]
        name = entity_name(head.entities[head.position]) if head.position < len(head.entities) else "the last of a list"
        error = NotAnswered(f"the broker has not answered the declaration of {name} for {seconds:g} s")
        for run in runs:
            run.on_done(error)

    def _go_on(self) -> None:
        self._set_timer()
        if self._channel is None:
            self._open_channel()
        elif self._channel.is_open:
            self._send()

    def _open_channel(self) -> None:
        if self._connection is not None and self._connection.is_open:
            self._channel = self._connection.channel(on_open_callback=self._on_channel)
            self._channel.add_on_close_callback(self._on_channel_closed)

    def _on_channel(self, channel: PikaChannel) -> None:
        if channel is self._channel and self._runs:
            self._send()

    def _send(self) -> None:
        run = self._runs[0]
        while run.position < len(run.entities):
            entity = run.entities[run.position]
            if not isinstance(entity, Exchange) or is_declarable(entity):
                break
            run.position += 1
        else:
            self._end(run, None)
            return
        passive = entity in self._found or run.refusal is not None
        try:
            check_name(entity)
            declaring(self._channel, entity, passive=passive)(callback=lambda _: self._declared(run, entity))
        except PublishError as error:
            self._end(run, error)
        except UNWRITABLE as error:
            self._end(run, _unwritable(entity, error))

    def _declared(self, run: _Run, entity: Declaration) -> None:
        if not self._runs or self._runs[0] is not run:
            return  # it took too long
        refusal, run.refusal = run.refusal, None
        if refusal is not None:
            self._found.note(entity, refusal, self._warn)
        run.position += 1
        self._patience = PATIENCE
        self._set_timer()
        self._send()

    def _end(self, run: _Run, error: OperationalError | None) -> None:
        self._runs.popleft()
        # The next run first: its frames need not wait for the owner's callback.
        if self._runs:
            self._go_on()
        else:
            self._set_timer()
        run.on_done(error)

    def _on_channel_closed(self, channel: PikaChannel, error: Exception) -> None:
        if channel is not self._channel:
            return
        self._channel = None
        if not isinstance(error, ChannelClosedByBroker) or not self._runs:
            return  # the connection's end follows
        run = self._runs[0]
        failure = self._failure(run, run.entities[run.position], error)
        if failure is None:
            self._open_channel()
        else:
            self._end(run, failure)

    def _failure(self, run: _Run, entity: Declaration, error: ChannelClosedByBroker) -> OperationalError | None:
        """Why the current entity cannot be declared; None when it is tried another way."""
        if run.refusal is not None:
            return _error(entity, run.refusal)
        if entity in self._found:
            if error.reply_code == NOT_FOUND:
                self._found.forget(entity)  # deleted meanwhile: declare it with our arguments
                return None
            return _error(entity, error)
        if self._found.excuse(entity, error):
            run.position += 1
            return None
        if may_exist(entity, error):
            run.refusal = error
            return None
        return _error(entity, error)


def _error(entity: Declaration, error: ChannelClosedByBroker) -> OperationalError:
    if error.reply_code == RESOURCE_LOCKED:
        return QueueLocked(f"{entity_name(entity)} belongs to another connection: {error.reply_text}")
    return declare_error(entity_name(entity), error)


class NotAnswered(PublishRefused):
    """The broker does not answer a declaration, and may answer others."""


class QueueLocked(OperationalError):
    """An exclusive queue of another connection."""
